"""Makes golden files, with torch and transformers installed: `python conformance/golden/make.py [FOLDER [FAMILY...]]`.

Truth is transformers' own class in float32. How far an honest run may be from it is measured, per row, on runs of the
same class that differ only in rounding: the floor of float32 is the largest distance of three float32 runs (eager
attention, fused attention, token by token over a cache) from a float64 run, and the floor of bfloat16 the largest
distance of three such bfloat16 runs from the truth. A floor below the model's median is raised to it, as it was luck.

Rounding errors of two honest implementations of one graph have the same sources and so about the same size, but neither
sign nor order in common. K = 3 such floors leave room for that, and for the truth's own error, while a defect moves
logits by a share of their size, whatever the rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers

from polyradix_conformance.golden import BLOCK, MANIFEST, REBOUND, fp8, quantised, weights
from polyradix_conformance.oracle import UNIT

PROMPTS = (1, 15, 16, 17, 70)  # around the edges of pages
STEPS = 12  # greedy tokens after each
CHUNK = 13  # of Ragged.chunked: where a chunk ends, a row is kept
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA = {"query_pre_attn_scalar": 100, "sliding_window": 20}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LATENT = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
}
INDEXED = {**LATENT, "index_head_dim": 32, "index_n_heads": 32, "index_topk": 27}  # few heads: ties at 0
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-dense": (
        "DeepseekV3",
        {
            **LATENT,
            "first_k_dense_replace": 3,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            **theta(10000.0),
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": (
        "DeepseekV2",
        {**LATENT, "topk_method": "greedy", "q_lora_rank": None, "num_experts_per_tok": 2},
    ),
    "deepseek-v3": ("DeepseekV3", LATENT),
    "deepseek-v3.2": ("DeepseekV32", INDEXED),
    "deepseek-v3.2-all-seen": ("DeepseekV32", {**INDEXED, "index_topk": 128}),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 6.0, "final_logit_softcapping": 30.0, "rope_parameters": DEFAULT},
    ),
    "gemma3": (
        "Gemma3",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": DEFAULT,
            },
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            **EXPERTS,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "sliding_window": 20,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "llama": ("Llama", {"rope_parameters": LLAMA3, "num_hidden_layers": 3}),
    "llama-bias": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "llama-fp8": (
        "Llama",
        {
            "intermediate_size": 256,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
            **theta(10000.0),
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 20, "num_hidden_layers": 3, **theta(10000.0)}),
    "mistral-large-3": (
        "Mistral4",
        {
            **LATENT,
            "head_dim": 48,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.2},
        },
    ),
    "mixtral": ("Mixtral", {**EXPERTS, "intermediate_size": 128, **theta(1000000.0)}),
    "qwen2": ("Qwen2", theta(1000000.0)),
    "qwen3": ("Qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, **theta(1000000.0)}),
    "qwen3-windows": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **theta(1000000.0),
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 128,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            **theta(1000000.0),
        },
    ),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, **theta(100000.0)}),
}


class Made(NamedTuple):
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    arrays: dict[str, Any]


def make(family: str) -> Made:
    """The golden content of one family."""
    config = config_of(family)
    model = build(config, torch.float32)
    shapes = {name: list(t.shape) for name, t in model.state_dict().items() if not tied(config, name)}
    runs = [generate(model, prompt(n, config.vocab_size)) for n in PROMPTS]
    at = [(s, p) for s, (n, run) in enumerate(zip(PROMPTS, runs, strict=True)) for p in kept(n, len(run))]
    arrays = {
        "tokens": np.concatenate(runs),
        "lengths": np.array([len(r) for r in runs], np.int32),
        "prompts": np.array(PROMPTS, np.int32),
        "at": np.array(at, np.int32),
    }
    each = [measure(config, run, 0) for run in runs]
    other = measure(config, runs[REBOUND][: PROMPTS[REBOUND]], 1)
    for key in each[0]:
        arrays[key] = np.stack([each[s][key][p] for s, p in at])
        least = np.median(arrays[key]) if key.startswith("floor") else -np.inf
        arrays[key] = np.maximum(arrays[key], least)
        arrays[f"rebound_{key}"] = np.maximum(other[key][-1:], least)
    about = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    return Made(about, shapes, arrays)


def config_of(family: str) -> Any:
    architecture, changes = FAMILIES[family]
    kind = getattr(transformers, architecture + "ForCausalLM").config_class
    return kind(**{**COMMON, **changes})


def tied(config: Any, name: str) -> bool:
    """A copy of the embeddings, which no checkpoint holds."""
    return bool(config.tie_word_embeddings) and name == "lm_head.weight"


def build(config: Any, dtype: Any, attention: str = "eager", seed: int = 0) -> Any:
    """transformers' class with the golden weights."""
    kind = getattr(transformers, type(config).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM")
    attention = attention if kind._supports_sdpa else "eager"  # softcaps are in no other
    plain = {"dtype": dtype, "attn_implementation": attention, "experts_implementation": "eager"}
    model = kind._from_config(config, **plain).eval()  # Mistral4 is not in AutoModelForCausalLM's table
    state = {
        name: value(config, name, tuple(t.shape), seed).to(dtype)
        for name, t in model.state_dict().items()
        if not tied(config, name)
    }
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(tied(config, name) for name in left.missing_keys)
    return model


def value(config: Any, name: str, shape: tuple[int, ...], seed: int) -> Any:
    """float32"""
    if not quantised(vars(config), name):
        return torch.from_numpy(weights(name, shape, seed).copy())
    codes, scale = fp8(name, shape, seed)
    spread = torch.from_numpy(scale).repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
    return torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).float() * spread


