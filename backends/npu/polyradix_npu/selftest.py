"""`polyradix-npu selftest`: one page, and a file to send, on what an Ascend device does with this backend.

Whole models of one layer run on the device with every vendor call compared with the reference; then a decode is
captured and replayed; then HCCL adds up; then `conform` judges and measures the backend.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import HOST_DTYPES, Backend, HostArray, Limits, Params, ParamSpec
from polyradix.backend.registry import open_backend
from polyradix.graph.dense import make_step, param_specs
from polyradix.graph.rope import rope_table
from polyradix.graph.spec import ModelSpec
from polyradix_npu.device import start

if TYPE_CHECKING:
    from polyradix_npu.compare import Compared, Seen

PAGE = 128
PROFILES = ("dense", "moe", "mla", "sparse", "quant", "mesh")
COMMON = {"num_hidden_layers": 1, "vocab_size": 512, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
LATENT = {"kv_lora_rank": 512, "q_lora_rank": 64, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {"architectures": ["LlamaForCausalLM"], "head_dim": 128},
    "Llama, heads of 64": {"architectures": ["LlamaForCausalLM"], "head_dim": 64},
    "Mistral, window": {"architectures": ["MistralForCausalLM"], "head_dim": 128, "sliding_window": 50},
    "Qwen3-MoE": {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "num_experts": 32,
                  "num_experts_per_tok": 4, "norm_topk_prob": True},
    "gpt-oss": {"architectures": ["GptOssForCausalLM"], "head_dim": 64, "num_local_experts": 8,
                "num_experts_per_tok": 4, "sliding_window": 50, "layer_types": ["sliding_attention"]},
    "DeepSeek-V3": {"architectures": ["DeepseekV3ForCausalLM"], **LATENT, "n_routed_experts": 32, "n_group": 4,
                    "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 0},
}  # fmt: skip
# hidden size, heads, kv heads, an expert's width, and the prompts' tokens
SIZES = {"small": (128, 4, 2, 64, (3, 30, 140)), "serving": (2048, 16, 4, 768, (1, 500, 1500))}
EXCHANGED = 1e-2  # of the largest value: what rows may be off that came back from experts
Line = tuple[bool, str]


def main(argv: Sequence[str] | None = None) -> int:
    """0: all is well. 1: something is wrong, and named. 2: the device cannot be used."""
    parser = argparse.ArgumentParser(prog="polyradix-npu", description="Polyradix on Ascend devices")
    command = parser.add_subparsers(dest="command", required=True).add_parser("selftest", help=__doc__.splitlines()[0])
    command.add_argument("--emulate", action="store_true", help="on a device in host memory: tests this command alone")
    command.add_argument("--quick", action="store_true", help="small shapes, and no conform")
    command.add_argument("-o", "--output", type=Path, default=Path("npu-selftest.json"), metavar="FILE")
    args = parser.parse_args(argv)
    try:
        backend = open_backend("npu", emulate=args.emulate)
    except Exception as error:
        print(f"polyradix-npu: {error}", file=sys.stderr)
        return 2
    lines: list[tuple[str, bool, str]] = []
    for name, check in _checks(backend, args):
        try:
            found = list(check())
        except Exception as error:
            found = [(False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")]
        for good, text in found:
            lines.append((name, good, text))
            print(f"{'ok ' if good else 'BAD'} {name}: {text}", flush=True)
    good = all(ok for _, ok, _ in lines)
    stamp = "emulated, which says nothing of a device" if backend.caps.emulated else backend.caps.device
    print(f"{'all is well' if good else 'NOT well'} ({stamp}); send {args.output} with a report")
    args.output.write_text(json.dumps({"emulated": backend.caps.emulated, "good": good, "lines": lines}, indent=1))
    return 0 if good else 1


def _checks(backend: Backend, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Iterator[Line]]]]:
    yield "versions", lambda: _versions(backend)
    for size in ("small",) if args.quick else SIZES:
        for name in CONFIGS:
            yield f"{name}, {size}", lambda name=name, size=size: _model(backend, name, size)  # type: ignore[misc]
    yield "ATB", lambda: _atb(backend)
    yield "HCCL", lambda: _hccl(backend)
    if not args.quick:
        for profile in PROFILES if backend.caps.max_tp > 1 else PROFILES[:-1]:
            yield f"conform {profile}", lambda profile=profile: _conform(args, "run", "--profile", profile)  # type: ignore[misc]
        yield "conform perf", lambda: _conform(args, "perf")


def _versions(backend: Backend) -> Iterator[Line]:
    names = ("polyradix-npu", "torch", "torch-npu")
    text = ", ".join(f"{name} {version(name)}" for name in names)
    driver = Path("/usr/local/Ascend/driver/version.info")
    release = driver.read_text().split()[0] if driver.exists() else "no driver"
    yield True, f"{text}, {release}, Python {platform.python_version()}, {backend.caps.device}"
    for note in backend.caps.notes:
        yield True, note


def _model(captured: Backend, name: str, size: str) -> Iterator[Line]:
    """A prefill and a decode, eager and compared; then the decode captured, whose logits must be the eager one's."""
    emulated = captured.caps.emulated
    eager = open_backend("npu", emulate=emulated, capture=0)
    spec, prompts = _spec(name, size)
    seen, logits = _eager(eager, spec, prompts)
    yield from _seen(seen)
    for _ in range(2):
        error = np.abs(_decoded(captured, spec, prompts) - logits).max() / np.abs(logits).max()
        yield bool(error <= 1e-2), f"replayed decode: error {error:.1e} of the largest logit"


