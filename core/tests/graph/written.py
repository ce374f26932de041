"""Checkpoints for tests, written by the formats' own writers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from polyradix.backend.protocol import HostArray, Memory, ParamSpec
from polyradix.graph.checkpoint import load_params, open_checkpoint
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2],
    "torch_dtype": "float32",
}
Tensors = dict[str, HostArray]


class Host:
    """A backend that packs a parameter by reading it."""

    def __init__(self, free: int = 1 << 40, tp: int = 1) -> None:
        self.free, self.collectives = free, SimpleNamespace(size=tp)
        self.caps = SimpleNamespace(features=frozenset())

    def memory(self) -> Memory:
        return Memory(self.free, self.free)

    def pack(self, spec: ParamSpec, read: Any) -> tuple[HostArray, HostArray | None]:
        return read(), read("bias") if spec.bias else None


def weights(config: dict[str, Any], dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(5)
    shapes = tensor_shapes(ModelSpec.from_hf_config(config))
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: Tensors, config: dict[str, Any] = CONFIG, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i}.safetensors" for i in range(shards)]
    owner = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if owner[n] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    return folder


def load(path: Path | str, dtype: Any = "float32", **options: Any) -> Any:
    checkpoint = open_checkpoint(str(path), **options)
    spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
    return load_params(checkpoint, spec, dtype, Host(), progress=False)  # type: ignore[arg-type]


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, kind = name.rsplit(".", 1)
    names = GGUF_NAMES | (GEMMA_NAMES if arch.startswith("gemma") else {})
    new = next(new for old, new in names.items() if stem.endswith(old))
    layer = f"blk.{stem.split('.')[2]}." if "layers" in stem else ""
    return f"{layer}{new}.{kind}"


def interleave(w: HostArray, heads: int) -> HostArray:
    """What the public converter does to q and k of architecture llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path: Path, arch: str, config: dict[str, Any], t: Tensors, kind: str = "F32", rope: dict[str, Any] | None = None
) -> Path:
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config["head_dim"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(5000.0)
    w.add_eos_token_id(2)
    if "sliding_window" in config:
        w.add_sliding_window(config["sliding_window"])
    for name, value in (rope or {}).items():
        w.add_tensor("rope_freqs.weight", value) if name == "freqs" else getattr(w, f"add_rope_{name}")(value)
    w.add_array("some.strings", ["a", "é", ""])
    w.add_array("some.numbers", [1, 2, 3])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in t.items():
        part = name.split(".")[-2]
        value = interleave(value, heads[part]) if arch == "llama" and part in heads else value
        value = value + 1 if arch.startswith("gemma") and part.endswith("norm") else value
        if kind != "F32" and value.ndim == 2:
            q = gguf.GGMLQuantizationType[kind]
            w.add_tensor(gguf_name(name, arch), gguf.quants.quantize(value, q), raw_dtype=q)
        else:
            w.add_tensor(gguf_name(name, arch), value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
