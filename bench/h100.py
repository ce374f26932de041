"""The GPU table: our engine, in this process, on the workloads that the peers were measured on, beside their figures.

    python bench/h100.py [--model deepseek-v2-lite] [--only NAME,...] [--runs 3] [--json out.json] [--profile FOLDER]

Random weights in the shape of the model, by default Llama-3.1-8B, bf16, prompts of random token ids, greedy, no stop,
prefix cache flushed before each run; the median of `--runs` after one warm-up. Time runs from submission to the
last token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip

DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    name: str
    requests: int
    shared: int  # tokens that a group has in common
    unique: int
    output: int
    best: int  # the better peer, tokens/s
    needed: int
    groups: int = 1

    def prompts(self, rng: np.random.Generator) -> list[np.ndarray]:
        heads = [rng.integers(1000, 100_000, self.shared, np.int32) for _ in range(self.groups)]
        return [
            np.concatenate([heads[i % self.groups], rng.integers(1000, 100_000, self.unique, np.int32)])
            for i in range(self.requests)
        ]

    @property
    def counts_input(self) -> bool:
        return self.output == 1

    @property
    def tokens(self) -> int:
        return self.requests * (self.shared + self.unique if self.counts_input else self.output)


SINGLE = Work("single", 1, 0, 128, 256, 153, 165)
DECODE = Work("decode", 64, 0, 128, 256, 7467, 7850)
THROUGHPUT = Work("throughput", 256, 0, 512, 128, 6467, 6700)
PREFILL = Work("prefill", 16, 0, 4096, 1, 41388, 40000)
SHARED = Work("shared", 256, 2048, 64, 64, 6543, 7000, 8)
MODELS: dict[str, tuple[dict[str, Any], tuple[Work, ...]]] = {
    "llama-3.1-8b": (LLAMA, (SINGLE, DECODE, THROUGHPUT, PREFILL, SHARED)),
    "deepseek-v2-lite": (
        DEEPSEEK,
        (
            replace(SINGLE, best=251, needed=265),
            replace(DECODE, best=11139, needed=11700),
            replace(THROUGHPUT, best=11873, needed=12200),
            replace(PREFILL, best=82291, needed=80000),
            replace(SHARED, best=11370, needed=11370),
        ),
    ),
}


def run(core: EngineCore, prompts: list[np.ndarray], output: int) -> dict[str, float]:
    """Seconds from submission to the last token, and of the engine's own work per step."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    steps, host = core.stats().steps, core.stats().host_seconds
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        core.submit(f"{start}-{i}", prompt, params)
    count = 0
    while core.has_work:
        count += sum(len(chunk.tokens) for chunk in core.step())
    seconds = time.perf_counter() - start
    assert count == len(prompts) * output, f"{count} tokens came; expected {len(prompts) * output}"
    steps, host = core.stats().steps - steps, core.stats().host_seconds - host
    return {"seconds": seconds, "steps": steps, "host_ms_per_step": 1000 * host / steps}


def profile(core: EngineCore, work: Work, rng: np.random.Generator, folder: Path) -> str:
    """A trace of a short run in `folder`, and how long the GPU had nothing to do in its later half. Gaps of less than
    10 us are between the kernels of a step; the profiler makes both longer."""
    import torch
    from torch.profiler import ProfilerActivity

    core.flush_cache()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(core, work.prompts(rng), min(work.output, 32))
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{work.name}.json.gz"))
    on_gpu = (e.time_range for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    spans = np.array(sorted((t.start, t.end) for t in on_gpu))
    start, end = spans[len(spans) // 2 :].T
    gaps = np.maximum(0, start[1:] - np.maximum.accumulate(end)[:-1])
    whole = end.max() - start[0]
    return f"idle {gaps.sum() / whole:.1%} of the time, {gaps[gaps >= 10].sum() / whole:.1%} in gaps of 10 us and more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--only", help="workloads, comma separated")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of EngineConfig")
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also trace each workload, with torch.profiler")
    args = parser.parse_args()
    options: dict[str, Any] = {k: json.loads(v) for k, v in (o.split("=", 1) for o in args.option)}
    config, works = MODELS[args.model]
    if args.layers:
        config = config | {"num_hidden_layers": args.layers}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        base: dict[str, Any] = {"max_context": 8192, "max_seqs": 256, "mem_fraction": 0.85, "load_format": "dummy"}
        core = EngineCore(EngineConfig(model=folder, device=args.device, **(base | options)))
    rng = np.random.default_rng(0)
    run(core, works[0].prompts(rng), 1)
    print(f"{core.info()}\nfirst answer after {time.perf_counter() - begin:.1f} s, {core.timeline}", flush=True)
    report: dict[str, Any] = {}
    for work in (w for w in works if not args.only or w.name in args.only.split(",")):
        results = []
        for _ in range(args.runs + 1):
            core.flush_cache()
            results.append(run(core, work.prompts(rng), work.output))
        results = results[1:]  # the first is the warm-up
        seconds = statistics.median(r["seconds"] for r in results)
        speed = work.tokens / seconds
        report[work.name] = {"tok_s": speed, "runs": results}
        kind = "input" if work.counts_input else "output"
        first = results[0]
        print(
            f"| {work.name:10} | {speed:8.0f} {kind} tok/s | best peer {work.best} ({speed / work.best:.2f}x) | "
            f"required {work.needed} | {first['host_ms_per_step']:.2f} ms host/step, {first['steps']} steps |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    for work in (w for w in works if args.profile and w.name in report):
        print(f"{work.name}: {profile(core, work, rng, args.profile)}", flush=True)


if __name__ == "__main__":
    main()
