"""FP8 weights: float8_e4m3fn, and a scale for the tensor, each row or each block, as DeepSeek, Mistral and
compressed-tensors publish them. Scales of activations and of the cache are left out: both stay in the model's dtype.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from polyradix.backend.protocol import HostArray, ParamPart, Quant
from polyradix.graph.checkpoint.base import Checkpoint, Parts, Stored
from polyradix.graph.errors import CheckpointError
from polyradix.graph.quantisation import Quantisation

SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
PARTS = (*SCALES, "input_scale", "activation_scale", "qscale_act", "k_scale", "v_scale")


def stored(checkpoint: Checkpoint, q: Quantisation) -> dict[str, Stored]:
    """Raises CheckpointError naming the tensor whose scale is missing, of another shape, or left over."""
    scales = {n.rpartition(".")[0]: n for n in checkpoint.names if n.rpartition(".")[2] in SCALES}
    out = {}
    for name in checkpoint.names:
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and checkpoint.read(name).dtype == ml_dtypes.float8_e4m3fn:
            if stem not in scales:
                raise CheckpointError(f"{checkpoint.where(name)}: FP8 tensor {name} has no scale {stem}.{SCALES[0]}")
            out[name] = _one(checkpoint, q, name, scales.pop(stem))
    for stem, scale in scales.items():
        raise CheckpointError(f"{checkpoint.where(scale)}: tensor {scale} has no FP8 tensor {stem}.weight")
    return out


def _one(checkpoint: Checkpoint, q: Quantisation, name: str, scale: str) -> Stored:
    codes, found = checkpoint.read(name), checkpoint.tensor(scale)
    if codes.ndim != 2:
        raise CheckpointError(
            f"{checkpoint.where(name)}: tensor {name} has shape {list(codes.shape)}; expected two sizes"
        )
    rows, columns = q.block or (1, codes.shape[1])
    blocks = -(-codes.shape[0] // rows), -(-codes.shape[1] // columns)
    if found.shape != blocks and (q.block or found.shape not in (blocks[:1], (1, 1), (1,), ())):
        raise CheckpointError(
            f"{checkpoint.where(scale)}: tensor {scale} has shape {list(found.shape)}; expected {list(blocks)}"
            + ("" if q.block else " or one number")
        )

    def parts() -> dict[ParamPart, HostArray]:
        each = np.broadcast_to(found.astype(np.float32).reshape(-1, blocks[1]), blocks)
        return {"weight": codes, "scale": np.ascontiguousarray(each)}

    what = f"FP8 in blocks of {rows}x{columns}" if q.block else "FP8 in rows or whole"
    return Stored(what, codes.nbytes + found.nbytes, Parts(Quant("fp8", (rows, columns)), parts))
