"""What a host asks of a backend beside the layers of a step: logits, sampling, moving pages."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np

from polyradix.backend.protocol import Heads, Params
from polyradix_conformance.cases.sampling import batch_of
from polyradix_conformance.inputs import SCRATCH
from polyradix_conformance.oracle import Arr, Precision, SampleRow
from polyradix_conformance.perf import truth
from polyradix_conformance.perf.program import (
    COLUMNS,
    TINY,
    WAIT,
    Program,
    Shape,
    Subject,
    alloc,
    checker,
    normal,
    weights,
)
from polyradix_conformance.perf.subjects import Scale, size_of
from polyradix_conformance.rig import Mismatch, Rig, same

KV_LAYERS = 4  # of the cache whose pages are moved


def head(rig: Rig, shape: Shape, x: Arr, w: Arr) -> Program:
    """A step that only embeds, and projects to logits."""

    def step(ops: Any, p: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        return ops.logits(ops.last(ops.embed(p.top["x"], m), m), p.top["w"]), kv

    return Program(rig, step, Params({"x": rig.pack("embed", x), "w": rig.pack("logits", w)}, []), shape, TINY, None)


def logits(rig: Rig, scale: Scale, seqs: int, hidden: int, vocab: int) -> Subject:
    """Several steps with weights of their own in turn, less a step with few logits. Launches are done in order."""
    shape, dtype = Shape(seqs, 1, 1), rig.dtype
    x, w = normal("x", (seqs, hidden), dtype), weights("head", vocab, hidden, dtype)
    turns = cycle([head(rig, shape, x, w) for _ in range(scale.layers(vocab * hidden * size_of(dtype)))])
    few = head(rig, shape, x, w[:COLUMNS])

    def many(times: int) -> Arr:
        for _ in range(times - 1):
            next(turns).launch()
        return next(turns)(1)

    def formula(p: Precision) -> Arr:
        return truth.linear(p, x[shape.last_rows], w, final=True)

    return Subject(many, checker(rig, shape, formula, final=True), 1, few)


def sample(rig: Rig, seqs: int, vocab: int, row: SampleRow) -> Subject:
    """Launched again and again on the same logits, and done in the order of launching. The logits are the backend's."""
    w = weights("head", vocab, COLUMNS, rig.dtype)
    on_device = head(rig, Shape(seqs, 1, 1), normal("x", (seqs, COLUMNS), rig.dtype), w).launch()
    x = rig.fetch(on_device, (seqs, vocab))
    rows = [SampleRow(row.temperature, row.top_k, row.top_p, row.min_p, s, 100 + s) for s in range(seqs)]
    batch = batch_of(rows)

    def many(times: int) -> Arr:
        for _ in range(times):
            out = rig.backend.sample(on_device, batch)
        return rig.backend.fetch(out).result(timeout=WAIT)

    def check(got: Arr) -> None:
        if got.shape != (seqs,):
            raise Mismatch(f"fetched samples of shape {got.shape}; expected {(seqs,)}")
        for s in Shape(seqs, 1, 1).checked:
            want = truth.sample(x[s], rows[s])
            if int(got[s]) not in want:
                raise Mismatch(f"sampled {got[s]} in row {s} with {rows[s]}; expected {sorted(want)}")

    return Subject(many, check)


def page_tokens(scale: Scale, heads: Heads, size: int) -> int:
    """Tokens whose keys and values in KV_LAYERS layers take `flush` bytes: a multiple of 128, and so of page sizes."""
    return -(-scale.flush // (token_bytes(heads, size) * 128)) * 128


def token_bytes(heads: Heads, size: int) -> int:
    return 2 * KV_LAYERS * heads.kv * heads.dim * size


def pages(rig: Rig, tokens: int, heads: Heads, verb: str) -> Subject:
    """copy_pages or export_pages of all the pages of so many tokens, scattered over a cache of twice as many."""
    backend, count = rig.backend, -(-tokens // rig.page)
    order = np.random.default_rng(0).permutation(np.arange(SCRATCH, SCRATCH + 2 * count)).tolist()
    source, target = order[:count], order[count:]
    data = normal("pages", (2, KV_LAYERS, count, rig.page, heads.kv, heads.dim), rig.dtype)
    kv = backend.import_pages(alloc(rig, SCRATCH + 2 * count, heads, KV_LAYERS), source, data)
    some = sorted({0, count // 2, count - 1})

    def copy(times: int) -> Arr:
        nonlocal kv
        for _ in range(times):
            kv = backend.copy_pages(kv, source, target)
        return backend.export_pages(kv, [target[i] for i in some]).result(timeout=WAIT)

    def export(times: int) -> Arr:
        for _ in range(times):
            out = backend.export_pages(kv, source).result(timeout=WAIT)
        return out[:, :, some]

    def check(got: Arr) -> None:
        same("the pages after the timing", got, data[:, :, some])

    return Subject(copy if verb == "copy_pages" else export, check)