def _seen(seen: dict[str, Seen]) -> Iterator[Line]:
    for op, s in sorted(seen.items()):
        yield not s.wrong, f"{op}: {s.calls} calls, error at most {s.worst:.1e} of the largest value {s.wrong}"


@contextmanager
def _compared(backend: Backend) -> Iterator[Compared]:
    """What runs on the device inside has its vendor calls compared."""
    import torch

    from polyradix_npu.compare import Compared

    simulated = nullcontext()
    if backend.caps.emulated:
        from polyradix_npu.emulate.graphs import device

        simulated = device()
    with torch.inference_mode(), simulated, Compared() as compared:
        yield compared


def _eager(backend: Backend, spec: ModelSpec, prompts: Sequence[int]) -> tuple[dict[str, Seen], HostArray]:
    """What was seen of each op, and the decode's logits."""
    with _compared(backend) as compared:
        return compared.seen, _decoded(backend, spec, prompts)


def _decoded(backend: Backend, spec: ModelSpec, prompts: Sequence[int]) -> HostArray:
    """Logits [S,V] of one more token for each prompt."""
    run = backend.compile(make_step(spec), Limits(4096, len(prompts), 2048))
    kv, params = backend.alloc_kv(spec.kv_spec(PAGE, "bfloat16"), 1 + len(prompts) * 16), _params(backend, spec)
    for starts, counts in (([0] * len(prompts), prompts), (prompts, [1] * len(prompts))):
        logits, kv = run(params, kv, backend.prepare(_batch(starts, counts, spec.vocab)))
    return backend.fetch(logits).result()


def _atb(backend: Backend) -> Iterator[Line]:
    """The op that reads the cache for single tokens where the fused one takes a head size in no layout."""
    import torch

    from polyradix_npu import calls

    def on(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).to("npu")

    def attend() -> None:
        pages = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32).to("npu")
        calls.attend_singles(on(2, 8, 64), (on(4, PAGE, 2, 64), on(4, PAGE, 2, 64)), pages, [130, 7], 8, 2, 0.125)

    try:
        with _compared(backend) as compared:
            attend()
    except OSError as error:
        yield True, f"not to be had, which only matters to heads that the fused op refuses: {error}"
        return
    yield from _seen(compared.seen)


def _spec(name: str, size: str) -> tuple[ModelSpec, Sequence[int]]:
    hidden, heads, kv, width, prompts = SIZES[size]
    kv = heads if "DeepSeek" in name else kv
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "moe_intermediate_size": width}
    counts = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return ModelSpec.from_hf_config(COMMON | CONFIGS[name] | shape | counts), prompts


def _params(backend: Backend, spec: ModelSpec) -> Params:
    random = np.random.default_rng(0)

    def pack(p: ParamSpec) -> Any:
        def read(part: str = "weight") -> HostArray:
            if p.kind == "rope":
                return rope_table(spec.rope, *p.shape)
            shape = p.shape if part == "weight" else p.shape[:-1]
            values = random.standard_normal(shape, np.float32) * (1 if p.kind == "embed" else p.shape[-1] ** -0.5)
            return (values + (p.kind == "norm")).astype(HOST_DTYPES[p.dtype])

        return backend.pack(p, read)

    table = param_specs(spec, "bfloat16")
    return Params({p.name: pack(p) for p in table.top}, [{p.name: pack(p) for p in layer} for layer in table.layers])


