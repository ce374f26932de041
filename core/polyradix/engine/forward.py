"""Forward passes beside the scheduler, for embeddings and for the logprobs of a prompt. Nothing is sampled or shared.

A token whose own result is wanted is a row of its own: a prompt of n tokens is n rows of one token, on the same pages.
`attend` writes a whole batch before it reads, so this needs no verb of its own, and the logits stay [max_seqs,V]. A
prompt's logprobs come from sampling under a mask that allows one token, the one that follows. Hidden states leave the
device through `logits` with the identity as its weight. See docs/decisions/009-embeddings.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from polyradix.backend.batch import F32, I32, HostBatch, SampleBatch, Table
from polyradix.backend.protocol import HOST_DTYPES, KV, Backend, Compiled, DType, HostArray, Limits, Params, ParamSpec
from polyradix.engine.messages import Chunk, Read, TokenLogProbs
from polyradix.engine.start import sampling
from polyradix.schedule.params import InvalidParam
from polyradix.schedule.scheduler import Scheduler


@dataclass
class Job:
    """`tokens` is what has to be computed, `done` of it is."""

    read: Read
    prompt: I32
    tokens: I32
    pages: list[int] = field(default_factory=list)
    done: int = 0
    total: F32 | None = None  # [H], of the rows so far, or the last row
    logprobs: list[TokenLogProbs] = field(default_factory=list)

    @property
    def each(self) -> bool:
        """Whether every token is a row."""
        return self.read.want != "last"

    def chunk(self) -> Chunk:
        """Embeddings have length 1."""
        out = Chunk(self.read.rid, [], finish="stop", prompt_tokens=len(self.prompt))
        if self.read.want == "logprobs":
            out.logprobs = self.logprobs
        elif self.total is not None:
            out.embedding = (self.total / max(float(np.linalg.norm(self.total)), 1e-12)).astype("<f4").tobytes()
        return out


Part = tuple[Job, int, int]  # a row: tokens from, and how many


def identity(backend: Backend, params: Params, hidden: int, dtype: DType) -> Params:
    """`params` with the identity [H,H] as the logits weight: a step then returns hidden states [S,H] float32."""
    spec = ParamSpec("logits", "logits", (hidden, hidden), dtype, shard_axis=0)
    one: HostArray = np.eye(hidden, dtype=HOST_DTYPES[dtype])
    return Params(params.top | {"logits": backend.pack(spec, lambda part="weight": one)}, params.layers)


class Forward:
    """`hidden` is (step, params) of `identity`, None when embeddings are off."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        limits: Limits,
        vocab: int,
        logits: tuple[Compiled, Params],
        hidden: tuple[Compiled, Params] | None,
    ) -> None:
        self._backend, self._scheduler, self._limits, self._vocab = backend, scheduler, limits, vocab
        self._logits, self._hidden = logits, hidden
        self._jobs: list[Job] = []

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def submit(self, read: Read) -> None:
        """Raises InvalidParam if it can never be served."""
        tokens = np.frombuffer(read.tokens, "<i4").astype(np.int32)
        most = min(self._limits.max_context, self._scheduler.capacity)
        if not 1 <= len(tokens) <= most:
            raise InvalidParam("prompt", f"{len(tokens)} tokens", f"1 to {most}, the context and the KV cache")
        if ((tokens < 0) | (tokens >= self._vocab)).any():
            raise InvalidParam("prompt", "outside the vocabulary", f"token ids from 0 to {self._vocab - 1}")
        if read.want == "logprobs" and "mask" not in self._backend.caps.features:
            raise InvalidParam("prompt_logprobs", read.top, f"none, as {self._backend.caps.name} has no masks")
        if read.want != "logprobs" and self._hidden is None:
            raise InvalidParam("input", "a text", "a server started with --embeddings")
        self._jobs.append(Job(read, tokens, tokens[:-1] if read.want == "logprobs" else tokens))

    def abort(self, rid: str) -> bool:
        found = [job for job in self._jobs if job.read.rid == rid]
        for job in found:
            self._end(job)
        return bool(found)

    def step(self, kv: KV) -> tuple[KV, list[Chunk]]:
        """One batch, waited for; the chunks of what it finished. A failure ends the jobs of the batch and is raised as
        ForwardError, which has their chunks."""
        parts = self._parts()
        jobs = list({id(job): job for job, _, _ in parts}.values())
        try:
            if parts:
                kv = self._run(kv, parts)
        except Exception as error:
            for job in jobs:
                self._end(job)
            text = f"{type(error).__name__}: {error}"
            raise ForwardError([Chunk(j.read.rid, [], finish="error", error=text) for j in jobs]) from error
        ended = [job for job in self._jobs if job.done == len(job.tokens)]
        for job in ended:
            self._end(job)
        return kv, [job.chunk() for job in ended]

    def _end(self, job: Job) -> None:
        self._jobs.remove(job)
        self._scheduler.give_back(job.pages)

    def _parts(self) -> list[Part]:
        """Rows for one batch, of jobs that want the same, in order of arrival."""
        parts: list[Part] = []
        tokens = self._limits.max_tokens
        for job in self._jobs:
            rows = self._limits.max_seqs - len(parts)
            if not (rows and tokens):
                break
            if (job.read.want == "logprobs") != (self._jobs[0].read.want == "logprobs"):
                continue
            if not job.pages:
                pages = self._scheduler.lend(len(job.tokens))
                if pages is None:
                    break
                job.pages = pages
            n = min(len(job.tokens) - job.done, tokens, rows if job.each else tokens)
            parts += [(job, job.done + i, 1) for i in range(n)] if job.each else [(job, job.done, n)]
            tokens -= n
        return parts

    def _run(self, kv: KV, parts: list[Part]) -> KV:
        batch = _batch(parts, self._scheduler.config.page_size, self._scheduler.config.groups.count)
        if parts[0][0].read.want == "logprobs":
            step, params = self._logits
            logits, kv = step(params, kv, self._backend.prepare(batch))
            self._score(parts, batch, logits)
        else:
            assert self._hidden is not None
            step, params = self._hidden
            rows, kv = step(params, kv, self._backend.prepare(batch))
            for (job, _, _), row in zip(parts, self._backend.fetch(rows).result(), strict=True):
                job.total = row if job.total is None or not job.each else job.total + row
        for job, start, n in parts:
            job.done = start + n
        return kv

    def _score(self, parts: list[Part], batch: HostBatch, logits: object) -> None:
        following = np.array([job.prompt[start + 1] for job, start, _ in parts])
        tokens = self._backend.sample(logits, _forced(following, self._vocab))
        found = self._backend.logprobs(logits, tokens, max(job.read.top for job, _, _ in parts))
        arrays = [self._backend.fetch(x) for x in (found.chosen, found.ids, found.values)]
        chosen, ids, values = (x.result().tolist() for x in arrays)
        for row, (job, _, _) in enumerate(parts):
            top = list(zip(ids[row], values[row], strict=True))[: job.read.top]
            job.logprobs.append(TokenLogProbs(chosen[row], top))


