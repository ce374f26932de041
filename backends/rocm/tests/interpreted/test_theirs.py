"""The simulator against AITER's own Triton kernels, of PyPI's wheel, interpreted, with stubs for what wants a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from polyradix_rocm.aiter.calls import Aiter
from polyradix_rocm.simulator import Simulator

SHELLS = ("aiter", "aiter.jit", "aiter.jit.utils", "aiter.ops", "aiter.ops.triton")
TRITON = "aiter.ops.triton"
ULPS = 2**-7  # of bfloat16
I32 = torch.int32


def arch(**more: Any) -> dict[str, Any]:
    return {"get_device": lambda: "MI300X", "get_arch": lambda: "gfx942", "is_fp4_avail": lambda: False, **more}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A module of aiter.ops.triton, by name."""
    root = tmp_path_factory.mktemp("wheel")
    with ZipFile(os.environ["POLYRADIX_AMD_AITER"]) as wheel:
        wheel.extractall(root, [name for name in wheel.namelist() if name.startswith("aiter/ops/triton/")])
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.partition(".")[0] == "aiter"]:
            patch.delitem(sys.modules, name)
        stubs: dict[str, dict[str, Any]] = {name: {"__path__": [str(root / name.replace(".", "/"))]} for name in SHELLS}
        stubs["aiter.jit.utils.chip_info"] = {"get_gfx": lambda: "gfx942", "get_cu_num": lambda: 304}
        stubs[f"{TRITON}.utils.device_info"] = {"get_num_sms": lambda: 4, "get_num_xcds": lambda: 8}
        stubs[f"{TRITON}.utils.arch_info"] = arch(is_fp8_avail=lambda: True)
        stubs[f"{TRITON}.utils._triton.arch_info"] = arch(is_fp8_avail=lambda: True)
        stubs[f"{TRITON}._triton_kernels.flash_attn_triton_amd"] = {"flash_attn_2": None}
        for name, values in stubs.items():
            module = ModuleType(name)
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
        yield lambda name: import_module(f"{TRITON}.{name}")
        for name in [n for n in sys.modules if n.partition(".")[0] == "aiter" and n not in stubs]:
            del sys.modules[name]


@pytest.fixture
def aiter(exact: None) -> Aiter:
    torch.manual_seed(0)
    return Aiter(Simulator("gfx942", "0.1.20"))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def close(mine: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(mine.float(), other.float(), rtol=2 * ULPS, atol=2 * ULPS)


CU_Q, CU_K = (torch.tensor(ends, dtype=I32) for ends in ((0, 2, 5), (0, 3, 8)))


def test_add_rms_norm(aiter: Aiter, theirs: Callable[[str], Any]) -> None:
    x, residual, w = values(5, 256), values(5, 256), values(256)
    out, total = torch.empty_like(x), torch.empty_like(x)
    theirs("rmsnorm").rmsnorm2d_fwd_with_add(out, x, residual, total, w, 1e-5)
    mine, sums = aiter.add_rms_norm(x, residual, w, 1e-5)
    assert torch.equal(sums, total)
    close(mine, out)


def test_rope(aiter: Aiter, theirs: Callable[[str], Any]) -> None:
    q, angle, at = values(5, 4, 64), torch.rand(64, 32) * 6, torch.tensor([3, 4, 60, 6, 11])
    table = [x[:, None, None] for x in (angle.cos(), angle.sin())]
    other = theirs("rope").rope_cached_positions_fwd(q[:, None], *table, at[:, None], 0, True, False)
    mine, _ = aiter.rope(q, q, angle.cos(), angle.sin(), at)
    close(mine, other[:, 0])


def test_varlen(aiter: Aiter, theirs: Callable[[str], Any]) -> None:
    q, k, v = values(5, 4, 128), values(8, 4, 128), values(8, 4, 128)
    other = theirs("mha").flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 3, 5, softmax_scale=0.1, causal=True)
    close(aiter.varlen(q, k, v, CU_Q, CU_K, (3, 5), 0.1), other)


@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (2, 0.0), (None, 5.0)])
def test_prefill(aiter: Aiter, theirs: Callable[[str], Any], window: int | None, softcap: float) -> None:
    """Their unified attention, over pages of 16, which has the rules of windows, caps and alignment."""
    kv = values(4, 16, 2, 128), values(4, 16, 2, 128)
    q, out = values(5, 4, 128), torch.empty(5, 4, 128, dtype=torch.bfloat16)
    table = torch.zeros(2, 32, dtype=I32)
    table[:, 0] = torch.tensor([1, 3])
    lengths = CU_K.diff().long()
    theirs("unified_attention").unified_attention(
        q, *kv, out, CU_Q, 3, lengths, 5, 0.1, True, (-1, -1) if window is None else (window - 1, 0), table, softcap,
        None, None, None,
    )  # fmt: skip
    slots, ones = torch.tensor([16, 17, 18, 48, 49, 50, 51, 52], dtype=I32), torch.ones(2, dtype=I32)
    flat = tuple(x.view(-1, 1, 2, 128) for x in kv)
    close(aiter.prefill(q, flat, CU_Q, CU_K, slots, ones, (3, 5), 0.1, softcap, window), out)  # type: ignore[arg-type]
