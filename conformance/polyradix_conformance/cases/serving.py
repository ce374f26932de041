"""L4: the engine on the backend under test. However requests are batched, cut, cached, preempted or overlapped, their
answers stay: the same bits where the backend claims batch invariance, else the same up to rounding.

Greedy answers are also those of the golden model, so that no case passes on answers that are merely consistent. What a
backend without batch invariance samples at a temperature is not compared: any rounding may change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from polyradix.backend.batch import SampleBatch
from polyradix.backend.capabilities import Unsupported, validate
from polyradix.backend.protocol import KVSpec
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams
from polyradix_conformance.cases import case
from polyradix_conformance.cases.graph import best
from polyradix_conformance.flow import poison
from polyradix_conformance.golden import Golden, Rows, load
from polyradix_conformance.oracle import EXACT, Arr, logprobs
from polyradix_conformance.rig import Mismatch, Rig, same
from polyradix_conformance.tolerance import K

MODEL = "smollm"  # needs no optional feature
CONTEXT = 512
TOKENS = 12
SHARED = 3  # tokens that two prompts share after a whole page
SOME = ("golden 1", "golden 3", "golden 4", "sampled 4", "long", "sampled fork")  # of all_jobs, to be run alone
Allow = Callable[[int], Arr]  # the bits of one position: bool [V]


@dataclass
class Answer:
    """Tokens and, where the backend has logprobs, each one's logprob and the lead of the best token over the next."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    cached: int = 0


@dataclass(frozen=True)
class Job:
    prompt: Arr
    params: SamplingParams


class Guarded:
    """The backend as the engine gets it: a poisoned cache and, if asked for, another launch mode or a mask."""

    def __init__(self, backend: Any, overlapped: bool | None, allow: Allow | None) -> None:
        self._backend, self._allow = backend, allow
        self.caps = backend.caps if overlapped is None else replace(backend.caps, async_launch=overlapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def alloc_kv(self, spec: KVSpec, pages: int) -> Any:
        kv = self._backend.alloc_kv(spec, pages)
        return self._backend.import_pages(kv, range(pages), poison(spec, pages))

    def sample(self, logits: Any, batch: SampleBatch) -> Any:
        if self._allow is not None:
            bits = np.packbits([self._allow(p) for p in batch.position.tolist()], axis=1, bitorder="little")
            bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4)))
            batch = replace(batch, mask=bits.view(np.int32))
        return self._backend.sample(logits, batch)


class Server:
    """An engine with the golden model. Options are EngineConfig's."""

    def __init__(self, rig: Rig, overlapped: bool | None = None, allow: Allow | None = None, **options: Any) -> None:
        caps, golden = rig.backend.caps, load(MODEL)
        if reasons := validate(golden.spec.needs(rig.dtype), caps, rig.page):
            raise Unsupported("model", "; ".join(map(str, reasons)))
        self.rig, self.golden, self.logprobs = rig, golden, "logprobs" in caps.features
        given: dict[str, Any] = {
            "max_seqs": 8,
            "max_tokens_per_step": 256,
            "kv_pages": 8 * -(-CONTEXT // rig.page) + 1,
        }
        config = EngineConfig(
            model=golden.name,
            dtype=rig.dtype,
            max_context=CONTEXT,
            page_size=rig.page,
            progress=False,
            **given | options,
        )
        backend: Any = Guarded(rig.backend, overlapped, allow)
        self.core = EngineCore(config, backend, golden.checkpoint())
        self.answers: dict[str, Answer] = {}

    def submit(self, rid: str, job: Job) -> None:
        params = job.params
        if self.logprobs:
            params = SamplingParams(**{f: getattr(params, f) for f in params.__struct_fields__} | {"logprobs": 2})
        self.answers[rid] = Answer()
        self.core.submit(rid, job.prompt, params)

    def step(self) -> None:
        for chunk in self.core.step():
            if chunk.error:
                raise Unsupported(chunk.error) if chunk.error.startswith("Unsupported") else RuntimeError(chunk.error)
            answer = self.answers[chunk.rid]
            answer.tokens += chunk.tokens
            answer.cached = chunk.cached_tokens
            for t in chunk.logprobs or []:
                answer.logprobs.append(t.logprob)
                answer.leads.append(t.top[0][1] - t.top[1][1])
        self.core.scheduler.check()

    def finish(self) -> dict[str, Answer]:
        """Runs until nothing is left; no request may still hold a page."""
        while self.core.has_work:
            self.step()
        used = self.core.stats().pages_used
        if used:
            raise RuntimeError(f"{used} pages are in use after the last request")
        out, self.answers = self.answers, {}
        return out

    def serve(self, jobs: dict[str, Job]) -> dict[str, Answer]:
        """All together."""
        for rid, job in jobs.items():
            self.submit(rid, job)
        return self.finish()


def greedy(prompt: Arr, n: int = TOKENS) -> Job:
    return Job(prompt, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))


