"""Host cost of one scheduler step, plan and apply, with nothing to compute: decode, and admission of shared prefixes.

Usage: python bench/scheduler.py [--steps 400]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from polyradix.schedule.params import SamplingParams
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler, SchedulerConfig


def decode_ms(seqs: int, steps: int, depth: int, page_size: int = 16) -> float:
    """Median milliseconds of plan + apply: `seqs` requests of 300 prompt tokens decode, `depth` plans in flight."""
    s = Scheduler(SchedulerConfig(page_size, 20_000, 4096, seqs, 2048))
    rng = np.random.default_rng(0)
    for i in range(seqs):
        s.add(Request(str(i), rng.integers(0, 50_000, 300).astype(np.int32), SamplingParams(max_tokens=steps + 100)))
    samples = np.arange(seqs, dtype=np.int32) + 7
    flights, times = [], []
    while len(times) < steps:
        begin = time.perf_counter()
        plan = s.plan()
        assert plan is not None
        flights.append(plan)
        if len(flights) == depth:
            done = flights.pop(0)
            s.apply(done, samples[: len(done.rows)])
        if s.waiting == 0 and plan.host.num_tokens == seqs:
            times.append(time.perf_counter() - begin)
    return float(np.median(times)) * 1e3


def shared_prefix(requests: int, shared: int, own: int) -> tuple[int, float]:
    """Prefill tokens, and host ms a step, for `requests` that share `shared` tokens and have `own` of their own."""
    s = Scheduler(SchedulerConfig(16, 20_000, 2048, requests, 4096))
    rng = np.random.default_rng(0)
    head = rng.integers(0, 50_000, shared)
    for i in range(requests):
        prompt = np.concatenate((head, rng.integers(0, 50_000, own))).astype(np.int32)
        s.add(Request(str(i), prompt, SamplingParams(max_tokens=1)))
    tokens, steps, begin = 0, 0, time.perf_counter()
    while (plan := s.plan()) is not None:
        s.apply(plan, np.zeros(len(plan.rows), np.int32))
        tokens, steps = tokens + plan.host.num_tokens, steps + 1
    return tokens, (time.perf_counter() - begin) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    for seqs in (1, 16, 64):
        plain, overlapped = decode_ms(seqs, steps, 1), decode_ms(seqs, steps, 2)
        print(f"decode, {seqs:2} running: {plain:.3f} ms a step, {overlapped:.3f} ms overlapped")
    tokens, ms = shared_prefix(64, 1024, 32)
    print(f"64 requests sharing 1,024 of 1,056 tokens: {tokens:,} of {64 * 1056:,} prefilled, {ms:.3f} ms a step")


if __name__ == "__main__":
    main()
