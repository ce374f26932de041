"""What a step moves and computes, against counts by hand, one query and one key at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polyradix.graph.cost import Batch, Cost, trace
from polyradix.graph.dense import param_specs
from polyradix.graph.spec import ModelSpec

H, F, V, L, D = 32, 48, 100, 2, 8
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 512,
}
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "first_k_dense_replace": L,
}
SPARSE = {
    **DEEPSEEK,
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 3,
    "index_head_dim": 6,
    "index_topk": 5,
}
BATCH = Batch(seqs=3, new=4, context=11)


def cost(config: dict[str, Any], batch: Batch = BATCH, tp: int = 1) -> Cost:
    spec = ModelSpec.from_hf_config(config)
    return trace(spec, param_specs(spec, "bfloat16"), spec.kv_spec(16, "bfloat16"), batch, tp)


def seen(batch: Batch, most: int = 1 << 30) -> int:
    return batch.seqs * sum(min(p + 1, most) for p in range(batch.context - batch.new, batch.context))


def of_layer(config: dict[str, Any], batch: Batch = BATCH) -> Cost:
    """What a layer more takes whose feed-forward is for all rows."""
    one, two = (cost({**config, "num_hidden_layers": n, "first_k_dense_replace": n}, batch) for n in (2, 3))
    return Cost(two.bytes - one.bytes, two.flops - one.flops)


def test_a_dense_layer() -> None:
    weights, rows = (4 + 2 * 2) * D * H + 4 * D * H + 3 * F * H, 3 * 4
    kv = 2 * 2 * D * (3 * 11 + rows)
    assert of_layer(LLAMA) == Cost(2 * (weights + kv), 2 * rows * weights + 4 * seen(BATCH) * 4 * D)


def test_what_is_no_layer() -> None:
    """Embedded rows, the head's weights, logits; and the last feed-forward is for one row of each sequence."""
    every, got = of_layer(LLAMA), cost(LLAMA)
    fewer = (12 - 3) * 3 * F * H  # multiplications, and the last layer's o: of those of 9 rows
    assert got.bytes == L * every.bytes + 2 * 12 * H + 2 * V * H + 4 * 3 * V
    assert got.flops == L * every.flops - 2 * (fewer + 9 * 4 * D * H) + 2 * 3 * V * H


def test_a_window() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 6}
    full, got = of_layer(LLAMA), of_layer(mistral)
    assert full.flops - got.flops == 4 * (seen(BATCH) - seen(BATCH, 6)) * 4 * D
    assert full.bytes - got.bytes == 2 * 2 * 2 * D * 3 * (11 - (6 + 4 - 1))


@pytest.mark.parametrize("batch", [BATCH, Batch(1, 300, 300), Batch(2, 1, 400)])
def test_latent_attention_takes_the_cheaper_form(batch: Batch) -> None:
    rows, held, pairs = batch.seqs * batch.new, batch.seqs * batch.context, seen(batch)
    weights = 12 * H + 4 * 10 * 12 + 24 * H + 4 * 10 * H + 3 * F * H
    absorbed = rows * 20 * 16 + pairs * (20 + 4 + 20)
    expanded = held * 20 * 16 + pairs * (6 + 4 + 10)
    assert (absorbed < expanded) == (batch.new < 300)
    want = 2 * rows * weights + 2 * 4 * min(absorbed, expanded)
    assert of_layer(DEEPSEEK, batch) == Cost(2 * (weights + 4 * 16 * 20 + 24 * (held + rows)), want)


def test_selected_rows() -> None:
    rows, held, pairs = 12, 3 * 11, seen(BATCH, 5)
    weights = 12 * H + 4 * 10 * 12 + 24 * H + 4 * 10 * H + 3 * F * H + 3 * 6 * 12 + 6 * H + 3 * H
    attention = 2 * 4 * (rows * 20 * 16 + pairs * 44) + 2 * seen(BATCH) * 3 * 7
    got = of_layer(SPARSE)
    assert got.flops == 2 * rows * weights + attention
    assert got.bytes == 2 * (weights + 4 * 16 * 20 + 6 * held + 24 * min(pairs, held) + 30 * rows)
    assert cost(SPARSE).verbs ^ cost(DEEPSEEK).verbs == {"attend_sparse", "attend_latent"}


def test_experts_are_read_as_they_are_hit() -> None:
    mixtral = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    dense, got = of_layer(LLAMA), of_layer(mixtral)
    hit, one = 8 * (1 - (1 - 2 / 8) ** 12), 3 * F * H
    assert got.bytes - dense.bytes == pytest.approx(2 * (hit - 1) * one + 4 * 8 * H, abs=1)
    assert got.flops - dense.flops == 2 * 12 * (one + 8 * H)


def test_ranks_share_what_is_split() -> None:
    whole, half = cost(LLAMA), cost(LLAMA, tp=2)
    assert half.flops == whole.flops // 2
    assert half.bytes == (whole.bytes + 2 * 12 * H + 4 * 3 * V) // 2  # every rank embeds, and has all logits
    latent, of_rank = cost(DEEPSEEK), cost(DEEPSEEK, tp=2)
    cache, shared = L * 24 * (3 * 11 + 12), L * (12 * H + 24 * H)
    assert of_rank.bytes == (latent.bytes + 2 * (cache + shared + 12 * H) + 4 * 3 * V) // 2


def test_the_pages_do_not_matter_but_the_dtype_does() -> None:
    spec = ModelSpec.from_hf_config(LLAMA)
    table, kv = param_specs(spec, "float32"), spec.kv_spec(16, "float32")
    wide = trace(spec, table, kv, BATCH)
    assert wide == trace(spec, table, replace(kv, page_size=1), BATCH)
    assert wide.bytes == 2 * cost(LLAMA).bytes - 4 * 3 * V  # logits are float32 anyway
