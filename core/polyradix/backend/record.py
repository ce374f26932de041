"""Records a step as data, for a backend whose ranks are processes: what is noted once can be sent, and run anywhere.

A step talks through `ops` and `collectives` only and cannot look inside an Array, so one run over Refs notes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, wraps
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from polyradix.backend.protocol import KV, Array, Collectives, LayerBody, Meta, Ops, Params, Step, Weight

T = TypeVar("T")
On = Literal["ops", "collectives"]


@dataclass(frozen=True)
class Ref:
    """Stands for a value that there is only while a step runs."""

    id: int


@dataclass(frozen=True)
class _Made:
    """A dataclass of the contract that has Refs in it, AttnSpec for one."""

    kind: type
    values: dict[str, Any]


@dataclass
class _Call:
    on: On
    verb: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[Ref, ...]
    alone: bool  # one value instead of a tuple
    dead: tuple[Ref, ...] = ()  # what nobody asks for afterwards


@dataclass
class _Layers:
    """Each body: its layer's KV, what it calls, and its layer's KV afterwards."""

    bodies: list[tuple[Ref, list[_Call], Ref]]
    kv: Ref
    out: Ref


META, CACHE = Ref(0), Ref(1)


@dataclass(frozen=True)
class Program:
    """A recorded step. Weights are known by their order in Params, so it fits all Params of the same names."""

    calls: list[_Call | _Layers]
    logits: Ref
    kv: Ref

    def __call__(self, ops: Ops, collectives: Collectives, params: Params, kv: KV, meta: Meta) -> tuple[Array, KV]:
        """Runs it, as Step does. A value is let go of after its last use."""
        values: dict[Ref, Any] = {META: meta, CACHE: kv}
        values |= {Ref(i): w for i, w in enumerate(_weights(params), 2)}
        on = {"ops": ops, "collectives": collectives}
        for call in self.calls:
            if isinstance(call, _Call):
                _run(call, on, values)
            else:
                bodies = [_body(body, on, values) for body in call.bodies]
                _, values[call.out] = ops.layers(bodies, [{} for _ in bodies], None, values[call.kv])
        return values[self.logits], values[self.kv]


def _body(body: tuple[Ref, list[_Call], Ref], on: dict[str, Any], values: dict[Ref, Any]) -> LayerBody:
    before, calls, after = body

    def run(layer: dict[str, Weight], carry: Any, kv: KV) -> tuple[Any, KV]:
        values[before] = kv
        for call in calls:
            _run(call, on, values)
        return None, values[after]

    return run


def _run(call: _Call, on: dict[str, Any], values: dict[Ref, Any]) -> None:
    args = [_filled(x, values) for x in call.args]
    result = getattr(on[call.on], call.verb)(*args, **{k: _filled(x, values) for k, x in call.kwargs.items()})
    values.update(zip(call.out, (result,) if call.alone else result or (), strict=True))
    del args, result
    for ref in call.dead:
        del values[ref]


def _filled(x: Any, values: dict[Ref, Any]) -> Any:
    if isinstance(x, Ref):
        return values[x]
    return x.kind(**{k: _filled(v, values) for k, v in x.values.items()}) if isinstance(x, _Made) else x


class Recorder:
    """`ops` and `collectives` are what a step gets while it is recorded, and a backend may show as its own: outside of
    a recording their verbs raise RuntimeError."""

    def __init__(self, size: int) -> None:
        self.ops = cast(Ops, _NotedOps(self))
        self.collectives = cast(Collectives, _NotedCollectives(self))
        self.collectives.size = size
        self.calls: list[Any] | None = None
        self._next = 0

    def record(self, step: Step, ops: Ops, params: Params) -> Program:
        """`ops` is this recorder's, or what wraps it; of `params` only the names count."""
        weights = iter([Ref(i) for i, _ in enumerate(_weights(params), 2)])
        top = {name: next(weights) for name in params.top}
        layers = [{name: next(weights) for name in layer} for layer in params.layers]
        self._next, self.calls = 2 + len(top) + sum(map(len, layers)), []
        given = self._next
        try:
            logits, kv = step(ops, Params(top, layers), CACHE, META)
            calls = self.calls
        finally:
            self.calls = None
        if not (isinstance(logits, Ref) and isinstance(kv, Ref)):
            raise TypeError("the step returned what no verb gave it; expected logits and a KV")
        _bury(calls, {logits, kv}, given)
        return Program(calls, logits, kv)

    def new(self) -> Ref:
        self._next += 1
        return Ref(self._next - 1)

    def note(self, on: On, form: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.calls is None:
            raise RuntimeError(f"{form.__name__} is for use inside a step")
        count, many = _results(form)
        out = tuple(self.new() for _ in range(count))
        kept = {k: _noted(x) for k, x in kwargs.items()}
        self.calls.append(_Call(on, form.__name__, tuple(map(_noted, args)), kept, out, not many and count == 1))
        return out if many else out[0] if out else None

    def layers(
        self, bodies: Sequence[LayerBody], params: Sequence[dict[str, Weight]], carry: Any, kv: Ref
    ) -> tuple[Any, Ref]:
        outer, noted = self.calls, []
        if outer is None:
            raise RuntimeError("layers is for use inside a step")
        for body, layer in zip(bodies, params, strict=True):
            self.calls, before = [], self.new()
            carry, after = body(layer, carry, before)
            noted.append((before, self.calls, after))
        self.calls = outer
        out = self.new()
        outer.append(_Layers(noted, kv, out))
        return carry, out


class _Notes:
    def __init__(self, tape: Recorder) -> None:
        self._tape = tape


def _verbs_of(protocol: type, on: On) -> Callable[[type[T]], type[T]]:
    """Gives a class each verb that the protocol has and it has not, with the protocol's signature."""

    def noting(form: Any) -> Any:
        @wraps(form)
        def verb(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._tape.note(on, form, args, kwargs)

        return verb

    def decorate(cls: type[T]) -> type[T]:
        for name, form in vars(protocol).items():
            if callable(form) and not name.startswith("_") and name not in vars(cls):
                setattr(cls, name, noting(form))
        return cls

    return decorate


@_verbs_of(Ops, "ops")
class _NotedOps(_Notes):
    def layers(
        self, bodies: Sequence[LayerBody], params: Sequence[dict[str, Weight]], carry: Any, kv: KV
    ) -> tuple[Any, KV]:
        return self._tape.layers(bodies, params, carry, kv)


@_verbs_of(Collectives, "collectives")
class _NotedCollectives(_Notes):
    size: int


@cache
def _results(form: Any) -> tuple[int, bool]:
    """How many values a verb gives, and whether as a tuple."""
    result = get_type_hints(form)["return"]
    many = get_origin(result) is tuple
    return (len(get_args(result)) if many else result is not type(None)), many


def _noted(x: Any) -> Any:
    if not is_dataclass(x) or isinstance(x, Ref | type):
        return x
    values = {f.name: _noted(getattr(x, f.name)) for f in fields(x)}
    return _Made(type(x), values) if any(isinstance(v, Ref | _Made) for v in values.values()) else x


def _refs(x: Any) -> Iterator[Ref]:
    if isinstance(x, Ref):
        yield x
    elif isinstance(x, _Made):
        for value in x.values.values():
            yield from _refs(value)


def _bury(calls: list[Any], kept: set[Ref], given: int) -> None:
    """Notes which values each call is the last to use. Those numbered below `given` come from outside and stay."""
    for call in reversed(calls):
        if isinstance(call, _Layers):
            kept |= {after for _, _, after in call.bodies}
            for _, inner, _ in reversed(call.bodies):
                _bury(inner, kept, given)
        else:
            used = {r for x in (*call.args, *call.kwargs.values()) for r in _refs(x)} | set(call.out)
            call.dead = tuple(r for r in used - kept if r.id >= given)
            kept |= used


def _weights(params: Params) -> Iterator[Weight]:
    yield from params.top.values()
    for layer in params.layers:
        yield from layer.values()
