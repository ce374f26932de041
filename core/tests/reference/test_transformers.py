"""Tiny seeded models of every family: our logits on the NumPy backend against transformers, both in float32."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import KV, Backend, Compiled, Limits, Params
from polyradix.backend.registry import open_backend
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import fetch_demo, load_params, open_checkpoint
from polyradix.graph.dense import make_step, tensor_shapes
from polyradix.graph.errors import ModelError
from polyradix.graph.spec import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.torch  # noqa: E402

PAGE, PAGES = 16, [3, 1, 4]  # the pages of the only sequence: shuffled, scratch page 0 left out
PREFILL, STEPS = 33, 6  # the prompt ends one token into the third page
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
DEEPSEEK = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9},
}
SPARSE = {**DEEPSEEK, "index_topk": 12, "index_head_dim": 24, "index_n_heads": 32}  # few heads would give scores of 0
MISTRAL4 = {**DEEPSEEK, "n_group": 1, "topk_group": 1, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.4}}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 9}
GPT_OSS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "head_dim": 32,
    "sliding_window": 9,
    "swiglu_limit": 0.75,
    "rope_parameters": {**YARN, "truncate": False},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "dynamic-rope": (  # of the longest context, which is the length of the sequence here
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
            "max_position_embeddings": (PREFILL + STEPS) // 3,
        },
    ),
    "yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "yarn-rope-own-magnitude": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}),
    "mistral-window": ("Mistral", {"sliding_window": 9, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen2-some-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**GEMMA, "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    "gemma3-ropes": (
        "Gemma3",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", *["full_attention"] * 2],
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss-types": ("GptOss", {**GPT_OSS, "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    "mixtral": ("Mixtral", EXPERTS),
    "mixtral-window": ("Mixtral", {**EXPERTS, "sliding_window": 9, "head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3-moe-some-dense": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0]}),
    "deepseek-v2": ("DeepseekV2", {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v2-biased": ("DeepseekV2", {**DEEPSEEK, "topk_method": "greedy", "attention_bias": True}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "deepseek-v3-half-split": ("DeepseekV3", {**DEEPSEEK, "rope_interleave": False, "norm_topk_prob": False}),
    "deepseek-v3.2": ("DeepseekV32", SPARSE),
    "deepseek-v3.2-all-seen": ("DeepseekV32", {**SPARSE, "index_topk": PREFILL + STEPS}),
    "mistral-4": ("Mistral4", MISTRAL4),
    "qwen3-moe-window": ("Qwen3Moe", {**EXPERTS, "use_sliding_window": True, "sliding_window": 9}),
}


@pytest.fixture(scope="module")
def backend() -> Backend:
    return open_backend("numpy")


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode(family: str, backend: Backend, tmp_path: Path) -> None:
    model = save_tiny(*FAMILIES[family], tmp_path)
    ids = np.random.default_rng(7).integers(0, TINY["vocab_size"], PREFILL + STEPS).tolist()
    want = reference(model, ids)
    run = Runner(backend, str(tmp_path))
    assert_close(run(ids[:PREFILL], 0), want[PREFILL - 1])
    for n in range(PREFILL, len(ids)):
        assert_close(run(ids[n : n + 1], n), want[n])


def test_chunked_prefill_and_shards(backend: Backend, tmp_path: Path) -> None:
    model = save_tiny("Llama", {}, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = list(range(40))
    run = Runner(backend, str(tmp_path))
    for start, end in ((0, 7), (7, 16), (16, 40)):
        got = run(ids[start:end], start)
    assert_close(got, reference(model, ids)[-1])


def test_tied_embeddings_beside_a_head_of_its_own(backend: Backend, tmp_path: Path) -> None:
    """Are not tied, whatever the config says."""
    save_tiny("Llama", {"tie_word_embeddings": True}, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert "lm_head.weight" not in tensors
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    safetensors.torch.save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = list(range(20))
    assert_close(Runner(backend, str(tmp_path))(ids, 0), reference(model, ids)[-1])


def test_old_spelling_of_rope(backend: Backend, tmp_path: Path) -> None:
    model = save_tiny("Llama", {"rope_parameters": LLAMA3}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": {**LLAMA3, "rope_theta": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = list(range(40))
    assert_close(Runner(backend, str(tmp_path))(ids, 0), reference(model, ids)[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out(family: str) -> None:
    """Is what transformers takes, unless it is asked for, or the checkpoint's shapes tell. Without an end of text there
    is none, as generation_config.json may have it."""
    name, changes = FAMILIES[family]
    kind = getattr(transformers, CONFIGS.get(name, name + "Config"))
    whole = json.loads(json.dumps(kind(**{**TINY, **changes}).to_dict()))
    whole = {key: value for key, value in whole.items() if value is not None}
    for field in whole.keys() - {"eos_token_id"}:
        less = {key: value for key, value in whole.items() if key != field}
        with contextlib.suppress(ModelError):  # asked for, or sizes that do not fit the tiny ones
            got, want = spec_of(name, less), spec_of(name, kind.from_dict(less).to_dict())
            assert got == want or tensor_shapes(got) != tensor_shapes(want), field


def spec_of(family: str, config: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_hf_config({**config, "architectures": [f"{family}ForCausalLM"], "eos_token_id": None})


def save_tiny(family: str, changes: dict[str, Any], folder: Path, **save: Any) -> Any:
    """A model whose norms and biases are not their trivial initial values."""
    torch.manual_seed(11)
    config = getattr(transformers, CONFIGS.get(family, family + "Config"))(
        **{**TINY, "initializer_range": 0.15, **changes}
    )
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("_bias"):
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    model.save_pretrained(folder, **save)
    return model


def reference(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


class Runner:
    """One sequence through the pages of one cache."""

    def __init__(self, backend: Backend, model: str) -> None:
        checkpoint = open_checkpoint(model)
        spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
        self.backend = backend
        self.params: Params = load_params(checkpoint, spec, "float32", backend, progress=False)
        self.kv: KV = backend.alloc_kv(spec.kv_spec(PAGE, "float32"), max(PAGES) + 1)
        self.step: Compiled = backend.compile(make_step(spec), Limits(64, 1, 64))

    def __call__(self, ids: list[int], start: int) -> Any:
        """Logits [V] after the last of `ids`, whose first has position `start`."""
        n, positions = len(ids), range(start, start + len(ids))
        slots = [PAGES[p // PAGE] * PAGE + p % PAGE for p in positions]
        columns = (ids, positions, slots, [0, n], [start + n], [PAGES], [n - 1], [-1] * n)
        batch = HostBatch(*(np.array(c, np.int32) for c in columns))
        logits, self.kv = self.step(self.params, self.kv, self.backend.prepare(batch))
        return self.backend.fetch(logits).result()[0]


def test_demo_model(backend: Backend, demo_reference: Any) -> None:
    """The real weights: Q4_1 and Q8_0 dequantised, rope rows put back, against transformers' own reader of the file."""
    path = fetch_demo()
    tokenizer = load_tokenizer(open_checkpoint(str(path)))
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    ids = tokenizer.encode(prompt, add_special=False)
    run = Runner(backend, str(path))
    want = reference(demo_reference, ids)
    assert_close(run(ids[:-2], 0), want[-3])
    assert_close(run(ids[-2:-1], len(ids) - 2), want[-2])
    assert_close(run(ids[-1:], len(ids) - 1), want[-1])
