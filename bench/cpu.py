"""The CPU table: our engine, and any peers given, on the same workloads in one run.

    python bench/cpu.py --json out.json \
        --peer 'vllm=/path/to/vllm serve MODEL_DIR --port {port} --dtype bfloat16'

A peer is a command that starts an OpenAI-compatible server on 127.0.0.1:{port}. Engines run one after another, never at
the same time; each workload is run `--runs` times on fresh prompts after one warm-up and the median run is reported.
Figures from a busy machine are worth little: the load before each engine is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from load import WORKLOADS, Workload, fetch_text, row, run

from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import open_checkpoint

OURS = "{python} -m polyradix.serve.cli serve --model {model} --device cpu --port {port}"


@contextmanager
def serving(command: str, log: Path) -> Iterator[tuple[str, str]]:
    """Starts a server; yields its address and model name; ends it and all it started. Start-up may take 10 minutes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        child = subprocess.Popen(
            shlex.split(command.replace("{port}", str(port))), stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield url, _wait(url, child, log)
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(20)


def _wait(url: str, child: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the server ended with {child.returncode}; see {log}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()  # raises while the model is loading
            with urllib.request.urlopen(f"{url}/v1/models", timeout=2) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"the server was not ready in 600 s; see {log}")


def measure(url: str, model: str, tokens: list[int], works: list[Workload], runs: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    salt = 0
    for work in works:
        for _ in range(runs + 1):
            salt += 1
            before = _counters(url)
            samples = asyncio.run(run(url, model, work, work.prompts(tokens, salt)))
            table.setdefault(work.name, []).append(row(samples) | _overhead(before, _counters(url)))
        kept = sorted(table[work.name][1:], key=lambda r: r["out_tok_s"])
        table[work.name] = kept[len(kept) // 2] | {"all_out_tok_s": [r["out_tok_s"] for r in kept]}
        print(f"  {work.name:8} {table[work.name]}", flush=True)
    return table


def _counters(url: str) -> dict[str, float]:
    """Our engine's own counters; empty for a peer. They are up to a second late, so idle a moment first."""
    time.sleep(1.2)
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("polyradix_") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def _overhead(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    steps = after.get("polyradix_engine_steps_total", 0) - before.get("polyradix_engine_steps_total", 0)
    if not steps:
        return {}
    host = after["polyradix_engine_host_seconds_total"] - before["polyradix_engine_host_seconds_total"]
    return {"host_ms_per_step": round(1000 * host / steps, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="our engine's model, and the tokenizer of the prompts")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="with {port} in it")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=OPTIONS", help="our engine once more")
    parser.add_argument("--only", help="workloads, comma separated")
    parser.add_argument("--no-plain", action="store_true", help="leave out our engine with its defaults")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "polyradix")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    base = OURS.format(python=sys.executable, model=args.model, port="{port}")
    engines = [] if args.no_plain else [("polyradix", base)]
    engines += [(n, f"{base} {options}") for n, options in (o.split("=", 1) for o in args.ours)]
    engines += [(n, command) for n, command in (p.split("=", 1) for p in args.peer)]
    works = [w for w in WORKLOADS if not args.only or w.name in args.only.split(",")]
    tokens = load_tokenizer(open_checkpoint(args.model)).encode(fetch_text(args.cache)[:2_000_000], add_special=False)
    report: dict[str, Any] = {}
    for name, command in engines:
        print(f"{name}: load before {os.getloadavg()[0]:.2f}", flush=True)
        begin = time.monotonic()
        with serving(command, args.cache / f"bench-{name}.log") as (url, model):
            print(f"  ready after {time.monotonic() - begin:.1f} s", flush=True)
            report[name] = measure(url, model, tokens, works, args.runs)
    _print(report, works)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def _print(report: dict[str, Any], works: list[Workload]) -> None:
    columns = ["single decode (TTFT ms)" if w.name == "single" else f"{w.name} out tok/s (TTFT ms)" for w in works]
    print("\n| engine | " + " | ".join(columns) + " |\n|" + "---|" * (len(works) + 1))
    for name, table in report.items():
        cells = []
        for w in works:
            row = table[w.name]
            speed = row["decode_tok_s"] if w.name == "single" else row["out_tok_s"]
            cells.append(f"{speed} ({row['ttft_ms']})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
