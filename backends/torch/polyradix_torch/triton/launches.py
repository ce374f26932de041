"""Every kernel as serving launches it, on tensors without memory: Llama-like shapes in bfloat16, DeepSeek-V2-Lite's
experts, and what float32 conformance adds, the widest heads. For aot.py, by groups: a chip need not have them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton

from polyradix.backend.protocol import AttnSpec, Heads, LatentSpec, LatentWeights, MoeSpec, MoeWeights, Quant
from polyradix_torch.quant import Codes
from polyradix_torch.triton import attention, codes, latent, moe, quant, rows, skinny, sparse
from polyradix_torch.triton.skinny import Tile

BF16, F32, EIGHT = torch.bfloat16, torch.float32, torch.float8_e4m3fn
Launch = tuple[str, Callable[[], Any]]


def every() -> Iterator[Launch]:
    yield from tested()
    yield from of_float8()


def tested() -> Iterator[Launch]:
    """All but the heads of a float8 cache that take long to compile."""
    yield from of_rows()
    yield from of_products()
    yield from of_descriptors()
    yield from of_attention()
    yield from of_experts()
    yield from of_latent()
    yield from of_quantised()
    yield from of_indexer()


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def of_rows() -> Iterator[Launch]:
    x, cache = empty(64, 4096), (empty(256, 16, 8, 128), empty(256, 16, 8, 128))
    q, k, v = empty(64, 48, 128).split([32, 8, 8], dim=1)
    weight, table = empty(4096, dtype=F32), empty(8192, 128, dtype=F32)
    yield "width 4096", lambda: rows.rms_norm(x, weight, 1e-5)
    yield "width 4096", lambda: rows.add_rms_norm(x, x, weight, 1e-5)
    yield "width 16384", lambda: rows.rms_norm(empty(64, 16384), empty(16384, dtype=F32), 1e-5)
    yield "D128", lambda: rows.rope(q, k, table, integers(64))
    eights = tuple(empty(*x.shape, dtype=EIGHT) for x in cache)
    yield "8xD128", lambda: rows.write(k, v, cache, integers(64))
    for held in (False, True):
        yield f"8xD128 float8{' held' * held}", partial(rows.write, k, v, eights, integers(64), held)
    yield "width 14336", lambda: rows.gated(empty(64, 28672), "silu")
    yield "vocabulary 128256", lambda: rows.argmax(empty(64, 128256, dtype=F32))
    yield "", lambda: rows.take_previous(integers(64), integers(64), integers(64))


def of_products() -> Iterator[Launch]:
    lanes, units = Tile(4, 1024, 4, 1, splits=2, ahead=256), Tile(64, 128, 4, 4, splits=4, dot=True)
    pipelined = Tile(4, 512, 4, 4)
    for kind in ("linear", "gated", "logits"):
        for count, tile in ((1, lanes), (1, pipelined), (2, pipelined), (4, Tile(4, 512, 4, 1)), (16, units)):
            yield product(kind, count, tile)
    for kind, count in (("linear", 64), ("gated", 128)):
        yield product(kind, count, Tile(64, 64, 4, 3, splits=2, dot=True))


def of_descriptors() -> Iterator[Launch]:
    """Products that read through tensor descriptors."""
    tile = Tile(128, 64, 8, 3, dot=True, tokens=64)
    yield product("linear", 256, tile)
    yield product("gated", 8192, tile)
    yield product("linear", 64, Tile(128, 64, 8, 3, splits=2, dot=True, tokens=64))
    for gated, n, k, columns in ((True, 2816, 2048, 64), (False, 2048, 1408, 128)):
        routes = moe.Routes(empty(8192, 6, dtype=F32), integers(64, 8192), integers(64))
        x, weight = empty(8192 if gated else 8192 * 6, k), empty(64, n, k)
        blocks = moe.Blocks(64 if gated else 128, columns, 64, 8, 2, wide=True)
        yield f"64 experts wide {n}x{k}", partial(moe.product, x, weight, routes, gated, blocks)


def product(kind: Any, count: int, tile: Tile) -> Launch:
    given = empty(count, 4096), empty(8192, 4096), None, tile, kind
    return f"{kind} M{count} {tile.rows}x{tile.columns}", partial(skinny.product, *given)


def of_attention() -> Iterator[Launch]:
    for dtype, dim, group, softcap in (
        (BF16, 64, 8, None),
        (BF16, 128, 4, None),
        (BF16, 256, 4, 50.0),  # as the models with such heads have it
        (F32, 256, 2, None),
    ):
        for splits in (0, 8):
            yield attend(dtype, dim, group, splits, softcap)
        yield attend(dtype, dim, group, 1, softcap, shared=True)
    for splits in (0, 2):
        yield attend(F32, 8, 2, splits)  # fewer columns than a product takes
    yield attend(BF16, 128, 4, 1)
    yield attend(BF16, 128, 8, 8)
    for splits in (0, 1, 8):
        yield attend(BF16, 64, 8, splits, sinks=True)
    for splits in (0, 8):
        yield attend(BF16, 128, 4, splits, eight=True)


def of_float8() -> Iterator[Launch]:
    yield attend(BF16, 128, 4, 1, shared=True, eight=True)
    for dtype, dim, group in ((BF16, 64, 8), (BF16, 256, 4), (F32, 256, 2)):
        for splits in (0, 8):
            yield attend(dtype, dim, group, splits, eight=True)
        yield attend(dtype, dim, group, 1, shared=True, eight=True)


def attend(
    dtype: torch.dtype,
    dim: int,
    group: int,
    splits: int,
    softcap: float | None = None,
    shared: bool = False,
    sinks: bool = False,
    eight: bool = False,
) -> Launch:
    """A decode of 64 sequences when `splits` is given, else a prefill; some of its keys are shared if so said, and in a
    cache of float8."""
    heads = Heads(8 * group, 8, dim)
    q, k, v = empty(512, heads.q + 2 * heads.kv, dim, dtype=dtype).split([heads.q, heads.kv, heads.kv], dim=1)
    cache = empty(256, 16, heads.kv, dim, dtype=EIGHT if eight else dtype)
    single, tiles = (integers(64), integers(0, 2)) if splits else (integers(0), integers(16, 2))
    plan = attention.Shared(integers(64), integers(64), integers(64), integers(32, 5)) if shared else None
    at = attention.Paged(integers(65), integers(64), integers(64), integers(4096), single, splits, tiles, plan)
    what = "shared" if shared else f"splits {splits}" if splits else "prefill"
    what += " sinks" * sinks + " float8" * eight
    spec = AttnSpec(heads, dim**-0.5, None, softcap, empty(heads.q, dtype=F32) if sinks else None)
    return f"D{dim} G{group} {_name(dtype)} {what}", lambda: attention.attend(q, k, v, (cache, cache), at, spec)


def of_experts() -> Iterator[Launch]:
    for dtype, tokens in ((BF16, 4), (BF16, 200), (BF16, 512), (BF16, 8192), (F32, 64)):
        yield f"64 experts M{tokens} {_name(dtype)}", experts(dtype, tokens)
    for tokens in (4, 200):
        yield f"32 experts M{tokens} clamped", clamped(tokens)


def experts(dtype: torch.dtype, tokens: int) -> Callable[[], Any]:
    """DeepSeek-V2-Lite's widths, the groups and the bias of DeepSeek-V3."""
    router = moe.Router(empty(3, 64, 2048), empty(64, dtype=F32))
    weights = MoeWeights(router, empty(64, 2 * 1408, 2048, dtype=dtype), empty(64, 2048, 1408, dtype=dtype))
    spec = MoeSpec(64, 6, "sigmoid", True, 2.5, groups=8, top_groups=4, group_best=2)
    return lambda: moe.moe(empty(tokens, 2048, dtype=dtype), weights, spec)


