"""Processor time of one scheduler step, plan and apply, with nothing to compute: decode, and admission of shared
prefixes.

Usage: python bench/scheduler.py [--steps 400] [--times 1]
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from typing import Any

import numpy as np

from polyradix.schedule.params import SamplingParams
from polyradix.schedule.plan import Plan
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler, SchedulerConfig


def decode_ms(seqs: int, steps: int, depth: int, waiting: int = 0, **options: Any) -> float:
    """Median milliseconds of plan + apply: `seqs` requests of 300 prompt tokens decode, `depth` plans in flight, and
    others wait for their rows."""
    s = Scheduler(SchedulerConfig(16, 40_000, 4096, seqs, 2048, **options))
    rng = np.random.default_rng(0)
    for i in range(seqs + waiting):
        s.add(Request(str(i), rng.integers(0, 50_000, 300).astype(np.int32), SamplingParams(max_tokens=steps + 100)))
    samples = np.arange(seqs, dtype=np.int32) + 7
    flights, times = [], []
    while len(times) < steps:
        begin = time.thread_time()
        plan = s.plan()
        assert plan is not None
        flights.append(plan)
        if len(flights) == depth:
            done = flights.pop(0)
            s.apply(done, samples[: len(done.rows)])
        if s.waiting == waiting and plan.host.num_tokens == seqs:
            times.append(time.thread_time() - begin)
    return float(np.median(times)) * 1e3


def churn_ms(seqs: int, waiting: int, steps: int, **options: Any) -> tuple[float, float]:
    """Median and 99th percentile milliseconds of plan + apply while requests end, at one or two a step, and others of
    300 tokens, half of them shared, are admitted and come in: always `seqs` run and `waiting` wait."""
    s = Scheduler(SchedulerConfig(16, 12_000, 4096, seqs, 2048, **options))
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 50_000, (20, 150))
    count, flights, times = 0, deque[Plan](), list[float]()
    while len(times) < steps:
        while s.waiting < waiting:
            prompt = np.concatenate((heads[rng.integers(20)], rng.integers(0, 50_000, 150))).astype(np.int32)
            params = SamplingParams(max_tokens=int(rng.integers(1, seqs * 2)))
            extra = {"priority": int(rng.integers(3)), "tenant": f"t{rng.integers(10)}"}
            s.add(Request(str(count), prompt, params, **extra))
            count += 1
        begin = time.thread_time()
        plan = s.plan()
        if plan is not None:
            flights.append(plan)
        if plan is None or len(flights) == 2:
            done = flights.popleft()
            s.apply(done, np.full(len(done.rows), 7, np.int32))
        if s.running >= seqs - 8 and count > seqs + waiting + 50:
            times.append(time.thread_time() - begin)
    return float(np.median(times)) * 1e3, float(np.percentile(times, 99)) * 1e3


def shared_prefix(requests: int, shared: int, own: int) -> tuple[int, float]:
    """Prefill tokens, and host ms a step, for `requests` that share `shared` tokens and have `own` of their own."""
    s = Scheduler(SchedulerConfig(16, 20_000, 2048, requests, 4096))
    rng = np.random.default_rng(0)
    head = rng.integers(0, 50_000, shared)
    for i in range(requests):
        prompt = np.concatenate((head, rng.integers(0, 50_000, own))).astype(np.int32)
        s.add(Request(str(i), prompt, SamplingParams(max_tokens=1)))
    tokens, steps, begin = 0, 0, time.thread_time()
    while (plan := s.plan()) is not None:
        s.apply(plan, np.zeros(len(plan.rows), np.int32))
        tokens, steps = tokens + plan.host.num_tokens, steps + 1
    return tokens, (time.thread_time() - begin) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--times", type=int, default=1, help="of so many medians the least, on a machine with other work"
    )
    args = parser.parse_args()
    steps = args.steps
    for seqs in (1, 16, 64):
        plain, overlapped = decode_ms(seqs, steps, 1), decode_ms(seqs, steps, 2)
        print(f"decode, {seqs:2} running: {plain:.3f} ms a step, {overlapped:.3f} ms overlapped")
    for name, options in {"lpm": {}, "priority": {"policy": "priority"}, "fair": {"fair": True}}.items():
        decode = min(decode_ms(256, steps, 2, 1000, **options) for _ in range(args.times))
        print(f"decode, 256 running, 1,000 waiting, {name}: {decode:.3f} ms a step")
        median, most = map(min, zip(*(churn_ms(256, 1000, steps, **options) for _ in range(args.times)), strict=True))
        print(f"  with about one request ending and one coming a step: {median:.3f} ms, 99th percentile {most:.3f} ms")
    tokens, ms = shared_prefix(64, 1024, 32)
    print(f"64 requests sharing 1,024 of 1,056 tokens: {tokens:,} of {64 * 1056:,} prefilled, {ms:.3f} ms a step")


if __name__ == "__main__":
    main()
