"""Selection, refusal and the expansion switch, over made-up entry points."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from polyradix.backend import registry
from polyradix.backend.alone import Alone
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expanded
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyOps
from polyradix.backend.protocol import Found
from polyradix.backend.registry import DeviceUnavailable, ProtocolDrift, UnknownDevice, discover, open_backend


class FakeEntry:
    """An entry whose probe and backend the test chooses."""

    def __init__(self, found: Found, backend: Any = None, protocol: Any = (1, 0)) -> None:
        self.protocol = protocol
        self.found = found
        self.backend = backend
        self.options: dict[str, Any] = {}

    def probe(self) -> Found:
        return self.found

    def create(self, **options: Any) -> Any:
        self.options = options
        return self.backend or NumpyBackend("float32", False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(name=entry, ...) makes these the only installed backends; None is a package that cannot import."""

    def put(**entries: Any) -> None:
        points = []
        for name, entry in entries.items():
            module = f"fake_backend_{name}"
            if entry is not None:
                monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
                monkeypatch.setattr(sys.modules[module], "entry", entry, raising=False)
            points.append(EntryPoint(name, f"{module}:entry", registry.GROUP))
        monkeypatch.setattr(registry, "entry_points", lambda group: points)

    return put


GOOD = Found(True, "fine", rank=5)


def test_installed_backends_open() -> None:
    assert open_backend("numpy").caps.name == "numpy"
    assert open_backend("null", step_time_s=0.0).caps.name == "null"
    assert {"numpy", "null"} <= {d.name for d in discover()}


def test_auto_takes_the_highest_usable_rank(install: Any) -> None:
    best = FakeEntry(Found(True, "fine", rank=7))
    install(
        low=FakeEntry(Found(True, "fine", rank=1)),
        best=best,
        gone=FakeEntry(Found(False, "no device", rank=9)),
        pretend=FakeEntry(Found(True, "fine", rank=8, emulated=True)),
        broken=None,
    )
    open_backend("auto", threads=3)
    assert best.options == {"threads": 3}


def test_auto_never_takes_a_negative_rank(install: Any) -> None:
    install(null=FakeEntry(Found(True, "computes nothing", rank=-1)), broken=None)
    with pytest.raises(DeviceUnavailable, match=r"(?s)no backend can be used.*broken: not usable, ModuleNotFoundError"):
        open_backend("auto")


def test_options_go_over_those_of_the_probe(install: Any) -> None:
    entry = FakeEntry(Found(True, "fine", options={"threads": 2, "kernels": "a"}))
    install(one=entry)
    open_backend("one", threads=4)
    assert entry.options == {"threads": 4, "kernels": "a"}


def test_by_name_imports_no_other_backend(install: Any) -> None:
    class Trap:
        def probe(self) -> Found:
            raise AssertionError("another backend was probed")

    install(one=FakeEntry(GOOD), trap=Trap())
    open_backend("one")


def test_unknown_device_lists_what_was_found_and_why_not(install: Any) -> None:
    install(one=FakeEntry(GOOD), gone=FakeEntry(Found(False, "driver missing")), broken=None)
    with pytest.raises(UnknownDevice) as error:
        open_backend("two")
    text = str(error.value)
    assert "device is 'two'" in text
    assert "one: fine" in text
    assert "gone: not usable, driver missing" in text
    assert "broken: not usable, ModuleNotFoundError" in text


def test_unavailable_says_the_detail(install: Any) -> None:
    install(gone=FakeEntry(Found(False, "driver missing")), broken=None)
    with pytest.raises(DeviceUnavailable, match="'gone' cannot be used: driver missing"):
        open_backend("gone")
    with pytest.raises(DeviceUnavailable, match="'broken' cannot be used: ModuleNotFoundError"):
        open_backend("broken")


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("one", value, registry.GROUP) for value in ("a:entry", "b:entry")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(registry.DeviceError, match=r"two packages offer a backend named 'one': a:entry and b:entry"):
        open_backend("one")


def test_emulation_only_when_asked(install: Any) -> None:
    emulated = NumpyBackend("float32", False)
    emulated.caps = dataclasses.replace(emulated.caps, emulated=True)
    honest = Found(True, "fine", emulated=True)
    install(honest=FakeEntry(honest, emulated), sly=FakeEntry(GOOD, emulated), denies=FakeEntry(honest))
    with pytest.raises(DeviceUnavailable, match="--emulate"):
        open_backend("honest")
    with pytest.raises(DeviceUnavailable, match="--emulate"):
        open_backend("sly")
    with pytest.raises(ProtocolDrift, match="its probe says emulated, its capabilities do not"):
        open_backend("denies", emulate=True)
    assert open_backend("honest", emulate=True) is emulated


class ExtraVerb(NumpyOps):
    def convolve(self, x: Any) -> Any:
        return x


def quiet() -> NumpyBackend:
    """Says nothing about collectives."""
    backend = NumpyBackend("float32", False)
    del backend.collectives
    return backend


class SendReceive(Alone):
    def send(self, x: Any, to: int) -> None: ...


class RenamedParam(NumpyOps):
    def linear(self, x: Any, weight: Any) -> Any:
        return x


