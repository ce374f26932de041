"""Times the steps of one small model, with random weights, on several backends, each in a process of its own.

    python bench/step.py tpu cuda:capture=0 cuda [--seqs 8] [--context 256]

The engine runs `--seqs` prompts of `--context` tokens, greedily. Prints the ms of the prefill, all prompts at once, and
of one decode step: what 1 + STEPS tokens take more than 1, over STEPS. Median of 5, bfloat16; backends may be emulated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams

SMOLLM = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip
STEPS, TIMES = 64, 5


def seconds(core: EngineCore, prompts: list[np.ndarray], tokens: int) -> float:
    """From submission to the last token, nothing cached."""
    core.flush_cache()
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        core.submit(f"{start}-{i}", prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    while core.has_work:
        for chunk in core.step():
            assert not chunk.error, chunk.error
    return time.perf_counter() - start


def measure(subject: str, seqs: int, context: int) -> str:
    device, _, rest = subject.partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, value = pair.split("=")
        options[key] = int(value) if value.isdecimal() else value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM))
        config = EngineConfig(
            model=folder, device=device, emulate=True, load_format="dummy", max_seqs=seqs, progress=False,
            max_context=context + STEPS + 1, max_tokens_per_step=seqs * context, backend_options=options,
        )  # fmt: skip
        core = EngineCore(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, SMOLLM["vocab_size"], context) for _ in range(seqs)]
    seconds(core, prompts, 1 + STEPS)  # compiles
    first, all = (median(seconds(core, prompts, n) for _ in range(TIMES)) for n in (1, 1 + STEPS))
    return f"{subject:24} prefill {1000 * first:8.2f} ms   decode {1000 * (all - first) / STEPS:7.3f} ms/step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", metavar="BACKEND[:KEY=VALUE,...]")
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    if len(args.subjects) == 1:
        print(measure(args.subjects[0], args.seqs, args.context), flush=True)
    else:
        sizes = ["--seqs", str(args.seqs), "--context", str(args.context)]
        for subject in args.subjects:
            subprocess.run([sys.executable, __file__, subject, *sizes], check=False)


if __name__ == "__main__":
    main()