def sampled(prompt: Arr, seed: int, n: int = TOKENS) -> Job:
    params = SamplingParams(max_tokens=n, temperature=0.9, top_p=0.95, top_k=60, min_p=0.01, seed=seed, ignore_eos=True)
    return Job(prompt, params)


def golden_jobs(g: Golden, n: int = TOKENS) -> dict[str, Job]:
    return {f"golden {s}": greedy(g.sequences[s][:stop], n) for s, stop in enumerate(g.prompts)}


def all_jobs(rig: Rig) -> dict[str, Job]:
    """The golden prompts, greedy and sampled, and two long ones that share a page and a bit."""
    g, page = load(MODEL), rig.page
    prompts = [g.sequences[s][:stop] for s, stop in enumerate(g.prompts)]
    long = np.resize(np.concatenate(prompts), 2 * page + 5)
    fork = np.concatenate([long[: page + SHARED], prompts[2]])
    jobs = golden_jobs(g) | {f"sampled {s}": sampled(prompts[s], seed=s * 7 - 10) for s in (0, 2, 4)}
    return jobs | {"long": greedy(long), "fork": greedy(fork), "sampled fork": sampled(fork, seed=1 << 31)}


def reference(rig: Rig, jobs: dict[str, Job], **options: Any) -> dict[str, Answer]:
    """Answers without a prefix cache and with pages for all, the golden ones checked."""
    got = Server(rig, radix=False, **options).serve(jobs)
    g = load(MODEL)
    for s in range(len(g.prompts)):
        by_model(rig, f"golden {s} against transformers", got[f"golden {s}"], *g.greedy(s))
    return got


def by_model(rig: Rig, what: str, got: Answer, want: list[int], truth: Rows) -> None:
    """Up to the first token that rounding may have changed, tokens and logprobs are the golden model's."""
    different = [i for i, (a, b) in enumerate(zip(got.tokens, want, strict=False)) if a != b]
    seen = slice(0, min([len(want), *(i + 1 for i in different)]))
    tokens, truth = np.array(got.tokens[seen]), truth[seen]
    best(what, tokens, truth, rig.dtype)
    if got.logprobs:
        logs = np.take_along_axis(logprobs(EXACT, truth.logits), tokens[:, None], axis=1)
        rig.close(f"{what}: logprobs", np.array(got.logprobs[seen])[:, None], logs, 2 * truth.floors[rig.dtype])


def near(what: str, got: Answer, want: Answer, bound: float) -> None:
    """Equal tokens and logprobs within `bound`, up to the first token that rounding may have changed."""
    for i, (token, expected, lead) in enumerate(zip(got.tokens, want.tokens, want.leads, strict=False)):
        if token != expected:
            if lead > bound:
                raise Mismatch(f"{what}: token {i} is {token}; expected {expected}, which leads by {lead:.3g}")
            return
        if got.logprobs and not abs(got.logprobs[i] - want.logprobs[i]) <= bound:
            raise Mismatch(
                f"{what}: logprob {i} is {got.logprobs[i]:.6g}; expected {want.logprobs[i]:.6g} within {bound:.3g}"
            )


def agree(rig: Rig, what: str, got: dict[str, Answer], want: dict[str, Answer], jobs: dict[str, Job]) -> None:
    """Every answer in `got` is that in `want`."""
    for rid, answer in got.items():
        title = f"{rid}, {what}"
        same(f"{title}: number of tokens", [len(answer.tokens)], [jobs[rid].params.max_tokens])
        if rig.backend.caps.batch_invariant:
            same(f"{title}: tokens", answer.tokens, want[rid].tokens)
            same(f"{title}: logprobs", answer.logprobs, want[rid].logprobs)
        elif jobs[rid].params.temperature == 0:
            near(title, answer, want[rid], 4 * K * load(MODEL).rows.floors[rig.dtype].max())


def alone(server: Server, jobs: dict[str, Job], rids: Iterable[str]) -> dict[str, Answer]:
    """One after the other."""
    return {rid: server.serve({rid: jobs[rid]})[rid] for rid in rids}


