"""`polyradix check` and `polyradix devices`: what can run here and how fast at best, before a weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from polyradix.backend.capabilities import Unsupported, validate
from polyradix.backend.expand import FUSED, Expansions
from polyradix.backend.protocol import Ops
from polyradix.backend.registry import discover, open_backend
from polyradix.engine.cache import cache_of
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.graph.checkpoint.keep import cuts, keep, report
from polyradix.graph.cost import Batch, trace
from polyradix.graph.dense import param_specs, tensor_shapes
from polyradix.graph.spec import ModelSpec
from polyradix.serve.forecast import NOTE, find, forecast

CONTEXT = 4096  # tokens, if nobody says and the model has so many


@dataclass(frozen=True)
class Question:
    """None means: chosen from the model and the backend."""

    model: str
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    kv_dtype: Literal["auto", "float8_e4m3fn"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    revision: str | None = None
    tp: int = 1
    page_size: int | None = None
    emulate: bool = False
    context: int | None = None  # tokens that a sequence holds
    seqs: int = 64  # of the larger decode
    peak_bandwidth: float | None = None  # 1e9 bytes a second of one device
    peak_flops: float | None = None  # 1e9 operations a second of one device
    ceilings: Path | None = None  # output of `conform perf`, for what is not given


def check(q: Question) -> dict[str, Any]:
    """The report as JSON has it; the model can run if `reasons` is empty. Bytes and costs are of one rank. Raises the
    errors of the registry, the checkpoint and the spec, and ValueError for an option that cannot be."""
    backend = open_backend(q.device, tp=q.tp, emulate=q.emulate)
    caps, memory = backend.caps, backend.memory()
    checkpoint = open_checkpoint(q.model, load_format=q.load_format, revision=q.revision, headers=True)
    spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
    context = _context(q, spec.max_position)
    dtype, page_size = spec.choose_dtype(q.dtype, caps.dtypes), q.page_size or caps.page_sizes[0]
    kv_dtype = dtype if q.kv_dtype == "auto" else q.kv_dtype
    needs, ceilings = spec.needs(dtype, kv_dtype), find(q.peak_bandwidth, q.peak_flops, q.ceilings, dtype)
    reasons = [f"{q.model} {reason}" for reason in validate(needs, caps, q.page_size)]
    if (uneven := spec.uneven_split(q.tp)) is not None:
        reasons.append(uneven)
    if missing := sorted(tensor_shapes(spec).keys() - checkpoint.names):
        reasons.append(f"{checkpoint.source} lacks {len(missing)} tensors, the first is {missing[0]}")
    stored = param_specs(spec, dtype), checkpoint, spec, caps.features, q.tp
    table = keep(*stored)
    weights, (kv, groups) = table.bytes(q.tp), cache_of(spec, caps, page_size, kv_dtype, context)
    page = 0
    try:
        page = 0 if reasons else backend.kv_page_bytes(kv)
    except Unsupported as e:
        reasons.append(f"{q.model} cannot run on {caps.name}: {e}")
    left = memory.free - weights
    pages = int(max(0, left) * caps.mem_fraction) // page if page else 0
    if left < 0:
        reasons.append(f"the weights take {weights:,} bytes; {memory.free:,} are free")
    elif page and pages <= groups.count:
        held = (
            f"mem_fraction {caps.mem_fraction} of the {left:,} bytes that they leave holds {pages} KV pages of {page:,}"
        )
        reasons.append(f"the weights take {weights:,} bytes, and {held}; at least {groups.count + 1} are needed")
    sequence = groups.pages(context, page_size)
    cost = partial(trace, spec, table, kv, tp=q.tp)
    return {
        "model": q.model,
        "architecture": spec.architecture,
        "layers": spec.layers,
        "max_position": spec.max_position,
        "backend": caps.name,
        "device": caps.device,
        "emulated": caps.emulated,
        "dtype": dtype,
        "tp": q.tp,
        "features": {name: name in caps.features for name in sorted(needs.features)},
        "verbs": {name: _whose(backend.ops, name) for name in sorted(cost(Batch(1, 1, 1)).verbs)},
        "weights": weights,
        "quantised": [*report(table, checkpoint, spec), *(cuts(*stored) if uneven is None else ())],
        "page_size": page_size,
        "kv_page": page,
        "kv_groups": asdict(groups),
        "context": context,
        "kv_sequence": sequence * page,
        "kv_pages": pages,
        "mem_fraction": caps.mem_fraction,
        "sequences": max(0, pages - 1) // sequence,
        "free": memory.free,
        "total": memory.total,
        "ceilings": None if ceilings is None else asdict(ceilings),
        "steps": forecast(cost, context, q.seqs, caps.step_tokens, ceilings),
        "reasons": reasons,
    }


def text(r: dict[str, Any]) -> list[str]:
    """The report for a person."""
    on = f" on each of {r['tp']} ranks" if r["tp"] > 1 else ""
    lines = [
        f"model    {r['model']}: {r['architecture']}, {r['layers']} layers, context {r['max_position']}",
        f"device   {r['backend']}: {r['device']}" + (" (emulated)" if r["emulated"] else ""),
        f"dtype    {r['dtype']}",
        "features " + (", ".join(n if has else f"{n} (MISSING)" for n, has in r["features"].items()) or "none needed"),
        "verbs    " + ", ".join(n if whose == "own" else f"{n} ({whose})" for n, whose in r["verbs"].items()),
        f"weights  {r['weights']:,} bytes{on}",
        *(f"         {line}" for line in r["quantised"]),
    ]
    if r["kv_page"]:
        g = r["kv_groups"]
        of = f" of one of {g['full'] + g['windowed']} groups, {g['windowed']} with windows" if g["windowed"] else ""
        lines.append(f"KV       {r['kv_page']:,} bytes for a page of {r['page_size']} tokens{of}{on}")
        lines.append(
            f"         {r['kv_sequence']:,} for {r['context']:,} tokens; "
            f"{r['sequences']:,} such sequences fit with mem_fraction {r['mem_fraction']}"
        )
    lines.append(f"memory   {r['free']:,} bytes free of {r['total']:,}{on}")
    if r["ceilings"]:
        c = r["ceilings"]
        lines.append(f"ceilings {c['read_gb_s']:,.6g} GB/s, {c['gflop_s']:,.6g} GFLOP/s ({c['source']}); {NOTE}")
    lines += [f"{s['step']:8} {_step(s)}{on}" for s in r["steps"]]
    return lines + ([f"cannot run: {reason}" for reason in r["reasons"]] or ["can run"])


def devices() -> list[str]:
    """One line a backend: usable or not, and why."""
    lines = []
    for d in discover():
        reason = d.why_not()
        detail = d.found.detail if d.found is not None else ""
        lines.append(f"{d.name:12} " + (f"not usable: {reason}" if reason is not None else detail))
    return lines or ["no backend is installed"]


def _context(q: Question, most: int) -> int:
    for name in ("tp", "context", "seqs"):
        if (value := getattr(q, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    context = q.context or min(CONTEXT, most)
    if context > most:
        raise ValueError(f"context is {context}; expected at most the model's {most}")
    return context


def _whose(ops: Ops, verb: str) -> str:
    inherited = vars(Expansions).get(verb)
    if inherited is None or getattr(getattr(ops, verb), "__func__", None) is not inherited:
        return "own"
    return "expansion" if verb in (*FUSED, "layers") else "declined"


def _step(s: dict[str, Any]) -> str:
    what = f"a prompt of {s['tokens']:,} tokens" if s["step"] == "prefill" else f"of {s['seqs']:,}"
    moved = f"{what}: {s['bytes'] / 1e9:,.3f} GB, {s['flops'] / 1e9:,.3f} GFLOP"
    if "seconds" not in s:
        return moved
    return f"{moved}, at least {1e3 * s['seconds']:,.3f} ms, at most {s['tokens_per_s']:,.1f} tok/s ({s['bound']})"
