"""Storage formats. A simulated FRACTAL_NZ tensor has the vendor's own mark, and its values in rows all the same."""

from __future__ import annotations

from typing import Any

import torch

from polyradix_npu.contracts import WrongCall
from polyradix_npu.emulate.memory import alias, on_device

ND, NZ = 2, 29
TAKES_NZ = {
    "aten::linear",
    "aten::matmul",
    "aten::_to_copy",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "npu::npu_grouped_matmul",
    "npu::npu_format_cast",
    "npu::get_npu_format",
}


def is_nz(x: Any) -> bool:
    import torch_npu

    return on_device(x) and int(torch_npu.get_npu_format(x)) == NZ


def cast(x: torch.Tensor, form: int) -> torch.Tensor:
    """A copy on the device of the CPU tensor `x`, in the format of that number."""
    import torch_npu

    out = torch_npu.empty_with_format(x.shape, dtype=x.dtype, device="npu:0", acl_format=form)
    if int(torch_npu.get_npu_format(out)) != form:
        raise WrongCall(f"npu_format_cast: acl_format {form} needs torch.npu.config.allow_internal_format to be True")
    alias(out).copy_(x)
    return out


def check(name: str, values: list[Any]) -> None:
    """Raises WrongCall for a FRACTAL_NZ tensor where rows are expected."""
    if name not in TAKES_NZ and any(map(is_nz, values)):
        raise WrongCall(f"{name}: an argument is in format FRACTAL_NZ; expected ND")
