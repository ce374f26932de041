"""The simulated device: runs what torch calls on it. A call of plain torch is computed on the CPU; a vendor's op is
held against its contract, computed by our reference, and its result's form compared with the vendor's Meta kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from polyradix_npu import contracts
from polyradix_npu.contracts import WrongCall
from polyradix_npu.emulate import formats, reference, reference_attention
from polyradix_npu.emulate.memory import alias, aliased, each, leaves, on_device, upload

COPIES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}
NATIVE = {"npu::get_npu_format"}  # launches nothing
EMPTY = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}
NO_META = {"npu::npu_format_cast", "atb::_npu_paged_attention"}  # the wheel has no Meta kernel for them
VENDORS = ("npu::", "atb::")
FROM_HOST = {"atb::_npu_paged_attention"}  # takes lengths in a tensor of the host
WORKSPACE = "npu::_npu_fused_infer_attention_score_v2_get_max_workspace"
OUTPUTS = "npu::_npu_fused_infer_attention_score_v2_infer_output"
KERNELS = ("PrivateUse1", "CompositeImplicitAutograd", "CompositeExplicitAutograd")  # of the device, or made of others


@dataclass(frozen=True)
class Call:
    """A recorded call of a graph; replays write `out` again."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


Recording = list[Call | Callable[[], None]]  # of a graph: calls, and what its events do between them


class SimulatedDevice(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Entered, it computes for every tensor on device npu. `recording` is the graph being captured, if one is; `group`
    is where its open task group starts; `updating` takes the calls of a task update."""

    def __init__(self) -> None:
        super().__init__()
        self.recording: Recording | None = None
        self.group = 0
        self.updating: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self._entered = 0

    def __enter__(self) -> SimulatedDevice:
        self._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        values = list(leaves((args, kwargs)))
        here = any(on_device(x) for x in values)
        asked = kwargs.get("device")
        if not here and (asked is None or torch.device(asked).type != "npu"):
            return func(*args, **kwargs)
        if func.is_view and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # a view, or a copy where none is possible
                return func.decompose(*args, **kwargs)
        if func.is_view or name in EMPTY | NATIVE:
            return func(*args, **kwargs)
        if name in (WORKSPACE, OUTPUTS):
            return _room(name, contracts.bind(func, args, kwargs))
        if self.updating is not None:
            return self.updating(func, args, kwargs)
        _has_kernel(func)
        formats.check(name, values)
        if name not in COPIES | FROM_HOST:
            _one_device(name, values)
        elif self.recording is not None and (name in FROM_HOST or not _stays(name, args, kwargs)):
            raise WrongCall(f"{name} moves data between host and device while a graph is captured")
        out = self.run(func, args, kwargs)
        if self.recording is not None:
            self.recording.append(Call(func, args, kwargs, out))
            _spoil(out, args, kwargs)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result on its device; arguments that it changes are changed, unless a graph is being captured."""
        if func._schema.name.startswith(VENDORS):
            return self._vendor(func, args, kwargs)
        changes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if changes and self.recording is not None:
            return args[0]
        there = torch.device(kwargs.get("device") or "npu").type == "npu"
        out = func(*aliased(args), **aliased(kwargs))
        return args[0] if changes else _placed(out) if there else out

    def _vendor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = contracts.bind(func, args, kwargs)
        given.pop("workspace", None)
        targets = given.pop("out") if func._overloadname == "out" else None
        name, runs = func._schema.name, self.recording is None
        contracts.check(name, given, values=runs)
        made = reference.run(name, contracts.mapped(given, alias), write=runs)
        if name == "npu::npu_format_cast":
            return formats.cast(made, given["acl_format"])
        if name not in NO_META:
            _same_form(func, given, made)
        if targets is None:
            return _placed(made)
        for target, value in zip(targets, made, strict=True):
            alias(target).copy_(value)
        return targets

    def replay(self, recording: Recording) -> None:
        with _disable_current_modes():  # what follows is no longer the model's but ours
            for call in recording:
                if not isinstance(call, Call):
                    call()
                    continue
                new = self.run(call.func, call.args, call.kwargs)
                for old, value in zip(leaves(call.out), leaves(new), strict=True):
                    if on_device(old) and old is not value:
                        alias(old).copy_(alias(value))

    def inside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, run on the simulated device."""

        @wraps(call)
        def entered(*args: Any, **kwargs: Any) -> Any:
            if self._entered:
                return call(*args, **kwargs)
            with self:
                return call(*args, **kwargs)

        return entered


def _placed(out: Any) -> Any:
    return each(out, lambda x: upload(x) if isinstance(x, torch.Tensor) else x)


def _stays(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy is from the device to the device."""
    other = args[1] if name == "aten::copy_" else args[0]
    to = kwargs.get("device")
    return (
        name != "aten::_local_scalar_dense"
        and on_device(args[0])
        and on_device(other)
        and (to is None or torch.device(to).type == "npu")
    )


@cache
def _has_kernel(func: Any) -> None:
    """Raises WrongCall where torch-npu would quietly run an op on the CPU, with copies there and back."""
    packet = func._overloadpacket
    forms = [func, *(getattr(packet, name) for name in packet.overloads())]  # one form may be made of another
    if not any(
        form.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, key)) for form in forms for key in KERNELS
    ):
        raise WrongCall(f"{func}: this torch-npu has no kernel of it, and would run it on the CPU")


def _one_device(name: str, values: list[Any]) -> None:
    for x in values:
        if isinstance(x, torch.Tensor) and not on_device(x) and x.dim():
            raise WrongCall(f"{name}: a tensor {tuple(x.shape)} is on {x.device}; expected npu, as the others are")


def _spoil(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A captured call has not run: nothing may be read from what it will write."""
    given = {id(x) for x in leaves((args, kwargs))}
    for x in leaves(out):
        if on_device(x) and id(x) not in given:
            alias(x).fill_(float("nan") if x.is_floating_point() else 0)


def _room(name: str, given: dict[str, Any]) -> Any:
    """What a capture allocates before attention: its workspace, or its two outputs."""
    if name == WORKSPACE:
        return upload(torch.zeros(1, dtype=torch.uint8))
    return _placed(reference_attention.room(SimpleNamespace(**contracts.mapped(given, alias))))


@dataclass(frozen=True)
class Form:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _same_form(func: Any, given: dict[str, Any], made: Any) -> None:
    """Raises WrongCall if the vendor's Meta kernel gives other shapes or dtypes than we did."""
    forms = contracts.mapped(given, lambda x: Form(tuple(x.shape), x.stride(), x.dtype))
    ours = [(tuple(x.shape), x.dtype) for x in leaves(made) if x is not None]
    theirs = _meta(func, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in forms.items()))
    if ours != theirs:
        raise WrongCall(f"{func._schema.name}: our result is {ours}; the vendor's Meta kernel says {theirs}")


@lru_cache(4096)
def _meta(func: Any, forms: tuple[tuple[str, Any], ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What the Meta kernel makes of arguments of these forms."""

    def of(x: Any) -> Any:
        if isinstance(x, Form):
            return torch.empty_strided(x.shape, x.strides, dtype=x.dtype, device="meta")
        return [of(each) for each in x] if isinstance(x, tuple) else x

    out = func._overloadpacket.default(**{name: of(value) for name, value in forms})
    return [(tuple(x.shape), x.dtype) for x in leaves(out) if x is not None]
