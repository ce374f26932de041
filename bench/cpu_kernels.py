"""Step times of the native CPU kernels (SmolLM2-135M shape, random weights), and shares of this machine's ceilings.

    python bench/cpu_kernels.py [--threads N] [--dtype bfloat16]

The ceilings are measured first, in the same process: bytes read per second from memory, and multiply-adds per second of
float32 vectors held in registers. A wider product (bf16, AMX) may therefore go above 100 %.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Heads, Limits, Params, ParamSpec
from polyradix.graph.dense import make_step, param_specs
from polyradix.graph.spec import ModelSpec
from polyradix_cpu.native import NativeMeta, NativeOps, alloc_kv, find_isa, load, pack

CEILINGS = r"""
#include <immintrin.h>
#include <omp.h>
extern "C" float reads(const float* x, long n, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (long b = 0; b < n / 65536; b++) {
        __m256 s[4] = {};
        const float* p = x + b * 65536;
        for (long i = 0; i < 65536; i += 32) {
            _mm_prefetch((const char*)(p + i + 512), _MM_HINT_T0);
            _mm_prefetch((const char*)(p + i + 528), _MM_HINT_T0);
            for (int j = 0; j < 4; j++) s[j] = _mm256_add_ps(s[j], _mm256_loadu_ps(p + i + 8 * j));
        }
        for (int j = 0; j < 4; j++) total += s[j][0];
    }
    return total;
}
#ifdef __AVX512F__
typedef __m512 V;
static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
#else
typedef __m256 V;
static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
#endif
extern "C" float products(long n, int threads) {  // 12 chains of n multiply-adds of sizeof(V) / 4 lanes, per thread
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        V s[12] = {}, a = {}, b = {};
        a[0] = n, b[0] = 1e-9f;
        for (int j = 0; j < 12; j++) asm volatile("" : "+x"(s[j]));  // or 12 equal chains become one
        for (long i = 0; i < n; i++) {
            for (int j = 0; j < 12; j++) s[j] = fma(a, b, s[j]);
            asm volatile("" : "+x"(a), "+x"(b));
        }
        for (int j = 0; j < 12; j++) total += s[j][0];
    }
    return total;
}
extern "C" int lanes() { return sizeof(V) / 4; }
"""


def best(f: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(threads: int) -> tuple[float, float]:
    """Bytes read and float32 multiply-adds, each per second."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "c.cpp", Path(folder) / "c.so"
        source.write_text(CEILINGS)
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        lib = ctypes.CDLL(str(library))
    lib.reads.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    lib.products.argtypes = [ctypes.c_long, ctypes.c_int]
    x = torch.ones(1 << 26)
    read = 4 * x.numel() / best(lambda: lib.reads(x.data_ptr(), x.numel(), threads), 7)
    n = 5_000_000
    return read, 12 * lib.lanes() * n * threads / best(lambda: lib.products(n, threads), 5)


def batch(spec: ModelSpec, seqs: int, new: int, context: int, page: int, shared: int) -> HostBatch:
    """`seqs` sequences of `context` tokens: the first `shared` in common, the newest `new` in this batch."""
    per = -(-context // page)
    pages = np.random.default_rng(0).permutation(np.arange(1, seqs * per + 1)).reshape(seqs, per).astype(np.int32)
    pages[:, : shared // page] = pages[0, : shared // page]
    positions = np.tile(np.arange(context - new, context, dtype=np.int32), seqs)
    owner = np.repeat(np.arange(seqs), new)
    cu = np.arange(0, seqs * new + 1, new, dtype=np.int32)
    tokens = (np.arange(seqs * new, dtype=np.int32) * 37) % spec.vocab
    slots = pages[owner, positions // page] * page + positions % page
    lengths = np.full(seqs, context, np.int32)
    return HostBatch(tokens, positions, slots.astype(np.int32), cu, lengths, pages, cu[1:] - 1, tokens * 0 - 1)


def random_params(spec: ModelSpec, dtype: Any) -> Params:
    rng = np.random.default_rng(0)

    def make(p: ParamSpec) -> Any:
        x = rng.standard_normal(p.shape, np.float32) * (p.shape[-1] ** -0.5 if len(p.shape) > 1 else 1)
        host = x if p.dtype == "float32" else torch.from_numpy(x).bfloat16().view(torch.int16).numpy()
        return pack(p, lambda part="weight": host)

    table = param_specs(spec, dtype)
    return Params({p.name: make(p) for p in table.top}, [{p.name: make(p) for p in layer} for layer in table.layers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--page", type=int, default=16)
    args = parser.parse_args()
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 100000.0, "hidden_act": "silu",
    }  # fmt: skip
    spec = ModelSpec.from_hf_config(config)
    library = load()
    assert library is not None, f"no native library ({find_isa()})"
    ops = NativeOps(library, args.threads)
    params = random_params(spec, args.dtype)
    kv = alloc_kv(spec.kv_spec(args.page, args.dtype), 64 * 1024 // args.page + 1)
    run = ops.compile(make_step(spec), Limits(1024, 64, 2048))
    read, products = ceilings(args.threads)
    print(f"{library.isa}, {args.threads} threads: reads {read / 1e9:.1f} GB/s, {products / 1e9:.0f} G multiply-adds/s")
    layer = sum(w.data.numel() for w in params.layers[0].values()) * spec.layers
    head, size = params.top["logits"].data.numel(), params.top["logits"].data.element_size()
    heads: Heads = spec.heads
    for name, seqs, new, context, shared in (
        ("decode 1", 1, 1, 256, 0), ("decode 4", 4, 1, 256, 0), ("decode 16", 16, 1, 256, 0),
        ("decode 16", 16, 1, 1024, 0), ("decode 16", 16, 1, 1024, 960), ("decode 64", 64, 1, 256, 0),
        ("prefill 128", 1, 128, 128, 0), ("prefill 1024", 1, 1024, 1024, 0), ("16 x 32", 16, 32, 1024, 960),
    ):  # fmt: skip
        host = batch(spec, seqs, new, context, args.page, shared)
        seconds = best(lambda: run(params, kv, NativeMeta(host)), 12 if new == 1 else 4)  # noqa: B023
        keys = seqs * (new * context - new * (new - 1) // 2)
        work = seqs * new * layer + seqs * head + 2 * keys * heads.q * heads.dim * spec.layers
        cache = 2 * (seqs * (context - shared) + shared) * heads.kv * heads.dim * size * spec.layers
        bytes_read = (layer + head) * size + cache
        print(
            f"{name:>13} context {context:5} ({shared:4} shared): {seconds * 1e3:8.2f} ms, "
            f"{seqs * new / seconds:5.0f} tok/s, "
            f"{bytes_read / seconds / read:4.0%} of reads, {work / seconds / products:4.0%} of multiply-adds"
        )


if __name__ == "__main__":
    main()
