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
from polyradix_npu import attention, calls

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "intermediate_size": 96, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], **HEADS, "num_local_experts": 9, "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
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
INDEXED = {
    **MODELS["deepseek"], "architectures": ["DeepseekV32ForCausalLM"], "kv_lora_rank": 64, "index_n_heads": 2,
    "index_head_dim": 128, "index_topk": 16,
}  # fmt: skip
EAGER: dict[str, dict[str, Any]] = {
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], **HEADS, "head_dim": 128, "query_pre_attn_scalar": 128,
        "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "deepseek-v3.2": INDEXED,
}  # fmt: skip
PROMPTS = {"a": list(range(3, 33)), "b": [90, 4, 55], "c": [(7 * i) % 93 + 3 for i in range(270)]}


def tokens(path: Path, **options: Any) -> dict[str, list[int]]:
    """Greedy answers to PROMPTS, which run together, the longest in three chunks."""
    config = EngineConfig(
        model=str(path), load_format="dummy", dtype="bfloat16", max_context=384, max_seqs=4, kv_pages=12,
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


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each replay was told."""
    told = list[Any]()
    update = torch.npu.NPUGraph.update
    monkeypatch.setattr(
        torch.npu.NPUGraph,
        "update",
        lambda graph, cpu_update_input: (told.append(cpu_update_input), update(graph, cpu_update_input))[1],
    )
    return told


@pytest.mark.parametrize(("refused", "captured"), [(("BSND",), True), (("BSND", "BSH"), False)])
def test_heads_that_the_device_refuses_take_another_form(
    refused: tuple[str, ...],
    captured: bool,
    tmp_path: Path,
    refuse: Callable[..., None],
    replays: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BSH; then ATB's op for single tokens and torch for the prompts, eagerly."""
    refuse(*refused)
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODELS["llama-narrow"]))
    asked, attend = list[int](), calls.attend_singles
    monkeypatch.setattr(calls, "attend_singles", lambda *a: (asked.append(len(a[0])), attend(*a))[1])
    got = tokens(tmp_path, device="npu", emulate=True)
    assert (bool(replays), len(asked) > 14) == (captured, not captured)
    assert got == tokens(tmp_path, device="cpu", backend_options={"kernels": "torch"})


@pytest.mark.parametrize(("name", "tp"), [*((name, 1) for name in MODELS), ("qwen3-moe", 2)])
def test_captured_decodes_give_the_cpus_tokens(name: str, tp: int, tmp_path: Path, replays: list[Any]) -> None:
    """With collectives in the graphs, if there are several ranks; a windowed layer is not told of pages given back."""
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODELS[name]))
    got = tokens(tmp_path, device="npu", emulate=True, tp=tp)
    assert len(replays) >= 7
    assert len({token for answer in got.values() for token in answer}) > 3
    assert got == tokens(tmp_path, device="cpu", backend_options={"kernels": "torch"})
    if "gpt-oss" in name:
        windowed, full = ([told[layer]["actual_seq_kvlen"] for told in replays] for layer in range(2))
        fewer = [[b - a for a, b in zip(*each, strict=True)] for each in zip(windowed, full, strict=True)]
        assert {n for each in fewer for n in each} == {0, 128}


@pytest.mark.parametrize("name", EAGER)
def test_what_no_graph_can_hold_is_decoded_eagerly(
    name: str, tmp_path: Path, replays: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capped scores and indexers, in torch."""
    monkeypatch.setattr(attention, "ROWS", 50)
    (tmp_path / "config.json").write_text(json.dumps(COMMON | EAGER[name]))
    got = tokens(tmp_path, device="npu", emulate=True)
    assert not replays
    assert len({token for answer in got.values() for token in answer}) > 3
    assert got == tokens(tmp_path, device="cpu", backend_options={"kernels": "torch"})