def _batch(starts: Sequence[int], counts: Sequence[int], vocab: int) -> HostBatch:
    """Sequence s has the 16 pages from 1 + 16 s on."""
    positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)]).astype(np.int32)
    owner = np.repeat(np.arange(len(counts)), counts)
    cu_q = np.cumsum([0, *counts]).astype(np.int32)
    return HostBatch(
        tokens=(17 * positions + 5 * owner.astype(np.int32)) % vocab,
        positions=positions,
        slots=((1 + 16 * owner) * PAGE + positions).astype(np.int32),
        cu_q=cu_q,
        kv_len=(np.array(starts) + counts).astype(np.int32),
        pages=(1 + 16 * np.arange(len(counts))[:, None] + np.arange(16)).astype(np.int32),
        last=cu_q[1:] - 1,
        from_prev=np.full(len(positions), -1, np.int32),
    )


def _hccl(backend: Backend) -> Iterator[Line]:
    """A sum over all devices of this machine, each with a process of its own; and rows sent to experts and back."""
    import torch

    if backend.caps.emulated:
        from polyradix_npu.emulate.exchange import on_ranks

        error = max(on_ranks(2, lambda rank, group: _exchanged(rank, 2, group)))
        yield error <= EXCHANGED, f"dispatch and combine over 2 simulated ranks: error {error:.1e} of the largest value"
        yield True, "a sum is not run: there is no HCCL in emulation"
        return
    count = torch.npu.device_count()
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (count, f"{folder}/store"), count)
    sent = "; rows to experts and back" if count > 1 else "; dispatch and combine want two"
    yield True, f"a sum over {count} device(s){sent}"


def _rank(rank: int, count: int, file: str) -> None:
    start(emulated=False)
    import torch
    import torch.distributed as dist

    from polyradix_npu.mesh import hccl
    from polyradix_torch.mesh.collectives import TorchCollectives

    torch.npu.set_device(rank)
    store = dist.FileStore(file, count)
    together = TorchCollectives(hccl(store, rank, count), rank, count, f"npu:{rank}")
    total = together.all_reduce(torch.full((1024,), rank + 1.0, device="npu")).cpu().unique().tolist()
    if total != [count * (count + 1) / 2]:
        raise RuntimeError(f"rank {rank}: the sum is {total}; expected {count * (count + 1) / 2}")
    if count > 1:  # in a group of its own, as the ops demand
        group = hccl(dist.PrefixStore("experts", store), rank, count)
        error = _exchanged(rank, count, group.get_hccl_comm_name(rank))
        if not error <= EXCHANGED:
            raise RuntimeError(f"rank {rank}: dispatch and combine: error {error:.1e} of the largest value")


def _exchanged(rank: int, size: int, group: str) -> float:
    """Rows go to two of 2 * size experts, which multiply them by 1, 2, 3 ..., and back. The largest error, as a share
    of the largest value."""
    import torch

    from polyradix_npu import calls

    random, experts, ranks = np.random.default_rng(rank), 2 * size, calls.Ranks(group, size, rank)
    x = torch.from_numpy(random.standard_normal((8, 1024), np.float32)).bfloat16()
    ids = random.random((8, experts)).argsort(1)[:, :2].astype(np.int32)
    weights = random.random((8, 2), np.float32)
    asked = torch.from_numpy(ids).to("npu"), torch.from_numpy(weights).to("npu"), ranks, experts
    rows, counts, told = calls.dispatch(x.to("npu"), *asked)
    held = counts.cpu()
    factors = torch.arange(2 * rank + 1, 2 * rank + 3).repeat_interleave(held)[:, None]
    rows[: len(factors)] *= factors.bfloat16().to("npu")
    got = calls.collect(rows, *asked, told).cpu().double().numpy()
    want = x.double().numpy() * (weights * (ids + 1)).sum(1, keepdims=True)
    return float(np.abs(got - want).max() / np.abs(want).max())


def _conform(args: argparse.Namespace, *command: str) -> Iterator[Line]:
    emulate = ["--emulate"] if args.emulate else []
    file = args.output.with_name("-".join([args.output.stem, *(c.strip("-") for c in command)]) + ".json")
    call = [sys.executable, "-m", "polyradix_conformance.cli", *command, "--backend", "npu", *emulate, "-o", str(file)]
    done = subprocess.run(call, capture_output=True, text=True)
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    yield done.returncode == 0, f"{''.join(last)} ({file})"


if __name__ == "__main__":
    sys.exit(main())