class MissingVerb:
    """All verbs of NumpyOps but rope."""

    def __init__(self, ops: Any) -> None:
        for name in (n for n in dir(ops) if not n.startswith("_") and n != "rope"):
            setattr(self, name, getattr(ops, name))


class ExtraMethod(NumpyBackend):
    def warm(self) -> None: ...


class LostDefault(NumpyBackend):
    def prepare(self, batch: Any, prev: Any) -> Any:  # type: ignore[override]
        return batch


def backend_with(ops: Any) -> NumpyBackend:
    backend = NumpyBackend("float32", False)
    backend.ops = ops(backend._wide, backend._store) if isinstance(ops, type) else ops
    return backend


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: backend_with(ExtraVerb), r"Ops\.convolve is unknown"),
        (lambda: backend_with(RenamedParam), r"Ops\.linear takes \(x, weight\), expected \(x, w\)"),
        (lambda: backend_with(MissingVerb(backend_with(NumpyOps).ops)), r"perfect: Ops\.rope is missing$"),
        (lambda: ExtraMethod("float32", False), r"Backend\.warm is unknown"),
        (lambda: LostDefault("float32", False), r"Backend\.prepare lacks a default"),
        (quiet, r"'one': collectives missing"),
        (lambda: NumpyBackend("float32", False, SendReceive()), r"Collectives\.send is unknown"),
    ],
    ids=[
        "extra verb",
        "renamed parameter",
        "missing verb",
        "extra method",
        "lost default",
        "quiet",
        "extra collective",
    ],
)
def test_drift_is_refused_by_name(install: Any, make: Any, message: str) -> None:
    install(one=FakeEntry(GOOD, make()))
    with pytest.raises(ProtocolDrift, match=message.replace("perfect", r"does not keep protocol 1\.0")):
        open_backend("one")


def test_every_drift_is_named_at_once(install: Any) -> None:
    class Both(ExtraVerb, RenamedParam): ...

    install(one=FakeEntry(GOOD, backend_with(Both)))
    with pytest.raises(ProtocolDrift, match=r"Ops\.convolve.*Ops\.linear"):
        open_backend("one")


def test_public_values_are_not_drift(install: Any) -> None:
    backend = NumpyBackend("float32", False)
    backend.threads = 4  # type: ignore[attr-defined]
    install(one=FakeEntry(GOOD, backend))
    assert open_backend("one") is backend


def test_tensor_parallel_ranks(install: Any) -> None:
    class Single:
        protocol = (1, 0)

        def probe(self) -> Found:
            return GOOD

        def create(self, threads: int = 1) -> Any:
            return NumpyBackend("float32", False)

    narrow = NumpyBackend("float32", False)
    narrow.caps = dataclasses.replace(narrow.caps, max_tp=2)
    entry = FakeEntry(GOOD)
    install(one=Single(), narrow=FakeEntry(GOOD, narrow), deaf=entry)
    assert open_backend("one", tp=1).caps.name == "numpy"
    with pytest.raises(Unsupported, match=re.escape("tp 2 (device 'one' has no tensor parallelism)")):
        open_backend("one", tp=2)
    with pytest.raises(Unsupported, match=re.escape("tp 4 (device 'narrow' offers at most 2)")):
        open_backend("narrow", tp=4)
    with pytest.raises(ProtocolDrift, match=re.escape("'deaf': collectives.size is 1; expected tp (2)")):
        open_backend("deaf", tp=2)
    assert entry.options == {"tp": 2}
    with pytest.raises(ValueError, match="tp is 0; expected at least 1"):
        open_backend("one", tp=0)


def test_numpy_ranks_keep_the_protocol() -> None:
    backend = open_backend("numpy", tp=2)
    assert backend.collectives.size == 2
    with pytest.raises(Unsupported, match="tp 2"):
        open_backend("null", tp=2)


@pytest.mark.parametrize("version", [(2, 0), (0, 9), (1, 1), None])
def test_other_protocol_versions_are_refused(install: Any, version: Any) -> None:
    install(one=FakeEntry(GOOD, protocol=version))
    with pytest.raises(ProtocolDrift, match=r"was written for protocol .*; this core has \(1, 0\)"):
        open_backend("one")


def test_expansion_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRADIX_EXPAND", "all")
    assert isinstance(open_backend("numpy").ops, Expanded)
    monkeypatch.setenv("POLYRADIX_EXPAND", "")
    assert isinstance(open_backend("numpy").ops, NumpyOps)
    monkeypatch.setenv("POLYRADIX_EXPAND", "some")
    with pytest.raises(ValueError, match="POLYRADIX_EXPAND is 'some'"):
        open_backend("numpy")


def test_expanded_ops_avoid_the_backends_own_fused_verbs() -> None:
    class WrongFused(NumpyOps):
        def linear_gated(self, x: Any, w: Any, kind: Any) -> Any:
            raise AssertionError("the fused verb was called")

    ops = backend_with(WrongFused).ops
    ops.linear = lambda x, w: x  # type: ignore[method-assign]
    ops.gated = lambda x, kind: ("gated", x, kind)  # type: ignore[method-assign]
    assert Expanded(ops).linear_gated("x", None, "silu") == ("gated", "x", "silu")
