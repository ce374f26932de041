"""GGUF files: metadata to a Hugging Face config, tensors to Hugging Face names and row order, dequantised.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. The header is parsed here because a vocabulary of 50,000
strings takes the general reader seconds.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from polyradix.backend.protocol import HostArray
from polyradix.graph.checkpoint.base import Checkpoint, Stored
from polyradix.graph.errors import CheckpointError, ModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of the models whose queries are not scaled by the head size
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `shape` rows first, `offset` in bytes from the start of the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        (size,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        self.at = start + size
        if self.at > len(self.data):
            raise ValueError("a string runs past the end of the file")
        return str(self.data[start : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        code = f"{count}{_SCALARS[kind]}"
        values = list(struct.unpack_from("<" + code, self.data, self.at))
        self.at += struct.calcsize("<" + code)
        return values


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensor directory. Raises CheckpointError if the file is not whole."""
    try:
        data = np.memmap(path, mode="r").data
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be opened: {e}") from e
    if bytes(data[:4]) != b"GGUF":
        raise CheckpointError(f"{path}: starts with {bytes(data[:4])!r}; expected b'GGUF'")
    try:
        meta, tensors = _header(_Cursor(data))
    except (struct.error, KeyError, TypeError, ValueError, ArithmeticError, MemoryError, RecursionError) as e:
        raise CheckpointError(f"{path}: broken GGUF header: {e}") from e
    for name, t in tensors.items():
        if t.offset + t.nbytes > len(data):
            raise CheckpointError(f"{path}: cut off in tensor {name}: {len(data)} bytes of {t.offset + t.nbytes}")
    return meta, tensors


def _header(c: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    c.at = 4
    version, tensor_count, meta_count = c.scalar("I"), c.scalar("Q"), c.scalar("Q")
    if version not in (2, 3):
        raise ValueError(f"version is {version}; expected 2 or 3")
    meta = {}
    for _ in range(meta_count):
        name = c.string()
        meta[name] = c.value(c.scalar("I"))
    rows = []
    for _ in range(tensor_count):
        name, dims = c.string(), c.scalar("I")
        if not 1 <= dims <= 4:
            raise ValueError(f"tensor {name} has {dims} dimensions; expected 1 to 4")
        shape = tuple(c.scalar("Q") for _ in range(dims))[::-1]
        rows.append((name, shape, GGMLQuantizationType(c.scalar("I")), c.scalar("Q")))
    align = int(meta.get("general.alignment", 32))
    base = -(-c.at // align) * align
    tensors = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise ValueError(f"tensor {name} is there twice")
        block, size = GGML_QUANT_SIZES[kind]
        tensors[name] = Tensor(kind, shape, base + offset, math.prod(shape) // block * size)
    return meta, tensors


def open_gguf(path: Path) -> Checkpoint:
    meta, tensors = read_gguf(path)
    if (parts := meta.get("split.count")) not in (None, 0, 1):
        raise CheckpointError(
            f"{path}: split.count is {parts}; expected one whole file, as llama-gguf-split merges them"
        )
    config = hf_config(path, meta, tensors)
    arch = meta["general.architecture"]
    files = {hf: name for name in tensors if (hf := hf_name(name, arch))}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(name: str) -> HostArray:
        value = _read(path, files[name], tensors[files[name]])
        part = name.split(".")[-2]
        if arch in _GEMMA_27B and part.endswith("norm"):
            return value - np.float32(1)  # which the file's norms have been given
        return _half_split(value, heads[part]) if arch == "llama" and part in heads else value

    return Checkpoint(
        source=str(path),
        config=config,
        names=files.keys(),
        read=read,
        where=lambda name: str(path),
        gguf=meta,
        stored={hf: Stored(t.kind.name, t.nbytes) for hf, n in files.items() if (t := tensors[n]).kind not in _PLAIN},
    )


def _read(path: Path, name: str, t: Tensor) -> HostArray:
    block, size = GGML_QUANT_SIZES[t.kind]
    try:
        raw = np.memmap(path, np.uint8, "r", t.offset, (*t.shape[:-1], t.shape[-1] // block * size))
        if t.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return raw.view(np.float32 if t.kind == GGMLQuantizationType.F32 else np.float16)
        with np.errstate(all="ignore"):
            value: HostArray = dequantize(raw, t.kind)
            return value
    except (NotImplementedError, ValueError) as e:
        raise CheckpointError(f"{path}: tensor {name} of type {t.kind.name} cannot be read: {e}") from e


def _half_split(value: HostArray, heads: int) -> HostArray:
    """Llama files store the two columns of a rope pair side by side; undo it, for weights and biases alike. A shape
    that is wrong stays, as it is named with the expected one."""
    pairs, odd = divmod(len(value), 2 * heads)
    return value if odd else value.reshape(heads, pairs, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def hf_name(name: str, arch: str = "llama") -> str | None:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; None for tensors without a counterpart."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        part = (_LAYER | (_GEMMA if arch in _GEMMA_27B else {})).get(match[2])
        return f"model.layers.{match[1]}.{part}.{match[3]}" if part else None
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else None


def hf_config(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The config.json this file would have had. Raises ModelError for an architecture or value that we do not have."""
    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ModelError(f"{path}: general.architecture is {arch!r}; expected one of {', '.join(ARCHITECTURES)}")

    def get(name: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{name}", default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None
    eos = [meta[k] for k in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if k in meta]
    return {
        "architectures": [ARCHITECTURES[arch]],
        "num_hidden_layers": get("block_count"),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count", derived)),
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(path, get, tensors),
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": eos,
        **(_gemma(arch, get, derived, _rope(path, get, tensors)) if arch in _GEMMA_27B else {}),
    }


def _gemma(arch: str, get: Any, derived: int | None, rope: dict[str, Any]) -> dict[str, Any]:
    """Source of the 27B models' scale: llama.cpp's src/llama-model.cpp, f_attention_scale."""
    large = get("block_count") == _GEMMA_27B[arch]
    scalar = derived if large else get("attention.key_length")
    names = {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    found = {hf: get(name) for hf, name in names.items() if get(name) is not None}
    ropes = {"full_attention": rope} if arch == "gemma3" else rope
    return {"query_pre_attn_scalar": scalar, "rope_parameters": ropes, **found}


def _rope(path: Path, get: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0), "rope_type": "default"}
    kind = get("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        out["freq_factors"] = _read(path, "rope_freqs.weight", tensors["rope_freqs.weight"]).tolist()
    elif kind != "none":
        out |= {"rope_type": kind, "factor": get("rope.scaling.factor")}
        out["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    return out
