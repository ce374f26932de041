"""L2: what the cache holds, page by page, over writes, copies, moves, and batches in any order."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Heads, Params
from polyradix_conformance.cases import case
from polyradix_conformance.cases.sampling import Sampler, greedy_batch
from polyradix_conformance.flow import Flow, poison
from polyradix_conformance.inputs import Part, Ragged, ragged_lengths, values
from polyradix_conformance.oracle import Arr, Attention
from polyradix_conformance.rig import Rig, same

HEADS = Heads(q=4, kv=2, dim=64)
ATTENTION = Attention(0.125)
LAYERS = 3


def flow_of(rig: Rig, seed: int = 0, lengths: tuple[int, ...] | None = None) -> Flow:
    ragged = Ragged(lengths or ragged_lengths(rig.page), rig.page, seed)
    return Flow(rig, ragged, HEADS, ATTENTION, layers=LAYERS)


def held(flow: Flow, pages: list[int]) -> Arr:
    """The export of the layers under test."""
    return flow.export(pages)[:, :LAYERS]


def zeroed(rig: Rig) -> None:
    spec, kv = rig.kv(5, HEADS, LAYERS)
    data = rig.export(kv, [4, 1, 2, 3])
    same("a new cache", data, np.zeros((2, LAYERS, 4, spec.page_size, HEADS.kv, HEADS.dim)))


def written(rig: Rig) -> None:
    """Every slot holds its k and v, in every layer; every other slot but those of page 0 is untouched."""
    flow = flow_of(rig)
    for parts in flow.ragged.chunked():
        flow.step(parts)
    pages = list(range(1, flow.ragged.num_pages))
    same("the cache", held(flow, pages), flow.contents(flow.ragged.whole()[0])[:, :, 1:])


def last_layer(rig: Rig) -> None:
    """Layers keep apart: the last one's output is its own."""
    flow = flow_of(rig)
    flow.check("the last of three layers", flow.ragged.mixed())


def copied(rig: Rig) -> None:
    """A copy holds what the source held then, and neither follows the other."""
    flow = flow_of(rig, lengths=(rig.page + 1, 3))
    page = rig.page
    flow.step([Part(0, 0, page), Part(1, 0, 2)])
    before = flow.contents([Part(0, 0, page), Part(1, 0, 2)])
    a, b = int(flow.ragged.pages[0][0]), int(flow.ragged.pages[1][0])
    to = flow.ragged.spare[:2]
    flow.kv = rig.backend.copy_pages(flow.kv, [b, a], to)
    same("the copies", held(flow, to), before[:, :, [b, a]])
    flow.step([Part(0, page, page + 1), Part(1, 2, 3)])
    same("the copies after the source changed", held(flow, to), before[:, :, [b, a]])
    after = flow.contents(flow.ragged.whole()[0])
    same("the source after it was copied", held(flow, [a, b]), after[:, :, [a, b]])
    flow.kv = rig.backend.import_pages(flow.kv, to[:1], poison(flow.spec, 1))
    same("the source after its copy changed", held(flow, [b]), after[:, :, [b]])


def moved(rig: Rig) -> None:
    """Pages exported, and imported elsewhere in another cache in another order, are the same and serve the same."""
    flow = flow_of(rig)
    head, tail = flow.ragged.decode()
    flow.step(head)
    there = Flow(rig, Ragged(flow.ragged.lengths, rig.page, seed=1), HEADS, ATTENTION, layers=LAYERS)
    source, target = (np.concatenate(f.ragged.pages)[::-1].tolist() for f in (flow, there))
    data = flow.export(source)
    same("the export", data[:, :LAYERS], flow.contents(head)[:, :, source])
    there.kv = rig.backend.import_pages(there.kv, target, data)
    same("the import", there.export(target[::-1]), data[:, :, ::-1])
    there.check("decoding from imported pages", [tail])


def nothing_to_move(rig: Rig) -> None:
    """Empty lists of pages are no-ops."""
    flow = flow_of(rig)
    flow.kv = rig.backend.copy_pages(flow.kv, [], [])
    data = flow.export([])
    flow.kv = rig.backend.import_pages(flow.kv, [], data)
    pages = list(range(1, flow.ragged.num_pages))
    same("the cache", held(flow, pages), poison(flow.spec, flow.ragged.num_pages)[:, :LAYERS, 1:])


