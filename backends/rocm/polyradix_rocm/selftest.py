"""`polyradix-rocm selftest`: what an owner of the hardware runs once, and its quick part, which runs at every start.

It compares each AITER call with what the simulator computes of the same inputs, on the same device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from polyradix_rocm.aiter.calls import Aiter
from polyradix_rocm.aiter.installed import NoAiter, installed, summary
from polyradix_rocm.cases import SERVING, SMALL, Case, Shapes, cases
from polyradix_rocm.device import ARCHS, arch_of, check_torch
from polyradix_rocm.simulator import FP8, Simulator
from polyradix_torch.gpu import use_gpu

PROFILES = ("dense", "moe", "mla", "quant", "sparse", "mesh")


@dataclass(frozen=True)
class Result:
    name: str
    status: str  # pass, fail, or not run
    detail: str = ""
    seconds: float = 0.0


def tried(name: str, run: Callable[[], str]) -> Result:
    """`run` gives the detail of a pass, and raises for a failure."""
    start = time.perf_counter()
    try:
        status, detail = "pass", run()
    except Exception as error:
        status, detail = "fail", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Result(name, status, detail, round(time.perf_counter() - start, 2))


def compared(aiter: Aiter, shapes: Shapes, device: str) -> Iterator[tuple[Case, Result]]:
    """Each case of calls that fit, against the simulator."""
    provider = aiter.provider
    reference = Aiter(Simulator(provider.arch, provider.version))
    served = tuple(n for n in shapes.latent if aiter.mla_heads(n) is not None)
    for case in cases(replace(shapes, latent=served), device, FP8[provider.arch]):
        if aiter.has(*case.calls):
            yield case, tried(case.name, lambda case=case: _within(case, aiter, reference))  # type: ignore[misc]


def _within(case: Case, aiter: Aiter, reference: Aiter) -> str:
    error = case.error(aiter, reference)
    text = f"differs by {error:.2g} of the largest value"
    if error > case.bound:
        raise ArithmeticError(f"{text}; at most {case.bound:g}")
    return text


def quick(aiter: Aiter, device: str) -> list[str]:
    """The small cases. Calls of one that fails become unfit, so that their verbs fall back; gives the reasons."""
    reasons = []
    for case, result in compared(aiter, SMALL, device):
        if result.status == "fail":
            reasons.append(f"{case.name}: {result.detail}")
            aiter.unfit.update(dict.fromkeys(case.calls, reasons[-1]))
    return reasons


def captured(aiter: Aiter, device: str) -> Iterator[Result]:
    """Each small case but of the layout of weights, in a graph: a replay gives what a plain run gives."""
    for case in cases(replace(SMALL, latent=(16,)), device, FP8[aiter.provider.arch]):
        if aiter.has(*case.calls) and "shuffle_weight" not in case.calls:
            yield tried(f"captured: {case.name}", lambda case=case: _replayed(case, aiter))  # type: ignore[misc]


def _replayed(case: Case, aiter: Aiter) -> str:
    want = case.run(aiter).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(aiter)
    out.zero_()
    graph.replay()
    if not torch.equal(out, want):
        raise ArithmeticError("a replay differs from a plain run")
    return "the same bits"


def multiplied() -> str:
    """What logits are made by: a product of bfloat16 that torch gives in float32."""
    x, w = (torch.randn(64, 4096, device="cuda").bfloat16() for _ in "xw")
    error = float((torch.mm(x, w.t(), out_dtype=torch.float32) - x.double() @ w.double().t()).abs().max())
    if error > 1e-2:
        raise ArithmeticError(f"differs by {error:.2g}, of sums around 64; at most 0.01")
    return f"differs by {error:.2g}"


def all_reduced() -> Result:
    """A sum over all GPUs, by RCCL, which torch calls nccl."""
    name, count = "all-reduce", torch.cuda.device_count()
    if count < 2:
        return Result(name, "not run", f"{count} GPU")
    return tried(name, lambda: torch.multiprocessing.spawn(_rank, (count,), nprocs=count) or f"over {count} GPUs")


def _rank(rank: int, count: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", rank=rank, world_size=count)
    x = torch.full((1 << 20,), float(rank + 1), device="cuda", dtype=torch.bfloat16)
    torch.distributed.all_reduce(x)
    assert bool((x == count * (count + 1) / 2).all()), "the sum is wrong"
    torch.distributed.destroy_process_group()


def conformance(options: list[str], folder: Path) -> Iterator[Result]:
    """`conform run` of each profile, and `conform perf`; the reports go into `folder`."""
    if find_spec("polyradix_conformance") is None:
        yield Result("conform", "not run", "polyradix-conformance is not installed")
        return
    emulated = "--emulate" in options
    alone = emulated or torch.cuda.device_count() < 2
    profiles = PROFILES[:-1] if alone else PROFILES
    what = [(f"conform run {p}", ["run", "--profile", p], f"rocm-{p}.json") for p in profiles]
    what += [] if emulated else [("conform perf", ["perf"], "rocm-perf.json")]
    for name, words, report in what:
        command = [sys.executable, "-m", "polyradix_conformance.cli", *words, "--backend", "rocm", *options]
        yield tried(name, lambda c=[*command, "-o", str(folder / report)]: _last_line(c))  # type: ignore[misc]


def _last_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]
    if done.returncode:
        raise RuntimeError(line)
    return line


def versions(aiter: Aiter | None, what: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "device": f"{torch.cuda.device_count()} x {name}, {aiter.provider.arch if aiter else 'unknown'}",
        "torch": f"{torch.__version__}, HIP {torch.version.hip}",
        "system": f"Python {platform.python_version()}, {platform.platform()}",
        "aiter": what,
    }


def opened(simulate: str | None) -> tuple[Aiter, str]:
    """Raises NoAiter, and RuntimeError where nothing can run, saying what is missing."""
    if simulate:
        return Aiter(Simulator(simulate, "0.1.20")), f"simulated for {simulate}: this shows nothing of the hardware"
    check_torch(torch)
    use_gpu(0)
    found = installed(arch_of(torch, 0))
    return Aiter(found), summary(found)


def checks(aiter: Aiter | None, simulated: bool, whole: bool, folder: Path) -> Iterator[Result]:
    """Without AITER, of what is left: Triton's kernels, torch and RCCL."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if aiter is not None:
        yield from (Result(name, "fail", why) for name, why in aiter.unfit.items())
        for shapes in (SMALL, SERVING) if whole and not simulated else (SMALL,):
            yield from (result for _, result in compared(aiter, shapes, device))
    if not simulated:
        if aiter is not None:
            yield from captured(aiter, device)
        yield tried("torch: bfloat16 times bfloat16 in float32", multiplied)
        yield all_reduced()
    if whole:
        yield from conformance(["--emulate"] if simulated else [], folder)


