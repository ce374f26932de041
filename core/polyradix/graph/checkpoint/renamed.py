"""Other spellings of a checkpoint's names, seen as the one that the loader knows."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from polyradix.graph.checkpoint import mistral
from polyradix.graph.checkpoint.base import Checkpoint

log = logging.getLogger(__name__)

_BARE = {  # tensors without `.weight` or `.bias`: a buffer that is a router's bias here, and sinks
    "mlp.gate.e_score_correction_bias": "mlp.gate.bias",
    "self_attn.sinks": "self_attn.sinks.weight",
}


def renamed(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` without what no graph here runs: layers that only draft tokens, and encoders of images."""
    names = {new: old for old in checkpoint.names if (new := _name(checkpoint, old)) is not None}
    if names.keys() == checkpoint.names:
        return checkpoint
    if left := len(checkpoint.names) - len(names):
        log.warning("%s: %d tensors of draft layers or image encoders are left out", checkpoint.source, left)
    return replace(
        checkpoint,
        names=names.keys(),
        read=lambda name: checkpoint.read(names[name]),
        where=lambda name: checkpoint.where(names[name]),
    )


def _name(checkpoint: Checkpoint, name: str) -> str | None:
    if "MistralLarge3ForCausalLM" in (checkpoint.config.get("architectures") or ()):
        return mistral.hf_name(name)
    drafts, layers = (checkpoint.config.get(key) for key in ("num_nextn_predict_layers", "num_hidden_layers"))
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match and isinstance(drafts, int) and isinstance(layers, int) and 0 <= int(match[1]) - layers < drafts:
        return None
    known = next((old for old in _BARE if name.endswith(old)), None)
    return name if known is None else name.removesuffix(known) + _BARE[known]