def clamped(tokens: int) -> Callable[[], Any]:
    """gpt-oss-20b's."""
    width = 2880
    router = moe.Router(empty(1, 32, width), empty(32, dtype=F32))
    gate_up, down = (moe.Biased(empty(32, n, width), empty(32, n)) for n in (2 * width, width))
    spec = MoeSpec(32, 4, bias="logits", limit=7.0, alpha=1.702)
    return lambda: moe.moe(empty(tokens, width), MoeWeights(router, gate_up, down), spec)


def of_latent() -> Iterator[Launch]:
    """DeepSeek-V2-Lite's and V3's heads; in float32 the widest rank of conformance."""
    for dtype, heads, counts in ((BF16, 16, (1, 64)), (BF16, 128, (64,)), (F32, 2, (4,))):
        for count in counts:
            yield f"{heads} latent heads {_name(dtype)} M{count}", absorbed(dtype, heads, count)
        yield f"{heads} latent heads {_name(dtype)} shared", absorbed(dtype, heads, 64, shared=True)


def absorbed(dtype: torch.dtype, heads: int, count: int, shared: bool = False) -> Callable[[], Any]:
    """`count` decodes, some of whose rows are shared if so said, a prefill of 4 rows and one that is expanded."""
    a, size = LatentSpec(heads, 512, 128, 64, 128, 192**-0.5, 1e-6), count + 4 + 512
    q, c, cache = (empty(*n, dtype=dtype) for n in ((size, heads * 192), (size, 576), (256, 16, 1, 576)))
    w = LatentWeights(empty(512, dtype=F32), empty(heads, 256, 512, dtype=dtype), empty(8192, 64, dtype=F32))
    at = attention.Paged(
        integers(count + 3),
        integers(count + 2),
        integers(count + 2),
        integers(4096),
        integers(count),
        8,
        integers(4, 2),
        attention.Shared(integers(64), integers(64), integers(64), integers(32, 5)) if shared else None,
    )
    x = latent.Rows(integers(count + 4), integers(1, 3), integers(1, 4), integers(count + 2, 3), 512, 512)
    return lambda: latent.attend(q, c, cache, integers(size), integers(size), at, x, w, a)