def hit(rig: Rig) -> None:
    """A prefix hit, whole or in part, gives what a miss gives."""
    jobs = all_jobs(rig)
    want, server = reference(rig, jobs), Server(rig)
    agree(rig, "first time", alone(server, jobs, SOME), want, jobs)
    again = alone(server, jobs, SOME)
    agree(rig, "second time", again, want, jobs)
    whole = [(len(jobs[rid].prompt) - 1) // rig.page * rig.page for rid in SOME]
    same("cached tokens the second time", [a.cached for a in again.values()], whole)
    server.core.flush_cache()
    part = alone(server, jobs, ["long", "fork"])
    agree(rig, "after a common prefix", part, want, jobs)
    same("cached tokens of the common prefix", [part["fork"].cached], [(rig.page + SHARED) // rig.page * rig.page])


def chunked(rig: Rig) -> None:
    """Prompts cut by a small budget, among decodes, give what whole ones give."""
    jobs = all_jobs(rig)
    server = Server(rig, max_seqs=4, max_tokens_per_step=7, radix=False)
    agree(rig, "in chunks of 7 at most", server.serve(jobs), reference(rig, jobs), jobs)


def preempted(rig: Rig) -> None:
    """With too few pages requests are put back and resume; nothing of it shows."""
    tokens, g = max(2 * rig.page, 24) + 4, load(MODEL)
    jobs = golden_jobs(g, tokens) | {"sampled": sampled(g.sequences[2], 5, tokens)}
    most = max(len(job.prompt) for job in jobs.values()) + tokens
    want = reference(rig, jobs)
    for radix in (True, False):
        server = Server(rig, radix=radix, kv_pages=-(-most // rig.page) + 3)
        agree(rig, f"preempted, radix {radix}", server.serve(jobs), want, jobs)
        if not server.core.stats().retracted:
            raise RuntimeError("nothing was preempted; expected too few pages")


def reordered(rig: Rig) -> None:
    """Another order of arrival, one at a time while others decode, gives the same answers."""
    jobs = all_jobs(rig)
    server = Server(rig, radix=False)
    for rid in reversed(jobs):
        server.submit(rid, jobs[rid])
        server.step()
    agree(rig, "arriving in reverse", server.finish(), reference(rig, jobs), jobs)


def overlapped(rig: Rig) -> None:
    """Two steps in flight, tokens passed on the device, give what one step at a time gives."""
    jobs = all_jobs(rig)
    want = reference(rig, jobs, overlapped=False)
    agree(rig, "overlapped", Server(rig, overlapped=True).serve(jobs), want, jobs)


def radix(rig: Rig) -> None:
    """Requests that come together share prefixes, and twice: the same answers as without a prefix cache."""
    jobs = all_jobs(rig)
    want, server = reference(rig, jobs), Server(rig, max_seqs=4)
    for time in ("first", "second"):
        agree(rig, f"radix on, {time} time", server.serve(jobs), want, jobs)
    if not server.core.stats().cached_tokens:
        raise RuntimeError("no prefix was shared")


def cancelled(rig: Rig) -> None:
    """Cancelling requests that wait, prefill and decode leaves the others' answers, and every page comes back."""
    jobs = all_jobs(rig)
    want, server = reference(rig, jobs), Server(rig, max_seqs=4, max_tokens_per_step=16)
    for rid in jobs:
        server.submit(rid, jobs[rid])
    gone = set()
    for rid in list(jobs)[1::3]:
        for _ in range(3):
            server.step()
        if server.core.abort(rid):
            gone.add(rid)
            del server.answers[rid]
    if len(gone) < 3:
        raise RuntimeError(f"only {len(gone)} requests were there to be cancelled")
    agree(rig, "others cancelled", server.finish(), want, jobs)
    server.core.flush_cache()
    same("pages in the cache after a flush", [server.core.stats().pages_cached], [0])


def masked(rig: Rig) -> None:
    """A mask that changes with the position, as a grammar's does, holds at every step, alone and in company."""
    jobs = all_jobs(rig)
    reference(rig, jobs)
    ids = np.arange(load(MODEL).spec.vocab)

    def allow(position: int) -> Arr:
        out: Arr = ids % 5 == position % 5
        return out

    want = Server(rig, allow=allow, max_seqs=4).serve(jobs)
    for rid, answer in want.items():
        positions = len(jobs[rid].prompt) + np.arange(len(answer.tokens))
        same(f"{rid}: token ids modulo 5 under the mask", np.array(answer.tokens) % 5, positions % 5)
    agree(rig, "masked and alone", alone(Server(rig, allow=allow), jobs, SOME), want, jobs)


for dtype in ("float32", "bfloat16"):
    for body in (hit, chunked, preempted, reordered, overlapped, radix, cancelled):
        case(f"L4/{body.__name__}", dtype, body)
    case("L4/masked", dtype, masked, features=("mask",))