class ForwardError(Exception):
    """A batch failed; `chunks` end its requests. The cause says why."""

    def __init__(self, chunks: list[Chunk]) -> None:
        super().__init__("a forward pass failed")
        self.chunks = chunks


def _forced(tokens: np.ndarray, vocab: int) -> SampleBatch:
    """Rows that can give these tokens [S] and no others."""
    mask = np.zeros((len(tokens), -(-vocab // 32)), np.uint32)
    mask[np.arange(len(tokens)), tokens // 32] = np.uint32(1) << (tokens % 32).astype(np.uint32)
    return replace(sampling(len(tokens), greedy=True), mask=mask.view(np.int32))


def _batch(parts: list[Part], size: int, groups: int) -> HostBatch:
    counts = np.array([n for _, _, n in parts])
    starts = np.array([start for _, start, _ in parts])
    cu_q = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(len(parts)), counts)
    positions = np.arange(cu_q[-1]) + (starts - cu_q[:-1])[row]
    kv_len = starts + counts
    pages = np.zeros((groups, len(parts), -(-int(kv_len.max()) // size)), np.int32)
    for i, (job, _, _) in enumerate(parts):
        used = -(-int(kv_len[i]) // size)
        pages[:, i, :used] = np.reshape(job.pages[: used * groups], (used, groups)).T
    tokens = np.concatenate([job.tokens[start : start + n] for job, start, n in parts])
    slots = (pages[:, row, positions // size] * size + positions % size).astype(np.int32)
    arrays = (tokens, positions, slots[0], cu_q, kv_len, pages[0], cu_q[1:] - 1, np.full(len(tokens), -1))
    others = tuple(map(Table, slots[1:], pages[1:]))
    return HostBatch(*(np.ascontiguousarray(x, np.int32) for x in arrays), others=others)
