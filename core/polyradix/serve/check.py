"""`polyradix check` and `polyradix devices`: what can run here, before a weight is read."""

from __future__ import annotations

from typing import Literal

from polyradix.backend.capabilities import validate
from polyradix.backend.registry import discover, open_backend
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.graph.dense import param_specs, tensor_shapes
from polyradix.graph.spec import ModelSpec


def check(
    model: str,
    device: str,
    dtype: Literal["auto", "bfloat16", "float32"],
    load_format: Literal["auto", "dummy"],
    page_size: int | None,
    emulate: bool,
    *,
    tp: int = 1,
) -> tuple[list[str], bool]:
    """A report, and whether the model can run. Raises the errors of the registry, the checkpoint and the spec."""
    backend = open_backend(device, tp=tp, emulate=emulate)
    caps = backend.caps
    checkpoint = open_checkpoint(model, load_format=load_format)
    spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
    chosen = spec.choose_dtype(dtype, caps.dtypes)
    reasons = [f"{model} {reason}" for reason in validate(spec.needs(chosen), caps, page_size)]
    if uneven := spec.uneven_split(tp):
        reasons.append(uneven)
    missing = sorted(tensor_shapes(spec).keys() - checkpoint.names)
    if missing:
        reasons.append(f"{checkpoint.source} lacks {len(missing)} tensors, the first is {missing[0]}")
    weights = param_specs(spec, chosen).bytes(tp)
    page_size = page_size or caps.page_sizes[0]
    page = backend.kv_page_bytes(spec.kv_spec(page_size, chosen)) if not reasons else 0
    memory = backend.memory()
    if weights + 2 * page > memory.free:
        reasons.append(f"the weights and two KV pages take {weights + 2 * page:,} bytes; {memory.free:,} are free")
    lines = [
        f"model    {model}: {spec.architecture}, {spec.layers} layers, context {spec.max_position}",
        f"device   {caps.name}: {caps.device}" + (" (emulated)" if caps.emulated else ""),
        f"dtype    {chosen}",
        f"weights  {weights:,} bytes" + (f" on each of {tp} ranks" if tp > 1 else ""),
    ]
    if page:
        lines.append(f"KV       {page:,} bytes for a page of {page_size} tokens")
    lines.append(f"memory   {memory.free:,} bytes free of {memory.total:,}")
    lines += [f"cannot run: {reason}" for reason in reasons] or ["can run"]
    return lines, not reasons


def devices() -> list[str]:
    """One line a backend: usable or not, and why."""
    lines = []
    for d in discover():
        reason = d.why_not()
        detail = d.found.detail if d.found is not None else ""
        lines.append(f"{d.name:12} " + (f"not usable: {reason}" if reason is not None else detail))
    return lines or ["no backend is installed"]