def batching(rig: Rig) -> None:
    """Whole, in chunks, alone, a row for each token, in another order and on other pages: right every time, and where
    the backend claims batch invariance, the same bits."""
    flow = flow_of(rig)
    whole = flow.ragged.whole()[0]
    want = flow.checked_step("whole", whole)
    seq, end = whole[-1].seq, whole[-1].stop
    plans = {
        "a row for each token": [[Part(seq, 0, end - 20)], [Part(seq, at, at + 1) for at in range(end - 20, end)]],
        "in chunks": flow.ragged.chunked(),
        "with decodes": flow.ragged.mixed(),
        "alone": [[p] for p in whole],
        "decoded alone": [flow.ragged.decode()[0], *([p] for p in flow.ragged.decode()[1])],
        "in another order": [whole[::-1]],
        "on other pages": [whole],
    }
    for what, plan in plans.items():
        again = flow_of(rig, seed=int(what == "on other pages"))
        if not rig.backend.caps.batch_invariant:
            again.check(what, plan)
            continue
        for parts in plan:
            ids = np.concatenate([again.ragged.ids(p) for p in parts])
            same(f"{what}, bit for bit", again.step(parts), want[ids])


def linked(rig: Rig) -> None:
    """Tokens taken from the previous step's samples, which the host has not seen."""
    x = values("linked", (8, 8), rig.dtype)
    x[np.arange(8), (np.arange(8) * 3 + 1) % 8] = 50.0  # row i samples (3 i + 1) mod 8
    params = Params({"x": rig.pack("embed", x), "head": rig.pack("logits", np.eye(8))}, [])
    ragged = Ragged((4, 4, 4), rig.page)
    _, kv = rig.kv(ragged.num_pages, Heads(1, 1, 64))

    def step(ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        return ops.logits(ops.last(ops.embed(params.top["x"], m), m), params.top["head"]), kv

    def batch(parts: list[Part], tokens: list[int], from_prev: list[int] | None = None) -> HostBatch:
        made = ragged.batch(parts)
        made.tokens[:] = tokens
        made.from_prev[:] = from_prev or -1
        return made

    run = rig.compile(step, params)
    first, kv = run(kv, batch([Part(0, 0, 2), Part(1, 0, 1)], [5, 2, 6]))
    prev = rig.backend.sample(first, greedy_batch(2))
    parts = [Part(1, 1, 2), Part(2, 0, 2), Part(0, 2, 3)]
    second, kv = run(kv, batch(parts, [0, 4, 1, 0], [1, -1, -1, 0]), prev)
    same("the samples of the first step", rig.fetch(prev, (2,)), [7, 3])
    same("the samples of the second", rig.fetch(rig.backend.sample(second, greedy_batch(3)), (3,)), [2, 4, 6])


def exported_then_written(rig: Rig) -> None:
    """An export is of the moment it was asked for."""
    flow = flow_of(rig, lengths=(rig.page,))
    flow.step(flow.ragged.whole()[0])
    pages = flow.ragged.pages[0].tolist()
    asked = rig.backend.export_pages(flow.kv, pages)
    flow.kv = rig.backend.import_pages(flow.kv, pages, poison(flow.spec, len(pages)))
    same("the export", asked.result(timeout=60)[:, :LAYERS], flow.contents(flow.ragged.whole()[0])[:, :, pages])


def fetched_later(rig: Rig) -> None:
    """The engine launches a step before it looks at the one before: what was fetched stays."""
    sampler, wanted = Sampler(rig), ([10, 11, 12], [20, 21, 22])
    asked = []
    for ids in wanted:
        logits = sampler.logits(ids)
        asked.append((rig.backend.fetch(logits), rig.backend.fetch(rig.backend.sample(logits, greedy_batch(3)))))
    for ids, (logits, samples) in zip(wanted, asked, strict=True):
        same(f"logits of {ids}", logits.result(timeout=60), sampler.x[ids])
        same(f"samples of {ids}", samples.result(timeout=60), sampler.x[ids].argmax(axis=1))


def two_steps(rig: Rig) -> None:
    """Two compiled steps on one backend keep what is their own: the scale of attention."""
    ragged = Ragged((37, 3), rig.page)
    flows = [Flow(rig, ragged, HEADS, Attention(scale)) for scale in (0.125, 0.5)]
    for parts in ragged.decode():
        for flow in flows:
            flow.checked_step(f"attend with scale {flow.attention.scale}", parts)


BODIES = (
    zeroed,
    written,
    last_layer,
    copied,
    moved,
    nothing_to_move,
    batching,
    linked,
    exported_then_written,
    fetched_later,
    two_steps,
)

for dtype in ("float32", "bfloat16"):
    for body in BODIES:
        case(f"L2/{body.__name__}", dtype, body)
