"""Every adapter on inputs of its own, small and of the shapes that serving has, to compare two providers by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from polyradix_rocm.aiter.calls import Aiter
from polyradix_rocm.fp8 import to_fnuz

# Of the largest value: copies; weights of the same experts; sums rounded to bf16; FP8.
EXACT, CHOSEN, CLOSE, COARSE = 0.0, 1e-3, 0.02, 0.07


@dataclass(frozen=True)
class Case:
    """`run` gives what is to be compared, within `bound` times the largest value; `calls` are those it makes."""

    name: str
    calls: tuple[str, ...]
    run: Callable[[Aiter], torch.Tensor]
    bound: float = CLOSE

    def error(self, mine: Aiter, reference: Aiter) -> float:
        """The largest difference, as a share of the largest value; infinite for shapes that differ and for NaN."""
        got, want = (self.run(aiter).float() for aiter in (mine, reference))
        if got.shape != want.shape or not bool(got.isfinite().all()):
            return float("inf")
        return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


@dataclass(frozen=True)
class Shapes:
    """tokens of prefill, sequences of decode, tokens of the longest; query and kv heads; experts, of them chosen, their
    width; the model's width; heads of MLA."""

    tokens: int
    seqs: int
    longest: int
    heads: tuple[int, int]
    experts: tuple[int, int, int]
    width: int
    latent: tuple[int, ...]


SMALL = Shapes(5, 3, 40, (4, 2), (16, 4, 128), 256, (1, 16))
SERVING = Shapes(2048, 64, 4096, (32, 8), (64, 6, 1408), 2048, (16, 32, 64, 128))


