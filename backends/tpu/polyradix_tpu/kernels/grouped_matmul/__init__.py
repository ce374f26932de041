"""Grouped matmul, for mixtures of experts: every row times the weight of its own group.

    lhs [M,K], rhs [E,N,K], group_sizes i32[E] -> [M,N] in the dtype of lhs, summed in float32

The rows are sorted by group: the first group_sizes[0] belong to group 0, and so on. Weights are [out, in], as those of
`linear` are. Groups may be empty. Rows that no group has come out as zeros, and may hold anything. The sum of the sizes
must not exceed M. bfloat16 or float32, both operands alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from polyradix_tpu.kernels.chip import tuned
from polyradix_tpu.kernels.grouped_matmul import kernel
from polyradix_tpu.kernels.grouped_matmul.validate import Blocks, fit, problems
from polyradix_tpu.kernels.xla import precision

BLOCKS = Path(__file__).with_name("blocks.json")
CONTRACT = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The Pallas kernel. `blocks`: None takes those of blocks.json for the chip in context. `interpret`: as
    pallas_call's. Raises ValueError for what the kernel does not take, at trace time."""
    blocks = blocks or choose(lhs, rhs)
    found = problems(lhs, rhs, group_sizes, blocks)
    if found:
        raise ValueError("; ".join(found))
    return kernel.call(lhs, rhs, group_sizes, blocks, interpret)


def choose(lhs: Any, rhs: Any) -> Blocks:
    """Those for few rows a group, or for many: the mean, were no group empty."""
    table = tuned(BLOCKS)
    few = lhs.shape[0] <= table["few_rows"] * rhs.shape[0]
    return fit(lhs.shape[1], Blocks(**table["few" if few else "many"]), lhs.dtype.itemsize)


def xla(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same in plain XLA, for any device."""
    out = jax.lax.ragged_dot_general(
        lhs, rhs, group_sizes, CONTRACT, precision=precision(lhs.dtype), preferred_element_type=jnp.float32
    )
    owned = jnp.arange(len(lhs)) < jnp.sum(group_sizes)
    return jnp.where(owned[:, None], out, 0).astype(lhs.dtype)


def samples() -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """(label, function, arguments without values, numbers of the donated ones) at serving shapes, for one chip:
    Qwen3-30B-A3B with its experts over 4 chips, and DeepSeek-V3 over 32, both with 8 experts a token."""
    layers = {"Qwen3-30B-A3B": (32, 2048, 768, 8), "DeepSeek-V3": (8, 7168, 2048, 8)}
    for model, (experts, hidden, ffn, topk) in layers.items():
        for step, tokens in (("decode", 64), ("prefill", 2048)):
            for part, n, k in (("gate_up", 2 * ffn, hidden), ("down", hidden, ffn)):
                args = (
                    jax.ShapeDtypeStruct((tokens * topk, k), jnp.bfloat16),
                    jax.ShapeDtypeStruct((experts, n, k), jnp.bfloat16),
                    jax.ShapeDtypeStruct((experts,), jnp.int32),
                )
                yield f"{model} {part} {step}", partial(grouped_matmul), args, ()
