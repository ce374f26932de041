"""Products with FP8 and int4 weights on the shapes of DeepSeek-V3 and Llama-3.1-8B: right, and how fast.

    python bench/h100_quant.py

Each is checked against float64, then timed in a CUDA graph over weights that take turns, so that none is left in the
L2 cache. TB/s counts the bytes of codes and scales.
"""

from __future__ import annotations

import torch

from polyradix.backend.protocol import MoeSpec, MoeWeights, Quant
from polyradix_torch.triton import codes, moe, quant
from polyradix_torch.triton.tune import microseconds
from polyradix_torch.triton.tune_codes import weight

SHAPES = ((1536, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432), (6144, 4096), (4096, 14336))
BLOCKS = Quant("fp8", (128, 128)), Quant("int4", (1, 128))
COUNTS = (1, 16, 64, 256, 2048)
TURNS = 256 << 20  # bytes of weights that take turns


def linears() -> None:
    for n, k in SHAPES:
        dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(max(2, TURNS // (2 * n * k)))]
        plain = {m: torch.randn(m, k, device="cuda").bfloat16() for m in COUNTS}
        torch_us = {m: microseconds(lambda w, x=x: torch.mm(x, w.t()), dense, len(dense)) for m, x in plain.items()}
        for q in BLOCKS:
            each = [weight(q, n, k) for _ in range(max(2, TURNS // q.bytes((n, k))))]
            for m, x in plain.items():
                want = x.double() @ each[0].weight().double().t()
                error = float((codes.product(x, each[0]).double() - want).abs().max() / want.abs().max())
                us = microseconds(lambda w, x=x: codes.product(x, w), each, len(each))
                rate = f"{q.bytes((n, k)) / us / 1e6:.2f} TB/s, {2 * m * n * k / us / 1e6:.0f} TFLOP/s"
                print(f"{q.format:5}{m:5} x {n:6} x {k:6} {us:8.1f} us ({rate}), torch bf16 {torch_us[m]:8.1f} us, "
                      f"error {error:.1e} of the largest")  # fmt: skip


def experts() -> None:
    """DeepSeek-V2-Lite's."""
    router = moe.Router.of(torch.randn(64, 2048, device="cuda") / 45, None)
    spec = MoeSpec(64, 6)
    dense = [torch.randn(*s, device="cuda").bfloat16() / 45 for s in ((64, 2816, 2048), (64, 2048, 1408))]
    for m in (1, 16, 64, 2048):
        x = torch.randn(m, 2048, device="cuda").bfloat16()
        base = microseconds(lambda w, x=x: moe.moe(x, w, spec), [MoeWeights(router, *dense)], 8)
        for q in BLOCKS:
            w = MoeWeights(router, weight(q, 64, 2816, 2048), weight(q, 64, 2048, 1408))
            us = microseconds(lambda w, x=x: quant.experts(x, w, spec), [w], 8)
            print(f"{q.format:5} 64 experts {m:5} tokens {us:8.1f} us, bf16 {base:8.1f} us")


if __name__ == "__main__":
    linears()
    experts()