class Inputs:
    def __init__(self, device: str) -> None:
        self.device, self._random = device, torch.Generator().manual_seed(0)

    def values(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self._random) * scale).bfloat16().to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._random).to(self.device)

    def whole(self, low: int, high: int, count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=self._random).to(dtype).to(self.device)

    def keys(self, seqs: int, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """indptr, slots in any order, ones: of sequences of 1 to `longest` tokens."""
        indptr = torch.nn.functional.pad(self.whole(1, longest + 1, seqs).cumsum(0), (1, 0)).int()
        order = torch.randperm(int(indptr[-1]), generator=self._random)
        return indptr, order.int().to(self.device), torch.ones(seqs, dtype=torch.int32, device=self.device)


def cases(s: Shapes, device: str, fp8: torch.dtype) -> Iterator[Case]:
    """`fp8` is the chip's type. Inputs are made when a case is asked for."""
    x = Inputs(device)
    yield from _rows(s, x)
    yield from _attention(s, x)
    yield from _experts(s, x)
    y = x.values(s.tokens, s.width)
    yield Case("quantised", ("per_group_quant_hip",), lambda a: _wide(*a.quantised(y, fp8)), COARSE)
    codes, scale = x.values(256, s.width, scale=0.1).to(torch.float8_e4m3fn), x.uniform(2, s.width // 128) + 0.5
    w, each = (codes, scale) if fp8 == torch.float8_e4m3fn else to_fnuz(codes, scale)  # a checkpoint has e4m3fn
    both = ("per_group_quant_hip", "gemm_a8w8_blockscale")

    def product(a: Aiter) -> torch.Tensor:
        rows, by_row = a.quantised(y, fp8)
        return a.block_product(rows, w, by_row, each)

    yield Case("block_product", both, product, COARSE)


def _rows(s: Shapes, x: Inputs) -> Iterator[Case]:
    a, b, w = x.values(s.tokens, s.width), x.values(s.tokens, s.width), x.values(s.width)
    yield Case("rms_norm", ("rmsnorm2d_fwd",), lambda aiter: aiter.rms_norm(a, w, 1e-5))
    add = ("rmsnorm2d_fwd_with_add",)
    yield Case("add_rms_norm", add, lambda aiter: torch.stack(aiter.add_rms_norm(a, b, w, 1e-5)))
    q, k = (x.values(s.tokens, heads, 128) for heads in s.heads)
    angle, at = x.uniform(s.longest, 64) * 6, x.whole(0, s.longest, s.tokens, torch.int64)

    def turned(aiter: Aiter) -> torch.Tensor:
        return torch.cat(aiter.rope(q, k, angle.cos(), angle.sin(), at), dim=1)

    yield Case("rope", ("rope_cached_positions_2c_fwd",), turned)


def _attention(s: Shapes, x: Inputs) -> Iterator[Case]:
    indptr, slots, ones = keys = x.keys(s.seqs, s.longest)
    for dim in (64, 128):
        q = x.values(s.seqs, s.heads[0], dim)
        kv = (x.values(len(slots), 1, s.heads[1], dim), x.values(len(slots), 1, s.heads[1], dim))
        for cap in (0.0, 30.0):
            run = partial(Aiter.decode, q=q, kv=kv, indptr=indptr, slots=slots, ones=ones, longest=s.longest,
                          scale=dim**-0.5, softcap=cap)  # fmt: skip
            yield Case(f"decode, head size {dim}, softcap {cap:g}", ("paged_attention_ragged",), run)
    cu_q = torch.nn.functional.pad((indptr.diff() + 1).div(2, rounding_mode="floor").cumsum(0), (1, 0)).int()
    rows, longest = int(cu_q[-1]), (s.longest, s.longest)
    asked = x.values(rows, s.heads[0], 128)
    for window in (None, 7):
        run = partial(Aiter.prefill, q=asked, kv=kv, cu_q=cu_q, indptr=indptr, slots=slots, ones=ones, longest=longest,
                      scale=128**-0.5, softcap=0.0, window=window)  # fmt: skip
        yield Case(f"prefill, window {window}", ("mha_batch_prefill_func",), run)
    wide = (x.values(rows, 2, 192), x.values(len(slots), 2, 192), x.values(len(slots), 2, 128))
    run = partial(Aiter.varlen, q=wide[0], k=wide[1], v=wide[2], cu_q=cu_q, cu_k=indptr, longest=longest, scale=0.07)
    yield Case("varlen, 192 and 128", ("flash_attn_varlen_func",), run)
    cache, at = x.values(len(slots), 1, 576), slots[: s.seqs].long()
    c, k = x.values(s.seqs, 512), x.values(s.seqs, 64)

    def written(aiter: Aiter) -> torch.Tensor:
        copy = cache.clone()
        aiter.write_latent(c, k, copy, at)
        return copy

    yield Case("write_latent", ("concat_and_cache_mla",), written, EXACT)
    for heads in s.latent:
        yield _latent(heads, x.values(s.seqs, heads, 576, scale=0.2), cache, keys)


def _latent(heads: int, q: torch.Tensor, cache: torch.Tensor, keys: tuple[torch.Tensor, ...]) -> Case:
    indptr, slots, ones = keys
    cu_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)

    def run(aiter: Aiter) -> torch.Tensor:
        padded = aiter.mla_heads(heads)
        assert padded is not None, f"no kernel serves {heads} heads"
        asked = q.new_zeros(len(q), padded, 576)
        asked[:, :heads] = q
        work = aiter.mla_work(cu_q, indptr, ones, padded)
        flat = cache.view(-1, 1, 1, 576)
        return aiter.mla_decode(asked, flat, cu_q, indptr, slots, ones, 192**-0.5, work)[:, :heads]

    return Case(
        f"mla_decode, {heads} heads", ("get_mla_metadata_info_v1", "get_mla_metadata_v1", "mla_decode_fwd"), run
    )


def _experts(s: Shapes, x: Inputs) -> Iterator[Case]:
    experts, chosen, wide = s.experts
    logits = x.values(s.tokens, experts).float() + torch.arange(experts, device=x.device) * 1e-3
    bias = x.uniform(experts) / 4

    def dense(chosen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, weights = chosen
        return torch.zeros_like(logits).scatter_(1, ids.long(), weights)

    def grouped(aiter: Aiter) -> torch.Tensor:
        return dense(aiter.topk_grouped(logits, chosen, (4, 2), False, True, 2.5))

    def biased(aiter: Aiter) -> torch.Tensor:
        return dense(aiter.topk_biased(logits, bias, chosen, (8, 4), 2.5))

    yield Case("topk_softmax", ("topk_softmax",), lambda a: dense(a.topk_softmax(logits, chosen, True)), CHOSEN)
    yield Case("topk_grouped", ("grouped_topk",), grouped, CHOSEN)
    yield Case("topk_biased", ("biased_grouped_topk",), biased, CHOSEN)
    w1, w2 = x.values(experts, 2 * wide, s.width, scale=0.05), x.values(experts, s.width, wide, scale=0.05)
    rows = x.values(s.tokens, s.width)
    ids = logits.argsort(1, descending=True)[:, :chosen].int()
    weights = torch.full(ids.shape, 1 / chosen, device=x.device)

    def moe(aiter: Aiter) -> torch.Tensor:
        return aiter.fused_moe(rows, aiter.shuffled(w1), aiter.shuffled(w2), ids, weights)

    yield Case("fused_moe", ("shuffle_weight", "fused_moe"), moe)


def _wide(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float() * scale.repeat_interleave(128, 1)
