"""The paged cache in the kernels' layout, and its canonical form for export and import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import HostArray, KVSpec
from polyradix_cpu.native.params import DTYPES, Tensor, from_host, huge_empty, to_host


@dataclass(frozen=True)
class LayerKV:
    """One layer: data [pages, heads, 2, page_size * dim]; csrc/px.h says how a page of k and of v is laid out. Latent
    rows (`parts` is 1) are k and v alike. Its group's table says in which pages of data its rows are."""

    data: Tensor
    page_size: int
    dim: int
    parts: int
    group: int = 0


def check(spec: KVSpec) -> None:
    """Raises Unsupported for a page size or head size the kernels do not do."""
    if spec.page_size % 16 or spec.page_size < 16:
        raise Unsupported("page_size", f"{spec.page_size}; expected a multiple of 16")
    most = 1024 if spec.kind == "latent" else 256
    if spec.head_dim % 16 or not 16 <= spec.head_dim <= most:
        raise Unsupported("head_dim", f"{spec.head_dim}; expected a multiple of 16 up to {most}")


def kv_page_bytes(spec: KVSpec) -> int:
    """Bytes of one page over all arrays, k and v. Raises as `check`."""
    check(spec)
    return 2 * spec.depth * spec.kv_heads * spec.page_size * spec.head_dim * int(DTYPES[spec.dtype].itemsize)


def alloc_kv(spec: KVSpec, pages: int) -> list[LayerKV]:
    """A zeroed cache of `pages` pages, one entry per layer."""
    check(spec)
    shape = (spec.depth, pages, spec.kv_heads, 2, spec.page_size * spec.head_dim)
    arrays = list(huge_empty(shape, DTYPES[spec.dtype]))
    return [LayerKV(arrays[at], spec.page_size, spec.head_dim, spec.parts, group) for group, at in spec.places]


def copy_pages(kv: list[LayerKV], src: Sequence[int], dst: Sequence[int]) -> list[LayerKV]:
    """Page src[i] to page dst[i] in every array; all sources are read before any is written."""
    for data in _arrays(kv):
        data[list(dst)] = data[list(src)]
    return kv


def _arrays(kv: list[LayerKV]) -> list[Tensor]:
    """By place."""
    return list({id(layer.data): layer.data for layer in kv}.values())


def _pairs(data: Tensor) -> int:
    return 2 if data.dtype == torch.bfloat16 else 1


def export_pages(kv: list[LayerKV], pages: Sequence[int]) -> HostArray:
    """[parts, array, page, slot, head, dim] in the cache's dtype."""
    page, dim, pair = kv[0].page_size, kv[0].dim, _pairs(kv[0].data)
    data = torch.stack([x[list(pages)] for x in _arrays(kv)])  # [array, page, head, 2, page_size * dim]
    k = data[..., 0, :].unflatten(-1, (dim // pair, page, pair)).permute(0, 1, 4, 2, 3, 5).flatten(-2)
    v = data[..., 1, :].unflatten(-1, (page // pair, dim, pair)).permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    return to_host(torch.stack([k, v][: kv[0].parts]).contiguous())


def import_pages(kv: list[LayerKV], pages: Sequence[int], data: HostArray) -> list[LayerKV]:
    """The inverse of export_pages: writes `pages` of every array."""
    page, dim, pair = kv[0].page_size, kv[0].dim, _pairs(kv[0].data)
    parts = from_host(data).to(kv[0].data.dtype)
    k, v = parts[0], parts[-1]
    k = k.unflatten(-1, (dim // pair, pair)).permute(0, 1, 3, 4, 2, 5).flatten(3)
    v = v.unflatten(2, (page // pair, pair)).permute(0, 1, 4, 2, 5, 3).flatten(3)
    both = torch.stack([k, v], 3)
    for x, values in zip(_arrays(kv), both, strict=True):
        x[list(pages)] = values
    return kv
