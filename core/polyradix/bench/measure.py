"""Runs talks against anything that streams, and what the times say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from polyradix.bench.workload import Talk

Message = dict[str, str]


@dataclass
class Event:
    """Text as it arrives, if it `arrived`: counts may come on their own. Their sums are the request's."""

    text: str = ""
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    arrived: bool = False


# Answers one turn: the talk, and its messages so far when it has turns.
Ask = Callable[[Talk, list[Message]], AsyncIterator[Event]]


@dataclass
class Sample:
    """One request, in seconds. `itl` are the times between two arrivals, which may bring more than one token."""

    start: float
    ttft: float = 0.0
    seconds: float = 0.0
    itl: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def per_token(self) -> float:
        """The mean time of a token after the first."""
        return (self.seconds - self.ttft) / max(1, self.output_tokens - 1)


@dataclass(frozen=True)
class Slo:
    """Seconds, None is no demand, for the first token and for the mean time of each one after it."""

    ttft: float | None = None
    itl: float | None = None

    def met(self, s: Sample) -> bool:
        return (self.ttft is None or s.ttft <= self.ttft) and (self.itl is None or s.per_token <= self.itl)


async def run(ask: Ask, work: Sequence[Talk], concurrency: int, rate: float | None, seed: int) -> list[Sample]:
    """All talks, `concurrency` at once; with a `rate` they arrive as a Poisson process, talks a second."""
    gate, samples = asyncio.Semaphore(concurrency), list[Sample]()
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(work)) if rate else np.zeros(len(work))
    with tqdm(total=sum(max(1, len(t.turns)) for t in work), unit="request") as bar:

        async def one(talk: Talk, at: float) -> None:
            await asyncio.sleep(at)
            async with gate:
                messages: list[Message] = []
                for turn in talk.turns or [""]:
                    if talk.turns:
                        messages.append({"role": "user", "content": turn})
                    sample, text = await _turn(ask, talk, messages)
                    samples.append(sample)
                    messages.append({"role": "assistant", "content": text})
                    bar.update()

        await asyncio.gather(*(one(talk, at) for talk, at in zip(work, np.cumsum(gaps), strict=True)))
    return samples


async def _turn(ask: Ask, talk: Talk, messages: list[Message]) -> tuple[Sample, str]:
    begin = last = time.perf_counter()
    sample, text = Sample(begin), ""
    try:
        async for event in ask(talk, messages):
            now = time.perf_counter()
            if event.arrived:
                if sample.ttft:
                    sample.itl.append(now - last)
                else:
                    sample.ttft = now - begin
                last = now
                text += event.text
            sample.output_tokens += event.output_tokens
            sample.prompt_tokens += event.prompt_tokens
            sample.cached_tokens += event.cached_tokens
    except (OSError, RuntimeError, ValueError) as error:  # a failed request is a result
        sample.error = f"{type(error).__name__}: {error}"
    sample.seconds = last - begin
    return sample, text


def summary(samples: Sequence[Sample], slo: Slo) -> dict[str, Any]:
    """Rates are a second, from the first submission to the last token; times are milliseconds."""
    good = [s for s in samples if not s.error]
    span = max((s.start + s.seconds for s in good), default=0.0) - min((s.start for s in samples), default=0.0)
    rate = 1 / span if span > 0 else 0.0
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "seconds": round(max(span, 0.0), 3),
        "requests_per_s": round(len(good) * rate, 3),
        "input_tokens_per_s": round(sum(s.prompt_tokens for s in good) * rate, 1),
        "output_tokens_per_s": round(sum(s.output_tokens for s in good) * rate, 1),
        "goodput_requests_per_s": round(sum(map(slo.met, good)) * rate, 3),
        "slo": asdict(slo),
        "input_tokens": sum(s.prompt_tokens for s in good),
        "output_tokens": sum(s.output_tokens for s in good),
        "cached_tokens": sum(s.cached_tokens for s in good),
        "ttft_ms": _spread([s.ttft for s in good]),
        "itl_ms": _spread([t for s in good for t in s.itl]),
        "per_token_ms": _spread([s.per_token for s in good if s.output_tokens > 1]),
        "request_ms": _spread([s.seconds for s in good]),
        "first_error": next((s.error for s in samples if s.error), None),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ms = 1000 * np.array(seconds)
    parts = {f"p{p}": float(np.percentile(ms, p)) for p in (50, 90, 99)}
    return {name: round(value, 3) for name, value in ({"mean": float(ms.mean())} | parts).items()}
