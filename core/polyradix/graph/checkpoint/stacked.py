"""Experts in transformers' own spelling, one tensor for all of a layer, seen as the published one, some for each."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from polyradix.backend.protocol import HostArray
from polyradix.graph import gpt_oss, moe
from polyradix.graph.checkpoint import gpt_oss as checkpoints
from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.spec import ModelSpec


class _View(NamedTuple):
    """Rows start:stop of one expert in a stacked tensor; `expert` None is the whole tensor under another name."""

    tensor: str
    shape: tuple[int, ...] | None = None
    expert: int | None = None
    start: int = 0
    stop: int = 0


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself unless it has stacked experts. Raises ModelError for a config that is wrong."""
    if not any(part in name for name in checkpoint.names for part in moe.STACKED):
        return checkpoint
    spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
    if spec.architecture == gpt_oss.ARCHITECTURE:
        return checkpoints.unstacked(checkpoint, spec)
    views = {name: v for name, v in _views(spec).items() if v.tensor in checkpoint.names}
    used = {v.tensor for v in views.values()}

    def read(name: str) -> HostArray:
        view = views.get(name)
        if view is None:
            return checkpoint.read(name)
        whole = checkpoint.tensor(view.tensor, view.shape)
        return whole if view.expert is None else whole[view.expert, view.start : view.stop]

    def where(name: str) -> str:
        return checkpoint.where(views[name].tensor if name in views else name)

    return replace(checkpoint, names=(set(checkpoint.names) - used) | views.keys(), read=read, where=where)


def _views(spec: ModelSpec) -> dict[str, _View]:
    out: dict[str, _View] = {}
    if spec.experts is None:
        return out
    x, n = spec.experts, moe.names(spec.architecture)
    count, inner, hidden = x.routing.experts, x.intermediate, spec.hidden
    for layer in set(range(spec.layers)) - x.dense_layers:
        here = f"model.layers.{layer}."
        gate_up, down = (here + name for name in moe.STACKED)
        out[f"{here}{n.router}.weight"] = _View(f"{here}mlp.gate.weight")
        for e in range(count):
            wide = (count, 2 * inner, hidden)
            out[f"{here}{n.gate.format(e)}.weight"] = _View(gate_up, wide, e, 0, inner)
            out[f"{here}{n.up.format(e)}.weight"] = _View(gate_up, wide, e, inner, 2 * inner)
            out[f"{here}{n.down.format(e)}.weight"] = _View(down, (count, hidden, inner), e, 0, hidden)
    return out