def selftest(simulate: str | None, folder: Path, whole: bool) -> int:
    """Prints a page, writes rocm-selftest.json into `folder`, and gives the exit code."""
    aiter: Aiter | None = None
    results: Iterator[Result] = iter(())
    try:
        aiter, what = opened(simulate)
        results = checks(aiter, bool(simulate), whole, folder)
    except RuntimeError as error:
        what, results = "cannot be used", iter([Result("AITER", "fail", str(error))])
        if isinstance(error, NoAiter):
            results = chain(results, checks(None, bool(simulate), whole, folder))
    facts, seen = versions(aiter, what), list[Result]()
    print("\n".join(f"{name:8} {text}" for name, text in facts.items()))
    for r in results:
        seen.append(r)
        print(f"{r.status:8} {r.name:34} {r.seconds:7.2f} s  {r.detail}", flush=True)
    failed, file = sum(r.status == "fail" for r in seen), folder / "rocm-selftest.json"
    file.write_text(
        json.dumps({"facts": facts, "results": [asdict(r) for r in seen], "failed": failed}, indent=1) + "\n"
    )
    print(f"{failed} of {len(seen)} failed; send {file}")
    return 1 if failed else 0


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="polyradix-rocm", description="Tools for owners of AMD GPUs.")
    commands = parser.add_subparsers(dest="command", required=True)
    this = commands.add_parser("selftest", help="try every kernel of AMD's that is used, and the conformance suite")
    this.add_argument("-o", "--output", type=Path, default=Path("."), help="folder for the reports")
    this.add_argument("--quick", action="store_true", help="small shapes only, and no conformance")
    this.add_argument("--simulate", choices=list(ARCHS), help="without the hardware: try the selftest itself")
    given = parser.parse_args(args)
    given.output.mkdir(parents=True, exist_ok=True)
    return selftest(given.simulate, given.output, not given.quick)


if __name__ == "__main__":
    sys.exit(main())
