"""Recorded steps: they do what the step does, travel, and hold no value longer than it is used."""

from __future__ import annotations

import pickle
import weakref
from typing import Any

import numpy as np
import pytest

from polyradix.backend.alone import Alone
from polyradix.backend.batch import HostBatch
from polyradix.backend.expand import Expanded, Expansions
from polyradix.backend.numpy import entry
from polyradix.backend.protocol import (
    AttnSpec,
    Heads,
    KVSpec,
    Limits,
    MoeSpec,
    MoeWeights,
    Ops,
    ParamKind,
    Params,
    ParamSpec,
)
from polyradix.backend.record import Program, Recorder, Ref
from polyradix.backend.registry import check_drift

HEADS = Heads(2, 1, 8)
ATTN = AttnSpec(HEADS, 0.3, window=3)
MOE = MoeSpec(4, 2)
EMBED = np.random.default_rng(3).normal(size=(9, 16)).astype(np.float32)
LIMITS = Limits(16, 2, 16)


def pack(backend: Any, kind: ParamKind, *shape: int) -> Any:
    value = np.random.default_rng(len(shape) + sum(shape)).normal(size=shape).astype(np.float32) / 4
    return backend.pack(ParamSpec(kind, kind, shape, "float32"), lambda part="weight": value)


def params_of(backend: Any) -> Params:
    layer = {
        "qkv": pack(backend, "linear", 32, 16),
        "sinks": pack(backend, "sinks", 2),
        "o": pack(backend, "linear_reduce", 16, 16),
        "norm": pack(backend, "norm", 16),
        "router": pack(backend, "router", 4, 16),
        "gate_up": pack(backend, "experts", 4, 12, 16),
        "down": pack(backend, "experts", 4, 16, 6),
    }
    top = {"embed": pack(backend, "embed", 9, 16), "rope": pack(backend, "rope", 16, 8)}
    return Params(top | {"logits": pack(backend, "logits", 9, 16)}, [layer, layer])


def step_with(collectives: Any) -> Any:
    def step(ops: Ops, params: Params, kv: Any, m: Any) -> Any:
        def body(w: dict[str, Any], carry: Any, kv: Any) -> Any:
            x, h = carry
            q, k, v = ops.qkv(x, w["qkv"], heads=HEADS)
            q, k = ops.rope(q, k, params.top["rope"], m)
            x, kv = ops.attend(q, k, v, kv, m, AttnSpec(**{**vars(ATTN), "sinks": w["sinks"]}))
            x, h = ops.add_rms_norm(ops.linear_reduce(x, w["o"]), h, w["norm"], 1e-5)
            collectives.barrier()
            return (collectives.all_reduce(ops.moe(x, MoeWeights(w["router"], w["gate_up"], w["down"]), MOE)), h), kv

        x = ops.embed(params.top["embed"], m)
        (x, h), kv = ops.layers([body, body], params.layers, (x, x), kv)
        return ops.logits(ops.last(ops.add(x, h), m), params.top["logits"], softcap=5.0), kv

    return step


def batch() -> HostBatch:
    parts = [[3, 1, 4, 1, 5], range(5), range(4, 9), [0, 5], [5], [[1, 2]], [4], [-1] * 5]
    return HostBatch(*(np.array(part, np.int32) for part in parts))


def recorded(recorder: Recorder, params: Params, ops: Any = None) -> Program:
    program = recorder.record(step_with(recorder.collectives), ops or recorder.ops, params)
    return pickle.loads(pickle.dumps(program))  # type: ignore[no-any-return]


@pytest.mark.parametrize("expanded", [False, True])
def test_a_recording_does_what_the_step_does(expanded: bool) -> None:
    backend, recorder = entry.create(), Recorder(1)
    params, answers = params_of(backend), []
    program = recorded(recorder, params, Expanded(recorder.ops) if expanded else None)
    once = lambda ops, params, kv, m: program(ops, Alone(), params, kv, m)  # noqa: E731
    for step in (step_with(Alone()), once, once):
        kv = backend.alloc_kv(KVSpec(2, 1, 8, 4, "float32"), 3)
        logits, kv = backend.compile(step, LIMITS)(params, kv, backend.prepare(batch()))
        answers.append((logits, backend.export_pages(kv, [1, 2]).result()))
    for logits, pages in answers[1:]:
        assert np.array_equal(logits, answers[0][0])
        assert np.array_equal(pages, answers[0][1])


def test_what_it_shows_keeps_the_protocol() -> None:
    backend, recorder = entry.create(), Recorder(4)
    backend.ops, backend.collectives = recorder.ops, recorder.collectives
    check_drift("recorded", backend)
    assert backend.collectives.size == 4


def test_outside_of_a_recording_verbs_raise() -> None:
    recorder = Recorder(2)
    with pytest.raises(RuntimeError, match="add is for use inside a step"):
        recorder.ops.add(1, 2)
    with pytest.raises(RuntimeError, match="barrier is for use inside a step"):
        recorder.collectives.barrier()
    with pytest.raises(RuntimeError, match="layers is for use inside a step"):
        recorder.ops.layers([], [], None, None)
    with pytest.raises(TypeError, match="expected logits and a KV"):
        recorder.record(lambda ops, params, kv, m: (3, kv), recorder.ops, Params({}, []))
    with pytest.raises(RuntimeError, match="inside a step"):  # an error has ended the recording
        recorder.ops.last(1, 2)


class Value:
    pass


class Counting(Expansions):
    """Knows how many values there are at most."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Value] = weakref.WeakSet()
        self.most = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name in ("alive", "most", "layers", "made"):
            return object.__getattribute__(self, name)
        return lambda *args, **kwargs: self.made(name, args)

    def made(self, name: str, args: tuple[Any, ...]) -> Any:
        assert not any(isinstance(x, Ref) for x in args)
        out = [Value() for _ in range({"qkv": 3, "rope": 2, "add_rms_norm": 2, "attend": 2}.get(name, 1))]
        self.alive.update(out)
        self.most = max(self.most, len(self.alive))
        return tuple(out) if len(out) > 1 else out[0]


def test_a_value_is_let_go_of_after_its_last_use() -> None:
    recorder, ops = Recorder(1), Counting()
    params = params_of(entry.create())
    program = recorded(recorder, params)
    program(ops, Alone(), params, [1, 2], None)  # type: ignore[arg-type]
    assert ops.most <= 7  # the carry, q, k and v, and these turned
