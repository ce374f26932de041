"""Penalties, biases and minimum lengths, as changes to the logits of a step's rows."""

from __future__ import annotations

import numpy as np

from polyradix.backend.batch import F32, I32, Adjust
from polyradix.schedule.plan import Plan
from polyradix.schedule.request import Request

BAN = -1e30  # finite: a token that a mask removes stays less likely still


def adjustments(plan: Plan, vocab: int) -> Adjust | None:
    """Of the rows that sample and want any. All earlier plans are applied."""
    rows = [(row, *_of(req, vocab)) for row, req in plan.sampling() if req.params.adjusting]
    if not any(len(ids) for _, ids, _, _ in rows):
        return None
    row = np.repeat(np.array([r for r, *_ in rows], np.int32), [len(ids) for _, ids, _, _ in rows])
    return Adjust(row, *(np.concatenate(parts) for parts in list(zip(*rows, strict=True))[1:]))


def _of(req: Request, vocab: int) -> tuple[I32, F32, F32]:
    """Ids, factors and sums. Penalties are vLLM's: of the prompt, only repetition counts it."""
    p, tokens = req.params, req.tokens()
    start = len(req.prompt)
    said, counts = np.unique(tokens[start:], return_counts=True)
    sums = [(said, -(p.frequency_penalty * counts + p.presence_penalty))]
    sums.append((np.array(list(p.logit_bias), np.int32), np.array(list(p.logit_bias.values()), np.float64)))
    if len(tokens) - start < p.min_tokens:
        ends = np.array([i for i in req.stops if i < vocab], np.int32)
        sums.append((ends, np.full(len(ends), BAN)))
    seen = np.unique(tokens) if p.repetition_penalty != 1 else tokens[:0]
    ids, at = np.unique(np.concatenate([seen, *(i for i, _ in sums)]), return_inverse=True)
    factor = np.ones(len(ids), np.float32)
    factor[at[: len(seen)]] = p.repetition_penalty
    values = np.concatenate([np.zeros(len(seen)), *(v for _, v in sums)])
    add = np.bincount(at, values, len(ids)) if len(ids) else values
    return ids.astype(np.int32), factor, add.astype(np.float32)
