"""AWQ, GPTQ and compressed-tensors' packed int4: eight codes in an int32, a scale and a zero point for each group of
input columns. What the latter packs is what GPTQ does, transposed, its zero point 8 where there is none.

Sources: AutoAWQ's awq/utils/packing_utils.py, GPTQModel's nn_modules/qlinear and utils/model.py (zero points less one),
compressed-tensors' compressors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polyradix.backend.protocol import HostArray, ParamPart, Quant
from polyradix.graph.checkpoint.base import FLOATS, Checkpoint, Parts, Stored
from polyradix.graph.errors import CheckpointError
from polyradix.graph.quantisation import Quantisation

_NAMES = "qweight", "qzeros", "scales", "g_idx"
_PACKED = "weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"
PARTS = (*_NAMES, *_PACKED, "weight_shape")
_EIGHTS = np.int32(-0x77777778)  # 8, eight times
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of an int32 has column i of its eight
_INT32 = (np.dtype(np.int32),)


def stored(checkpoint: Checkpoint, q: Quantisation) -> dict[str, Stored]:
    """By the names that plain weights would have. Raises CheckpointError naming the tensor at fault."""
    names = _PACKED if q.method == "packed" else _NAMES
    ending = f".{names[0]}"
    stems = [n.removesuffix(ending) for n in checkpoint.names if n.endswith(ending)]
    return {f"{stem}.weight": _one(checkpoint, q, *(f"{stem}.{name}" for name in names)) for stem in stems}


def _one(checkpoint: Checkpoint, q: Quantisation, packed: str, zero_points: str, scale: str, g_idx: str) -> Stored:
    turn = -1 if q.method == "packed" else 1
    shape = checkpoint.read(packed).shape[::turn]
    if len(shape) != 2:
        raise CheckpointError(
            f"{checkpoint.where(packed)}: tensor {packed} has shape {list(shape)}; expected two sizes"
        )
    width, out = (shape[0], shape[1] * 8) if q.method == "awq" else (shape[0] * 8, shape[1])
    group = q.group or width
    if width % group:
        raise CheckpointError(
            f"{checkpoint.where(packed)}: tensor {packed} has {width} columns; expected whole groups of {group}"
        )
    groups = width // group

    def tensor(name: str, shape: tuple[int, ...], dtypes: Any = FLOATS) -> HostArray:
        value = checkpoint.tensor(name, shape[::turn], dtypes)
        return value.T if turn < 0 else value

    codes, scales, eights = tensor(packed, shape, _INT32), tensor(scale, (groups, out)), (groups, -(-out // 8))
    none = q.method == "packed" and zero_points not in checkpoint.names
    zeros = np.full(eights, _EIGHTS) if none else tensor(zero_points, eights, _INT32)
    order = _group_of(checkpoint, g_idx, width, groups) if q.method != "awq" else None

    def parts() -> dict[ParamPart, HostArray]:
        held = _columns(codes, q) if q.method == "awq" else np.moveaxis(_nibbles(codes), 2, 1).reshape(width, out)
        zero, scale = ((_columns(zeros, q) + q.offset) & 15).T, scales.astype(np.float32).T
        if order is not None:
            zero, scale = zero[:, order], scale[:, order]
        weight = held[::2].T | held[1::2].T << 4
        return {
            "weight": np.ascontiguousarray(weight),
            "scale": np.ascontiguousarray(scale),
            "zero": np.ascontiguousarray(zero),
        }

    what = f"{q.method.upper()} int4 in groups of {group}" + ("" if order is None else ", each of any columns")
    quant = Quant("int4", (1, group if order is None else 1))
    return Stored(what, codes.nbytes + zeros.nbytes + scales.nbytes, Parts(quant, parts))


def _group_of(checkpoint: Checkpoint, name: str, width: int, groups: int) -> HostArray | None:
    """The group of each column, None if groups are the columns in their order."""
    plain = np.arange(width) // (width // groups)
    if name not in checkpoint.names:
        return None
    found = checkpoint.tensor(name, (width,), _INT32)
    if found.min() < 0 or found.max() >= groups:
        raise CheckpointError(
            f"{checkpoint.where(name)}: tensor {name} is {found.min()} to {found.max()}; expected 0 to {groups - 1}"
        )
    return None if np.array_equal(found, plain) else found


def _columns(packed: HostArray, q: Quantisation) -> HostArray:
    """int32 [rows, n] -> uint8 [rows, 8 n]."""
    nibbles = _nibbles(packed)
    return (nibbles[..., _AWQ] if q.method == "awq" else nibbles).reshape(len(packed), -1)


def _nibbles(packed: HostArray) -> HostArray:
    """int32 [rows, n] -> uint8 [rows, n, 8], the lowest first."""
    pairs = np.ascontiguousarray(packed).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*packed.shape, 8)
