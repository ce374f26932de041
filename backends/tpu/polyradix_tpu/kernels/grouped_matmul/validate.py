"""What the kernel takes, checked from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from polyradix_tpu.kernels.chip import Chip

LANES, SUBLANES = 128, 8
SPARE = 4 << 20  # bytes of vector memory for what the compiler spills


@dataclass(frozen=True)
class Blocks:
    """Rows of lhs and columns of the product that one step works on."""

    rows: int
    columns: int


def vmem(inner: int, blocks: Blocks, itemsize: int) -> int:
    """Bytes that the blocks take: each operand and the product twice, and the product in float32."""
    wide = -(-inner // LANES) * LANES
    ends = blocks.rows + blocks.columns
    return 2 * itemsize * (ends * wide + blocks.rows * blocks.columns) + 4 * blocks.rows * blocks.columns


def fit(inner: int, blocks: Blocks, itemsize: int, chip: Chip) -> Blocks:
    """The blocks with their columns halved until they fit the chip's vector memory, or are one lane tile wide."""
    columns = blocks.columns
    while columns > LANES and vmem(inner, Blocks(blocks.rows, columns), itemsize) > chip.vmem - SPARE:
        columns = columns // 2 // LANES * LANES
    return Blocks(blocks.rows, columns)


def check(lhs: Any, rhs: Any, group_sizes: Any, blocks: Blocks, chip: Chip) -> None:
    """Raises ValueError, which names the field, its value and what was expected."""

    def need(ok: bool, field: str, value: object, expected: str) -> None:
        if not ok:
            raise ValueError(f"grouped_matmul: {field} is {value}; expected {expected}")

    need(lhs.ndim == 2, "lhs.shape", lhs.shape, "[M,K]")
    need(rhs.ndim == 3, "rhs.shape", rhs.shape, "[E,N,K]")
    need(rhs.shape[2] == lhs.shape[1], "rhs.shape[2]", rhs.shape[2], f"lhs.shape[1], {lhs.shape[1]}")
    need(0 not in lhs.shape + rhs.shape, "shapes", (lhs.shape, rhs.shape), "no empty axis")
    need(group_sizes.shape == rhs.shape[:1], "group_sizes.shape", group_sizes.shape, f"{rhs.shape[:1]}, as rhs has")
    need(group_sizes.dtype == jnp.int32, "group_sizes.dtype", group_sizes.dtype, "int32")
    need(lhs.dtype in (jnp.bfloat16, jnp.float32), "lhs.dtype", lhs.dtype, "bfloat16 or float32")
    need(rhs.dtype == lhs.dtype, "rhs.dtype", rhs.dtype, f"{lhs.dtype}, as lhs has")
    rows = SUBLANES * 4 // lhs.dtype.itemsize
    need(blocks.rows > 0 and blocks.rows % rows == 0, "blocks.rows", blocks.rows, f"a multiple of {rows}")
    need(blocks.columns > 0 and blocks.columns % LANES == 0, "blocks.columns", blocks.columns, f"a multiple of {LANES}")
    used = vmem(lhs.shape[1], blocks, lhs.dtype.itemsize)
    need(used <= chip.vmem - SPARE, "VMEM of the blocks", used, f"at most {chip.vmem - SPARE} bytes on {chip.name}")
    steps = 16 * (-(-lhs.shape[0] // blocks.rows) + rhs.shape[0])
    need(steps <= chip.smem // 2, "SMEM of the plan", steps, f"at most {chip.smem // 2} bytes on {chip.name}")
