"""Whole tiny models, decoding with captured and replayed steps, give the CPU backend's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams
from polyradix_npu import calls

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "intermediate_size": 96, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], **HEADS, "num_local_experts": 9, "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 40,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], **HEADS, "head_dim": 128},
    "llama-narrow": {"architectures": ["LlamaForCausalLM"], **HEADS, "head_dim": 64},
    "mistral-window": {"architectures": ["MistralForCausalLM"], **HEADS, "head_dim": 128, "sliding_window": 40},
    "qwen3-moe": {"architectures": ["Qwen3MoeForCausalLM"], **HEADS, "head_dim": 128, **EXPERTS},
    "gpt-oss": {**GPT_OSS, "head_dim": 64},
    "gpt-oss-wide": {**GPT_OSS, "head_dim": 128},  # whose sinks go to the fused op
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"], "num_attention_heads": 2, "num_key_value_heads": 2,
        "kv_lora_rank": 512, "q_lora_rank": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
PROMPTS = {"a": list(range(3, 33)), "b": [90, 4, 55], "c": [(7 * i) % 93 + 3 for i in range(140)]}


def tokens(path: Path, **options: Any) -> dict[str, list[int]]:
    """Greedy answers to PROMPTS, which run together, the longest in two chunks."""
    config = EngineConfig(
        model=str(path), load_format="dummy", dtype="bfloat16", max_context=256, max_seqs=4, kv_pages=12,
        page_size=128, max_tokens_per_step=100, progress=False, **options,
    )  # fmt: skip
    core, out = EngineCore(config), dict[str, list[int]]()
    for rid, prompt in PROMPTS.items():
        core.submit(rid, prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    while core.has_work:
        for chunk in core.step():
            assert chunk.finish != "error", chunk.error
            out.setdefault(chunk.rid, []).extend(chunk.tokens)
    return out


@pytest.mark.parametrize(("refused", "captured"), [(("BSND",), True), (("BSND", "BSH"), False)])
def test_heads_that_the_device_refuses_take_another_form(
    refused: tuple[str, ...],
    captured: bool,
    tmp_path: Path,
    refuse: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BSH; then ATB's op for single tokens and torch for the prompts, eagerly."""
    refuse(*refused)
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODELS["llama-narrow"]))
    replays, asked = list[Any](), list[int]()
    replay, attend = torch.npu.NPUGraph.replay, calls.attend_singles
    monkeypatch.setattr(torch.npu.NPUGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    monkeypatch.setattr(calls, "attend_singles", lambda *a: (asked.append(len(a[0])), attend(*a))[1])
    got = tokens(tmp_path, device="npu", emulate=True)
    assert (bool(replays), len(asked) > 14) == (captured, not captured)
    assert got == tokens(tmp_path, device="cpu", backend_options={"kernels": "torch"})


@pytest.mark.parametrize(("name", "tp"), [*((name, 1) for name in MODELS), ("qwen3-moe", 2)])
def test_captured_decodes_give_the_cpus_tokens(
    name: str, tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With collectives in the graphs, if there are several ranks."""
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODELS[name]))
    replays: list[Any] = []
    replay = torch.npu.NPUGraph.replay
    monkeypatch.setattr(torch.npu.NPUGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    got = tokens(tmp_path, device="npu", emulate=True, tp=tp)
    assert len(replays) >= 7
    assert len({token for answer in got.values() for token in answer}) > 3
    assert got == tokens(tmp_path, device="cpu", backend_options={"kernels": "torch"})