def prompt(n: int, vocab: int) -> Any:
    """int32 [n], seeded by its length."""
    return np.random.default_rng(n).integers(0, vocab, n).astype(np.int32)


def kept(prompt: int, length: int) -> list[int]:
    """Positions whose logits are kept: from the prompt's end on, and where chunks end."""
    return [p for p in range(length) if p >= prompt - 1 or (p + 1) % CHUNK == 0]


@torch.inference_mode()
def generate(model: Any, ids: Any) -> Any:
    """The prompt and STEPS greedy tokens but the last one, int32."""
    out = model.generate(torch.from_numpy(ids).long()[None], max_new_tokens=STEPS, do_sample=False)
    return out[0, :-1].numpy().astype(np.int32)


def measure(config: Any, ids: Any, seed: int) -> dict[str, Any]:
    """Truth and floors of every position of one sequence."""
    truth = whole(build(config, torch.float32, seed=seed), ids)
    with wide():
        exact = whole(build(config, torch.float64, seed=seed), ids)
    floors = {"float32": spread(config, ids, seed, torch.float32, exact)}
    floors["bfloat16"] = spread(config, ids, seed, torch.bfloat16, truth)
    least = np.abs(truth).max(axis=1)
    out = {f"floor_{d}": np.maximum(f, UNIT[d] * least).astype(np.float32) for d, f in floors.items()}
    return {"logits": truth.astype(np.float32), **out}


def spread(config: Any, ids: Any, seed: int, dtype: Any, truth: Any) -> Any:
    """The largest distance of an honest run from `truth`, per row."""
    eager, fused = (build(config, dtype, attention, seed) for attention in ("eager", "sdpa"))
    runs = (whole(eager, ids), whole(fused, ids), stepwise(eager, ids))
    return np.max([np.abs(run - truth).max(axis=1) for run in runs], axis=0)


@torch.inference_mode()
def whole(model: Any, ids: Any) -> Any:
    """Logits [n,V] as float64."""
    return head(model, model.model(torch.from_numpy(ids).long()[None]).last_hidden_state)


@torch.inference_mode()
def stepwise(model: Any, ids: Any) -> Any:
    """As whole, one token at a time."""
    cache, out = transformers.DynamicCache(config=model.config), []
    for token in torch.from_numpy(ids).long():
        step = model.model(token[None, None], None, None, cache, use_cache=True)  # its name changed in 5.24
        out.append(head(model, step.last_hidden_state))
    return np.concatenate(out)


def head(model: Any, hidden: Any) -> Any:
    """Logits at least in float32, as the contract has them; transformers rounds them to the model's dtype."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden[0].to(dtype) @ model.lm_head.weight.to(dtype).T
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (out if cap is None else cap * torch.tanh(out / cap)).double().numpy()


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Where transformers asks for float32 (norms, softmax, rope) it gets float64: else no run of it is exact."""
    with contextlib.ExitStack() as stack:
        for name in ("float", "float32"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def main(folder: Path, families: list[str]) -> None:
    """All families, or some, beside those that the folder has."""
    digests = json.loads((folder / MANIFEST).read_text())["sha256"] if families else {}
    for family in families or FAMILIES:
        made = make(family)
        about = json.dumps({"config": made.config, "shapes": made.shapes}, indent=1, sort_keys=True)
        (folder / f"{family}.json").write_text(about + "\n")
        np.savez_compressed(folder / f"{family}.npz", **made.arrays)
        for name in (f"{family}.json", f"{family}.npz"):
            digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    versions = {m.__name__: m.__version__ for m in (np, torch, transformers)}
    (folder / MANIFEST).write_text(
        json.dumps({"made_with": versions, "sha256": dict(sorted(digests.items()))}, indent=1) + "\n"
    )


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "polyradix_conformance" / "golden"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default, sys.argv[2:])
