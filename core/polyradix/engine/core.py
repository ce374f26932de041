"""The step loop: schedule, launch, harvest. Drives one backend; knows token ids but no text, and no sockets.

On a backend that launches asynchronously two steps are in flight: step N+1 is planned and launched before the tokens of
step N are on the host, and reads them on the device (`HostBatch.from_prev`). Elsewhere a step is harvested at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import DeviceLost, validate
from polyradix.backend.protocol import KV, Array, Backend, HostArray, KVDType, Limits
from polyradix.backend.registry import open_backend
from polyradix.engine.adjust import adjustments
from polyradix.engine.cache import cache_of
from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.forward import Forward, ForwardError, identity
from polyradix.engine.grammars import Gate
from polyradix.engine.limits import Limiter
from polyradix.engine.messages import Chunk, Read, Stats, TokenLogProbs
from polyradix.engine.start import Timeline, largest, prefill, sampling
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.grammar.compiler import LlgCompiler
from polyradix.graph.checkpoint import Checkpoint, load_params, open_checkpoint
from polyradix.graph.dense import make_step
from polyradix.graph.spec import ModelSpec
from polyradix.schedule import jump
from polyradix.schedule.params import InvalidParam, SamplingParams
from polyradix.schedule.plan import Output, Plan
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler, SchedulerConfig

log = logging.getLogger(__name__)
REMEDY = "lower mem_fraction, max_tokens_per_step or max_seqs, or split the model over more devices with tp"


@dataclass
class _Flight:
    plan: Plan
    samples: Array
    tokens: Future[HostArray]
    logprobs: tuple[Future[HostArray], Future[HostArray], Future[HostArray]] | None


class EngineCore:
    """One model on one backend. Not thread-safe: one thread submits, aborts and steps.

    Raises ConfigError, ModelError, CheckpointError, MemoryError or the registry's errors when it cannot be built.
    """

    def __init__(
        self, config: EngineConfig, backend: Backend | None = None, checkpoint: Checkpoint | None = None
    ) -> None:
        config.check()
        self.timeline = Timeline()
        self.backend = backend or open_backend(
            config.device, tp=config.tp, emulate=config.emulate, **config.backend_options
        )
        checkpoint = checkpoint or open_checkpoint(
            config.model, load_format=config.load_format, revision=config.revision
        )
        self.spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
        self.dtype = self.spec.choose_dtype(config.dtype, self.backend.caps.dtypes)
        self.max_context = _max_context(config, self.spec)
        caps = self.backend.caps
        self.page_size = config.page_size or caps.page_sizes[0]
        self.kv_dtype: KVDType = self.dtype if config.kv_dtype == "auto" else config.kv_dtype
        if reasons := validate(self.spec.needs(self.dtype, self.kv_dtype), caps, self.page_size):
            raise ConfigError(f"{config.model} cannot run on {caps.name}: " + "; ".join(map(str, reasons)))
        if uneven := self.spec.uneven_split(self.backend.collectives.size):
            raise ConfigError(uneven)
        budget = config.max_tokens_per_step or caps.step_tokens
        limits = Limits(max(budget, config.max_seqs), config.max_seqs, self.max_context)
        self._cache, self.groups = cache_of(self.spec, caps, self.page_size, self.kv_dtype, self.max_context)
        self.backend.kv_page_bytes(self._cache)  # one that it cannot have is refused before the weights come
        self.timeline.done("open")
        self._params = load_params(
            checkpoint, self.spec, self.dtype, self.backend, max_context=self.max_context, progress=config.progress
        )
        hidden = None
        if config.embeddings:
            hidden = identity(self.backend, self._params, self.spec.hidden, self.dtype)
        self.timeline.done("weights")
        try:
            self._make_cache(config, limits)
        except MemoryError as error:
            raise ConfigError(f"out of memory: {error}; {REMEDY}") from error
        log.info("%s", self.timeline)
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=self.page_size,
                pages=self.pages,
                max_tokens=limits.max_tokens,
                max_seqs=config.max_seqs,
                max_context=self.max_context,
                policy=config.policy,
                radix=config.radix,
                eviction=config.eviction_policy,
                fair=config.fair,
                chunk=config.chunked_prefill_size,
                conservativeness=config.schedule_conservativeness,
                single_rows=bool(caps.decode_sizes),  # such steps may be captured
                groups=self.groups,
            )
        )
        compiler = LlgCompiler(lambda: load_tokenizer(checkpoint), self.spec.vocab, frozenset(self.spec.eos_ids))
        self._gate = Gate(compiler, config.jump_forward)
        self._limits = Limiter(config, self.scheduler, self._gate)
        self._forward = Forward(
            self.backend,
            self.scheduler,
            limits,
            self.spec.vocab,
            (self._step, self._params),
            None
            if hidden is None
            else (self.backend.compile(make_step(replace(self.spec, logits_softcap=None)), limits), hidden),
        )
        self._depth = 2 if caps.async_launch else 1
        self._flights: deque[_Flight] = deque()
        self._seeds = np.random.default_rng(config.seed)
        self._stats = Stats(pages_total=self.pages - 1)
        self.lost = ""  # why the device is gone

    def _make_cache(self, config: EngineConfig, limits: Limits) -> None:
        """Sizes the cache from what is free once the largest step has run, and runs a decode of each size."""
        spec, groups = self._cache, self.groups.count
        self._step = self.backend.compile(make_step(self.spec), limits)
        sizes = self.backend.caps.decode_sizes
        if sizes:
            batch, pages = largest(limits, self.page_size, groups)
            self._kv: KV = self.backend.alloc_kv(spec, pages)
            self._warm(batch, greedy=False)
            self._kv = None
            self.timeline.done("largest step")
        self.pages = self._page_count(config, self.backend.kv_page_bytes(spec))
        self._kv = self.backend.alloc_kv(spec, self.pages)
        self.timeline.done("cache")
        if sizes:
            most = min(limits.max_seqs, (self.pages - 1) // groups)
            todo = sorted({most, *(n for n in sizes if n < most)}, reverse=True)
            for n in tqdm(todo, desc="Warming up", unit="size", disable=None if config.progress else True):
                self._warm(prefill(np.ones(n, np.int64), self.page_size, groups)[0], greedy=True)
            self.timeline.done("decode sizes")

    def _warm(self, batch: HostBatch, greedy: bool) -> None:
        logits, self._kv = self._step(self._params, self._kv, self.backend.prepare(batch))
        self.backend.fetch(self.backend.sample(logits, sampling(batch.num_seqs, greedy))).result()

    def _page_count(self, config: EngineConfig, page_bytes: int) -> int:
        """Pages including the scratch page, from the option or from the free memory, but no more than can be used."""
        groups = self.groups.count
        if config.kv_pages is not None:
            if config.kv_pages <= groups:
                raise ConfigError(f"kv_pages is {config.kv_pages}; expected more than {groups}, the groups of layers")
            return config.kv_pages
        memory = self.backend.memory()
        fraction = config.mem_fraction or self.backend.caps.mem_fraction
        pages = int(memory.free * fraction) // page_bytes
        if pages <= groups:
            raise ConfigError(
                f"mem_fraction {fraction} of {memory.free:,} free bytes holds {pages} KV pages of {page_bytes:,} "
                f"bytes; at least {groups + 1} are needed: free memory, raise mem_fraction or lower page_size"
            )
        return min(pages, -(-self.max_context // self.page_size) * groups * config.max_seqs + 1)

    @property
    def has_work(self) -> bool:
        waiting = self._gate.has_work or self._limits.has_work or self._forward.has_work
        return self.scheduler.has_work or waiting

    def submit(
        self,
        rid: str,
        tokens: np.ndarray,
        params: SamplingParams,
        namespace: str = "",
        *,
        priority: int = 0,
        timeout: float | None = None,
        tenant: str = "",
    ) -> None:
        """Queue a request with prompt `tokens` (int32 [n]). Raises InvalidParam if it can never be served; of one with
        a grammar, `step` may say so later, in a Chunk with `param`. `step` also says when the queue was full, or when
        `timeout` seconds have passed, in a Chunk with `code`."""
        tokens = np.asarray(tokens, np.int32)
        strange = tokens[(tokens < 0) | (tokens >= self.spec.vocab)]
        if len(strange):
            raise InvalidParam("prompt", int(strange[0]), f"token ids from 0 to {self.spec.vocab - 1}")
        seed = int(self._seeds.integers(2**31)) if params.seed is None else params.seed
        eos = frozenset() if params.ignore_eos else frozenset(self.spec.eos_ids)
        self._check_features(params)
        req = Request(rid, tokens, params, eos, namespace, _fold32(seed), priority, tenant)
        self._limits.check(req, timeout)
        with self._limits.room_for(req):
            self._enqueue(req)

    def _enqueue(self, req: Request) -> None:
        params = req.params
        if params.grammar is None:
            return self.scheduler.add(req)
        params.check()
        self._gate.put(req, params.grammar)

    def _check_features(self, params: SamplingParams) -> None:
        """Raises InvalidParam for what the backend cannot do."""
        caps, field, grammar = self.backend.caps, params.adjusting, params.grammar
        if field and "adjust" not in caps.features:
            raise InvalidParam(field, getattr(params, field), f"nothing, as {caps.name} cannot adjust logits")
        if grammar and "mask" not in caps.features:
            raise InvalidParam(grammar.field, grammar.kind, f"none, as {caps.name} has no masks")
        if strange := [i for i in params.logit_bias if not 0 <= i < self.spec.vocab]:
            raise InvalidParam("logit_bias", strange[0], f"token ids from 0 to {self.spec.vocab - 1}")

    def read(self, read: Read) -> None:
        """Queue a forward pass. Raises InvalidParam if it can never be served."""
        self._forward.submit(read)

    def abort(self, rid: str) -> bool:
        """Drop a request; its pages are free as soon as no launched step uses them. False if it is not known."""
        known = self._gate.abort(rid) or self.scheduler.abort(rid) or self._forward.abort(rid)
        self._stats.aborted += known
        return known

    def flush_cache(self) -> None:
        """Forget every cached prefix that no request is using."""
        self.scheduler.flush()

    def step(self) -> list[Chunk]:
        """Launch what can be launched, harvest what must be; returns the new tokens. Call while `has_work`.

        Once the device is lost (`lost` says how), the requests it had are ended and another call raises DeviceLost."""
        if self.lost:
            raise DeviceLost(self.lost)
        begin = time.perf_counter()
        waited = 0.0
        chunks = self._limits.ended() + self._gate.admit(self.scheduler)
        if self._forward.has_work:  # before new requests take the pages
            chunks += self._read()
        while self._flights and jump.expected(self._flights[-1].plan):
            wait, more = self._harvest()
            waited += wait
            chunks += more
        plan = self.scheduler.plan()
        if plan is not None:
            try:
                waited += self._launch(plan, chunks)
            except Exception as error:
                dropped = self._abort_rows(plan, error)
                while self._flights:  # plans are applied in launch order
                    chunks += self._harvest()[1]
                self.scheduler.apply(plan, np.zeros(len(plan.rows), np.int32))
                chunks += dropped
        if self._flights and (plan is None or len(self._flights) >= self._depth):
            wait, more = self._harvest()
            waited += wait
            chunks += more
        elapsed = time.perf_counter() - begin
        self._stats.steps += plan is not None
        self._stats.step_seconds += elapsed
        self._stats.host_seconds += elapsed - waited
        return chunks

    def stats(self) -> Stats:
        """A snapshot; counters are totals since the start."""
        s, now = self.scheduler, self._stats
        now.running, now.waiting, now.retracted = s.running, s.waiting, s.retracted
        now.refused, now.expired = self._limits.refused, self._limits.expired
        now.pages_used, now.pages_cached = s.pages_used, s.pages_cached
        now.prompt_tokens, now.cached_tokens, now.jumped_tokens = s.prompt_tokens, s.cached_tokens, s.jumped_tokens
        return now

    def info(self) -> dict[str, str | int | float | bool]:
        """What /server_info shows."""
        caps = self.backend.caps
        return {
            "backend": caps.name,
            "device": caps.device,
            "emulated": caps.emulated,
            "tp": self.backend.collectives.size,
            "notes": "; ".join(caps.notes),
            "architecture": self.spec.architecture,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "max_context": self.max_context,
            "page_size": self.page_size,
            "kv_pages": self.pages - 1,
            "kv_groups": self.groups.count,
            "batch_invariant": caps.batch_invariant,
            "overlapped": self._depth > 1,
        }

    def _launch(self, plan: Plan, chunks: list[Chunk]) -> float:
        """Seconds waited. A plan with grammars is sampled once the plan before it is applied, which happens, and gives
        `chunks`, while the step runs."""
        prev = self._flights[-1].samples if self._flights else None
        meta = self.backend.prepare(plan.host, prev)
        begin = time.perf_counter()
        logits, self._kv = self._step(self._params, self._kv, meta)
        waited = time.perf_counter() - begin
        sample = plan.sample
        if plan.masked:
            while self._flights:
                wait, more = self._harvest()
                waited += wait
                chunks += more
            sample = self._mask(plan, chunks)
        begin = time.perf_counter()
        samples = self.backend.sample(logits, sample)
        waited += time.perf_counter() - begin
        logprobs = None
        if plan.top_logprobs is not None:
            lp = self.backend.logprobs(logits, samples, plan.top_logprobs)
            logprobs = (self.backend.fetch(lp.chosen), self.backend.fetch(lp.ids), self.backend.fetch(lp.values))
        self._flights.append(_Flight(plan, samples, self.backend.fetch(samples), logprobs))
        return waited

    def _read(self) -> list[Chunk]:
        try:
            self._kv, chunks = self._forward.step(self._kv)
        except ForwardError as error:
            log.error("a forward pass failed", exc_info=error.__cause__)
            if isinstance(error.__cause__, DeviceLost):
                self.lost = str(error.__cause__)
            return error.chunks
        return chunks

    def _mask(self, plan: Plan, chunks: list[Chunk]) -> SampleBatch:
        """With the mask of its grammars, and its adjustments. A request whose grammar fails is ended."""
        begin = time.perf_counter()
        mask, failed = self._gate.masked(plan, self.spec.vocab)
        chunks += [chunk for chunk in failed if self.scheduler.abort(chunk.rid)]
        self._stats.grammar_seconds += time.perf_counter() - begin
        return replace(plan.sample, mask=mask, adjust=adjustments(plan, self.spec.vocab))

    def _harvest(self) -> tuple[float, list[Chunk]]:
        flight = self._flights.popleft()
        begin = time.perf_counter()
        try:
            tokens = flight.tokens.result()
            logprobs = None
            if flight.logprobs is not None:
                chosen, ids, values = flight.logprobs
                logprobs = (chosen.result(), ids.result(), values.result())
        except Exception as error:
            dropped = self._abort_rows(flight.plan, error)
            self.scheduler.apply(flight.plan, np.zeros(len(flight.plan.rows), np.int32))
            while self.lost and self._flights:
                dropped += self._harvest()[1]
            return time.perf_counter() - begin, dropped
        waited = time.perf_counter() - begin
        outputs = self.scheduler.apply(flight.plan, tokens, logprobs)
        self._stats.output_tokens += sum(len(o.tokens) for o in outputs)
        self._stats.finished += sum(o.finish is not None for o in outputs)
        return waited, [_chunk(o) for o in outputs]

    def _abort_rows(self, plan: Plan, error: Exception) -> list[Chunk]:
        """Ends the requests of a step that raised, and logs it, of a lost device only the first time. The plan must
        still be applied, for the books."""
        if not self.lost:
            batch = plan.host.num_tokens, plan.host.num_seqs, self._stats.steps
            log.error("a step of %d tokens and %d requests failed, after %d steps", *batch, exc_info=error)
        if isinstance(error, DeviceLost):
            self.lost = str(error)
        rids = [r.rid for r in plan.rows if self.scheduler.abort(r.rid)]
        text = f"{type(error).__name__}: {error}" + (f"; {REMEDY}" if isinstance(error, MemoryError) else "")
        return [Chunk(rid=rid, tokens=[], finish="error", error=text) for rid in rids]


def _max_context(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_context is not None and config.max_context > spec.max_position:
        raise ConfigError(f"max_context is {config.max_context}; the model was made for {spec.max_position} at most")
    return config.max_context or spec.max_position


def _fold32(seed: int) -> int:
    """A 64-bit seed as a signed 32-bit one: both halves count."""
    seed = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return seed - (1 << 32) if seed >= 1 << 31 else seed


def _chunk(o: Output) -> Chunk:
    logprobs = None
    if o.logprobs is not None:
        logprobs = [TokenLogProbs(logprob, top) for logprob, top in o.logprobs]
    return Chunk(
        rid=o.req.rid,
        tokens=o.tokens,
        logprobs=logprobs,
        finish=o.finish,
        stop_token=o.stop_token,
        prompt_tokens=len(o.req.prompt),
        cached_tokens=o.req.cached_tokens,
        queue_seconds=o.req.queue_seconds,
    )
