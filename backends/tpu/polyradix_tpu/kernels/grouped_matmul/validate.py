"""What the kernel takes, from shapes alone; nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyradix_tpu.kernels.chip import DTYPES, LANES, SMEM, SUBLANES, Problems

VMEM = 56 << 20  # bytes that one call may use: the smallest chip has 64 MiB


@dataclass(frozen=True)
class Blocks:
    """Rows of lhs that are fetched at once, those of them that meet the weights at once, and columns of the result."""

    rows: int
    part: int
    columns: int


def vmem(inner: int, blocks: Blocks, itemsize: int) -> int:
    """Bytes: operands and result twice, a part's product in float32, and as much again for the compiler."""
    whole = (blocks.rows + blocks.columns) * inner + blocks.rows * blocks.columns
    return 2 * itemsize * whole + 8 * blocks.part * blocks.columns


def fit(inner: int, blocks: Blocks, itemsize: int) -> Blocks:
    """The blocks, columns halved until they fit VMEM; then rows."""
    rows, columns = blocks.rows, blocks.columns
    while vmem(inner, Blocks(rows, blocks.part, columns), itemsize) > VMEM:
        if columns > LANES:
            columns //= 2
        elif rows > blocks.part:
            rows //= 2
        else:
            break
    return Blocks(rows, blocks.part, columns)


def problems(lhs: Any, rhs: Any, group_sizes: Any, blocks: Blocks) -> list[str]:
    """Why the kernel does not take these: field, value, what was expected."""
    out = Problems()
    expect = out.expect
    expect(lhs.ndim == 2 and 0 not in lhs.shape, "lhs's shape", lhs.shape, "[M,K]")
    expect(rhs.ndim == 3 and 0 not in rhs.shape, "rhs's shape", rhs.shape, "[E,N,K]")
    if out:
        return out
    (rows, inner), groups, itemsize = lhs.shape, rhs.shape[0], lhs.dtype.itemsize
    sublanes = SUBLANES * 4 // itemsize
    expect(rhs.shape[2] == inner, "rhs's last axis", rhs.shape[2], f"{inner}, as lhs has")
    expect(inner % LANES == 0, "K", inner, f"a multiple of {LANES}, or XLA transposes all weights in every call")
    expect(group_sizes.shape == (groups,), "group_sizes' shape", group_sizes.shape, f"({groups},)")
    expect(group_sizes.dtype.name == "int32", "group_sizes' dtype", group_sizes.dtype.name, "int32")
    expect(lhs.dtype == rhs.dtype and lhs.dtype.name in DTYPES, "dtypes", (lhs.dtype, rhs.dtype), f"one of {DTYPES}")
    expect(blocks.part > 0 and blocks.part % sublanes == 0, "part", blocks.part, f"a multiple of {sublanes}")
    expect(blocks.rows > 0 and blocks.rows % blocks.part == 0, "rows", blocks.rows, f"a multiple of {blocks.part}")
    expect(blocks.columns > 0 and blocks.columns % LANES == 0, "columns", blocks.columns, f"a multiple of {LANES}")
    size, plan = vmem(inner, blocks, itemsize), 16 * (-(-rows // blocks.rows) + groups)
    expect(size <= VMEM, f"VMEM for {blocks}", size, f"at most {VMEM}")
    expect(plan <= SMEM, "bytes of the plan", plan, f"at most {SMEM}")
    return out
