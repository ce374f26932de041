"""Kernels of the GPU backend on the shapes of Llama-3.1-8B: right, how fast, and the file of tiles for this GPU.

    python bench/h100_kernels.py --out FOLDER [--rows 32,64,128,256,8192] [SHAPE ...]

Products: each way to cut one is checked against torch in float64 and timed beside torch with a cold L2 cache. FOLDER
gets the GPU's file, to be put beside polyradix_torch/triton/skinny.py in tuned/, and all times. Then what torch's
products of many rows reach when they go on for long enough for the GPU to reach its limit of power.
"""

from __future__ import annotations

import sys
import time

import torch

from polyradix_torch.triton.tune import main, parse

SHAPES = ("linear:6144x4096", "linear:4096x4096", "linear:28672x4096", "linear:4096x14336")
ROWS = (4096, 6144, 7680, 8192, 9216, 12288, 16384)


def sustained(rows: int, n: int, k: int, seconds: float = 0.4) -> float:
    """Seconds of one product of `rows` rows, the mean of the later half."""
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / 64
    out = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")
    half = max(8, int(seconds / 2 / (2 * rows * n * k / 6e14)))
    torch.cuda.synchronize()
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(half):
            torch.mm(x, w.t(), out=out)
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / half


def table() -> None:
    print("rows   TFLOP/s of a layer's products, together, when sustained")
    for rows in ROWS:
        shapes = [parse(shape)[1:] for shape in SHAPES]
        times = [sustained(rows, n, k) for n, k in shapes]
        work = [2 * rows * n * k / 1e12 for n, k in shapes]
        each = [f"{n}x{k} {one / took:.0f}" for (n, k), one, took in zip(shapes, work, times, strict=True)]
        print(f"{rows:6} {'  '.join(each)}  all {sum(work) / sum(times):.0f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    table()
