"""What the step loop does about grammars: requests wait for theirs to be compiled, and rows get their masks."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait

import numpy as np

from polyradix.backend.batch import I32
from polyradix.engine.messages import Chunk
from polyradix.grammar.spec import Compiler, Grammar, GrammarError, GrammarSpec
from polyradix.schedule.params import InvalidParam
from polyradix.schedule.plan import Plan
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler

IDLE_SECONDS = 0.02  # how long a loop with nothing else to do waits for a grammar before it looks for messages again


class Gate:
    """Requests whose grammar is not compiled yet. They join the scheduler's queue when it is."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._waiting: dict[str, tuple[Request, GrammarSpec, Future[Grammar]]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def put(self, req: Request, spec: GrammarSpec) -> None:
        """Raises InvalidParam for an id that waits here already."""
        if req.rid in self._waiting:
            raise InvalidParam("rid", req.rid, "an id that is not in use")
        self._waiting[req.rid] = req, spec, self._compiler.compile(spec)

    def abort(self, rid: str) -> bool:
        return self._waiting.pop(rid, None) is not None

    def admit(self, scheduler: Scheduler) -> list[Chunk]:
        """Moves on what is ready; gives the last chunks of those that are refused. Waits only if nothing else runs."""
        if not self._waiting:
            return []
        if not scheduler.has_work:
            wait([work for _, _, work in self._waiting.values()], IDLE_SECONDS, FIRST_COMPLETED)
        refused: list[Chunk] = []
        for rid, (req, spec, work) in list(self._waiting.items()):
            if work.done():
                del self._waiting[rid]
                refused += _admit(scheduler, req, spec, work)
        return refused


def _admit(scheduler: Scheduler, req: Request, spec: GrammarSpec, work: Future[Grammar]) -> list[Chunk]:
    try:
        req.matcher = work.result().matcher()
        scheduler.add(req)
    except GrammarError as error:
        return [_refusal(req.rid, spec, error)]
    except InvalidParam as error:
        return [Chunk(rid=req.rid, tokens=[], finish="error", error=str(error), param=error.param)]
    return []


def _refusal(rid: str, spec: GrammarSpec, error: GrammarError) -> Chunk:
    return Chunk(rid=rid, tokens=[], finish="error", error=f"{spec.field} cannot be used: {error}", param=spec.field)


def masked(plan: Plan, vocab: int) -> tuple[I32 | None, list[Chunk]]:
    """The mask of a plan, i32[S, ceil(vocab/32)], all ones for rows without a grammar, None if all are; and the last
    chunks of requests whose grammar can go no further. All earlier plans are applied."""
    choosing = plan.choosing()
    if not choosing:
        return None, []
    mask = np.full((len(plan.rows), -(-vocab // 32)), -1, np.int32)
    failed: list[Chunk] = []
    for row, req, matcher in choosing:
        try:
            matcher.fill(mask[row])
        except GrammarError as error:
            assert req.params.grammar is not None
            mask[row] = -1
            failed.append(_refusal(req.rid, req.params.grammar, error))
    return mask, failed
