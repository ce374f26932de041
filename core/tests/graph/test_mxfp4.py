"""MXFP4 against its definition, value by value."""

from __future__ import annotations

import numpy as np
import pytest

from polyradix.graph.checkpoint import mxfp4


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa; subnormal at exponent 0."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -value if sign else value


def test_every_code_at_both_places_and_several_scales() -> None:
    random = np.random.default_rng(0)
    blocks = random.permutation(np.arange(512) % 256).astype(np.uint8).reshape(2, 4, 4, 16)
    scales = random.integers(100, 150, (2, 4, 4)).astype(np.uint8)
    got = mxfp4.decode(blocks, scales)
    assert got.shape == (2, 4, 128)
    assert got.dtype == np.float32
    for at in np.ndindex(got.shape):
        group, place = divmod(at[2], 32)
        byte = int(blocks[at[0], at[1], group, place // 2])
        code = byte >> 4 if place % 2 else byte & 15
        assert got[at] == e2m1(code) * 2.0 ** (int(scales[at[0], at[1], group]) - 127)


def test_the_smallest_scale_is_exact_and_255_is_not_a_number() -> None:
    got = mxfp4.decode(np.full((2, 16), 0x11, np.uint8), np.array([0, 255], np.uint8))
    assert got[:32].astype(float).tolist() == [2.0**-128] * 32
    assert np.isnan(got[32:]).all()


@pytest.mark.parametrize(("blocks", "scales"), [((4, 16), (5,)), ((4, 8), (4,))])
def test_shapes_that_do_not_fit(blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"MXFP4 blocks are uint8 .*; expected uint8 \[..., groups, 16\]"):
        mxfp4.decode(np.zeros(blocks, np.uint8), np.zeros(scales, np.uint8))
