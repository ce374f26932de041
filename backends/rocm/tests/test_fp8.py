"""Every e4m3fn code keeps its value as e4m3fnuz with twice the scale; by ml_dtypes, which knows both."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from polyradix_rocm.fp8 import to_fnuz

CODES = np.arange(256, dtype=np.uint8)
FINITE = CODES[CODES & 0x7F != 0x7F]


def weight(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def test_values_stay() -> None:
    scale = torch.tensor([0.75, 3.0])
    got, doubled = to_fnuz(weight(FINITE).view(2, -1), scale)
    assert got.dtype == torch.float8_e4m3fnuz
    values = got.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fnuz).astype(np.float64) * doubled.numpy()[:, None]
    want = FINITE.view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(2, -1) * scale.numpy()[:, None]
    assert np.array_equal(values, want)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="weight has 1 NaN among 3 values"):
        to_fnuz(weight(np.array([0, code, 0x80], np.uint8)), torch.ones(1))


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16; expected torch.float8_e4m3fn"):
        to_fnuz(torch.ones(2, dtype=torch.bfloat16), torch.ones(1))
