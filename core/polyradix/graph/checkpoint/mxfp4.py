"""MXFP4: groups of 32 four-bit floats (E2M1) that share a power of two, as gpt-oss publishes its experts.

Source: OCP Microscaling Formats (MX) Specification 1.0, 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import numpy as np

from polyradix.backend.protocol import HostArray

GROUP = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-v for v in _POSITIVE)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)  # of a byte: the low nibble comes first


def decode(blocks: HostArray, scales: HostArray) -> HostArray:
    """blocks uint8 [..., groups, 16], scales uint8 [..., groups], 2 ** (scale - 127), 255 for NaN -> float32
    [..., groups * 32]. Raises ValueError for shapes or dtypes that do not fit."""
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape != (*scales.shape, GROUP // 2):
        raise ValueError(
            f"MXFP4 blocks are {blocks.dtype} {list(blocks.shape)}, scales {scales.dtype} {list(scales.shape)}; "
            f"expected uint8 [..., groups, {GROUP // 2}] and uint8 [..., groups]"
        )
    out: HostArray = _PAIRS[blocks].reshape(*scales.shape, GROUP)
    with np.errstate(over="ignore"):
        np.ldexp(out, scales[..., None].astype(np.int32) - 127, out=out)
    out[scales == 255] = np.nan
    return out.reshape(*scales.shape[:-1], -1)
