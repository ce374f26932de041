"""`polyradix bench serving` and `polyradix bench offline`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from polyradix.bench.measure import Ask, Sample, Slo, run, summary
from polyradix.bench.workload import DATASETS, Sizes, Talk, talks


def add_arguments(parser: argparse.ArgumentParser, model_options: Any) -> None:
    """`model_options` adds those of an engine, for the offline command."""
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    serving = kinds.add_parser("serving", help="against an OpenAI-compatible server")
    serving.add_argument("--url", default="http://127.0.0.1:30000", help="without /v1")
    serving.add_argument("--model", help="its name in the API; the server's first if not given")
    serving.add_argument("--api-key", help="to send along")
    serving.set_defaults(run=_serving)
    offline = kinds.add_parser("offline", help="with an engine in this process")
    model_options(offline)
    offline.set_defaults(run=_offline)
    for p in (serving, offline):
        _work(p)


def _work(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--dataset", default="random", help=f"{', '.join(DATASETS)}, or a JSONL file; see docs/operations.md")
    for f in fields(Sizes):
        kind = int if f.name == "seed" else _count
        add(f"--{f.name}", type=kind, default=f.default, help=f"default {f.default}")
    add("--concurrency", type=_count, default=16, help="requests at once; default 16")
    add("--rate", type=_amount, help="arrivals a second, Poisson; all at once if not given")
    add("--slo-ttft", type=_amount, metavar="MS", help="a good request has its first token by then")
    add("--slo-itl", type=_amount, metavar="MS", help="and takes no more than this for each token after it")
    add("--json", type=_new_file, metavar="FILE", help="where the figures go, with every request's times")
    add("--plot", type=_new_file, metavar="FILE", help="an SVG of the distributions")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer >= 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above 0")
    return value


def _new_file(text: str) -> Path:
    """Before hours of work whose figures could not be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a file in a folder that exists")
    return path


def _serving(args: argparse.Namespace) -> int:
    try:
        import aiohttp
    except ImportError as error:
        raise ImportError(f"bench serving needs aiohttp: pip install 'polyradix[bench]' ({error})") from None
    from polyradix.bench.clients import model_of, over_http

    async def main() -> list[Sample]:
        headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
        timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
            url = args.url.rstrip("/").removesuffix("/v1")
            return await _run(over_http(session, url, args.model or await model_of(session, url)), work, args)

    work = _talks(args)
    return _report(args, asyncio.run(main()))


def _offline(args: argparse.Namespace) -> int:
    from polyradix.bench.clients import in_process
    from polyradix.engine.config import EngineConfig
    from polyradix.engine.offline import Engine

    work = _talks(args)
    given = {name: value for name, value in vars(args).items() if name in EngineConfig.__struct_fields__}
    given["backend_options"] = dict(given.get("backend_options", ()))
    return _report(args, asyncio.run(_run(in_process(Engine(**given)), work, args)))


def _talks(args: argparse.Namespace) -> list[Talk]:
    return talks(args.dataset, Sizes(**{f.name: getattr(args, f.name) for f in fields(Sizes)}))


async def _run(ask: Ask, work: Sequence[Talk], args: argparse.Namespace) -> list[Sample]:
    return await run(ask, work, args.concurrency, args.rate, args.seed)


def _report(args: argparse.Namespace, samples: list[Sample]) -> int:
    """1 if a request failed."""
    slo = Slo(*(None if ms is None else ms / 1000 for ms in (args.slo_ttft, args.slo_itl)))
    found = summary(samples, slo)
    print(json.dumps(found, indent=1))
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ("run", "api_key")}
        report = {"options": options, "summary": found, "requests": [asdict(s) for s in samples]}
        args.json.write_text(json.dumps(report, default=str))
    if args.plot:
        from polyradix.bench.plot import svg

        good = [s for s in samples if not s.error]
        first, between = [1000 * s.ttft for s in good], [1000 * t for s in good for t in s.itl]
        args.plot.write_text(svg({"time to first token": {"": first}, "time between tokens": {"": between}}))
    return 1 if found["failed"] else 0
