"""The tokenizer inside a GGUF file, rebuilt: vocabulary and merges are there, the rules before them only as a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from polyradix.graph.errors import ModelError

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _digits,
    "qwen2": lambda: _split(_WORDS % ""),
    "deepseek-r1-qwen": lambda: _split(_WORDS % ""),
    "llama-bpe": lambda: _split(_WORDS % "{1,3}"),
}


def gguf_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Raises ModelError for a kind of tokenizer that we cannot rebuild."""
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise ModelError(f"tokenizer.ggml.model is {model!r}; expected 'gpt2' (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(PRE_TOKENIZERS)}")
    for name in ("tokens", "merges", "token_type"):
        if not isinstance(meta.get(f"tokenizer.ggml.{name}"), list):
            raise ModelError(f"tokenizer.ggml.{name} is missing; expected a list")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    out = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe"))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        out.normalizer = NFC()  # type: ignore[no-untyped-call]
    out.pre_tokenizer = PRE_TOKENIZERS[pre]()
    out.decoder = ByteLevelDecoder()
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            out.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return out
