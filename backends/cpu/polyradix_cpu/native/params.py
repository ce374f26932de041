"""Packing parameters into the kernels' layouts, in huge pages."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from polyradix.backend.protocol import HostArray, ParamSpec, Reader

Tensor: TypeAlias = Any
HUGE = 2 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NativeWeight:
    """One packed parameter. `data` is, by kind:

    embed [V,H] in the dtype; norm [n] float32; rope [positions,D] float32; the linears bf16 [N/32][K/2][32][2] or f32
    [N/32][K][32], zero-padded to K = `depth`; experts one of these after the other; router [E,H] and sinks [Hq]
    float32. `bias` is float32 in the order of packed columns, of experts one after the other, too. `gated` says that
    the two halves of the rows are interleaved by 16, so that a gated linear is one pass."""

    kind: str
    data: Tensor
    shape: tuple[int, ...]
    depth: int = 0
    bias: Tensor = None
    gated: bool = False


@dataclass
class LatentUp:
    """Of kind latent_up: `w` [H,nope+v,R] until `nope` is known, and then the two parts that `split` gives."""

    w: Tensor
    parts: tuple[NativeWeight, ...] = ()

    def split(self, nope: int) -> tuple[NativeWeight, ...]:
        """Of all heads K as weights [R,nope] and V as weights [v,R], packed as experts are."""
        if not self.parts:
            self.parts = pack_experts(self.w[:, :nope].transpose(1, 2)), pack_experts(self.w[:, nope:])
            self.w = None
        return self.parts


def huge_empty(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """A zeroed tensor aligned to 2 MiB and advised into huge pages when it is at least that large."""
    size = prod(shape) * dtype.itemsize
    if size < HUGE:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(dtype).view(shape)


def from_host(x: HostArray) -> Tensor:
    """A tensor of the host values; bfloat16 comes as ml_dtypes' two-byte type."""
    x = np.ascontiguousarray(x)
    if x.dtype.itemsize == 2:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.astype(np.float32))


def to_host(x: Tensor) -> HostArray:
    """The values of a tensor as NumPy has them; bfloat16 becomes ml_dtypes' type."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(x.numpy())


def _columns(w: Tensor, gated: bool) -> Tensor:
    """Rows of w [N, ...] in packed order, zero-padded to a multiple of 32."""
    parts = w.chunk(2) if gated else (w,)
    unit = 16 if gated else 32
    padded = [torch.cat([p, p.new_zeros(-len(p) % unit, *p.shape[1:])]) for p in parts]
    if not gated:
        return padded[0]
    return torch.stack([p.unflatten(0, (-1, 16)) for p in padded], 1).flatten(0, 2)


def pack_linear(w: Tensor, bias: Tensor | None = None, gated: bool = False, kind: str = "linear") -> NativeWeight:
    """w [N,K] bf16 or f32, and bias [N] or None, as a weight for `linear`; `gated` interleaves the halves."""
    n, k = w.shape
    rows = _columns(w, gated)
    depth = k + (-k % 32 if w.dtype == torch.bfloat16 else 0)
    rows = torch.cat([rows, rows.new_zeros(len(rows), depth - k)], 1)
    pair = 2 if w.dtype == torch.bfloat16 else 1
    tiles = rows.view(-1, 32, depth // pair, pair).permute(0, 2, 1, 3)
    data = huge_empty(tuple(tiles.shape), w.dtype)
    data.copy_(tiles)
    packed = None if bias is None else _columns(bias.float(), gated).contiguous()
    return NativeWeight(kind, data, (n, k), depth, packed, gated)


def pack_experts(w: Tensor, bias: Tensor | None = None) -> NativeWeight:
    """w [E,N,K] bf16 or f32, bias [E,N] or None."""
    first = pack_linear(w[0])
    data = huge_empty((len(w), *first.data.shape), w.dtype)
    for held, one in zip(data, w, strict=True):
        held.copy_(pack_linear(one).data)
    packed = None if bias is None else torch.stack([_columns(each.float(), False) for each in bias])
    return NativeWeight("experts", data, tuple(w.shape), first.depth, packed)


def pack(spec: ParamSpec, read: Reader) -> NativeWeight | LatentUp:
    """One parameter of the graph, in the layout its kind wants."""
    w = from_host(read())
    if spec.kind == "latent_up":
        return LatentUp(w)
    if spec.kind in ("linear", "linear_reduce", "logits"):
        gated = spec.kind == "linear" and len(spec.segments) == 2 and spec.segments[0] == spec.segments[1]
        return pack_linear(w, from_host(read("bias")) if spec.bias else None, gated, spec.kind)
    if spec.kind == "experts":
        return pack_experts(w, from_host(read("bias")) if spec.bias else None)
    if spec.kind in ("norm", "rope", "router"):
        w = w.float()
    data = huge_empty(tuple(w.shape), w.dtype)
    data.copy_(w)
    return NativeWeight(spec.kind, data, tuple(w.shape), bias=from_host(read("bias")) if spec.bias else None)