def of_quantised() -> Iterator[Launch]:
    """DeepSeek's blocks, scales of rows, and groups of int4."""
    block, channel, group, small = (
        Quant("fp8", (128, 128)),
        Quant("fp8", (1, 4096)),
        Quant("int4", (1, 128)),
        Quant("int4", (1, 32)),
    )
    counts = [(q, tokens) for q in (block, group) for tokens in (16, 64, 128, 8192)] + [(channel, 32), (small, 4)]
    for q, tokens in counts:
        name = f"{q.format} {q.block[0]}x{q.block[1]} M{tokens}"
        yield name, partial(codes.product, empty(tokens, 4096), quantised(q, 8192, 4096))
    yield "fp8 float32", partial(codes.product, empty(64, 4096, dtype=F32), quantised(block, 8192, 4096))
    for q in (block, group):
        for tokens in (4, 2048):
            routes = moe.Routes(empty(tokens, 6, dtype=F32), integers(64, tokens), integers(64))
            given = empty(tokens, 2048), quantised(q, 64, 2 * 1408, 2048), routes, empty(64, 2 * 1408)
            yield f"64 experts {q.format} M{tokens}", partial(quant.product, *given)
    yield "clamped", lambda: rows.gated(empty(64, 2816), "silu", (1.0, 7.0))


def quantised(q: Quant, *shape: int) -> Codes:
    (*outer, out, width), (rows, columns), four = shape, q.block, q.format == "int4"
    blocks = *outer, triton.cdiv(out, rows), triton.cdiv(width, columns)
    codes = empty(*outer, out, width // 2 if four else width, dtype=torch.uint8 if four else torch.float8_e4m3fn)
    return Codes(q, codes, empty(*blocks, dtype=F32), empty(*blocks, dtype=torch.uint8) if four else None)


def of_indexer() -> Iterator[Launch]:
    """DeepSeek-V3.2's, and in float32 for conformance."""
    for dtype in (BF16, F32):
        index, weights = empty(64, 64, 128, dtype=dtype), empty(64, 64, dtype=dtype)
        keys, n, ranks = empty(256, 16, 1, 128, dtype=dtype), integers(64), empty(64, 8192, dtype=torch.int64)
        yield f"64 index heads {_name(dtype)}", partial(sparse.rank, index, weights, keys, n, n, n, n, ranks)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
