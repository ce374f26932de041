"""The tokenizer inside a GGUF file, rebuilt: the vocabulary is there, the rules only as a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from polyradix.graph.errors import ModelError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _digits,
    "qwen2": lambda: _split(_WORDS % ""),
    "deepseek-r1-qwen": lambda: _split(_WORDS % ""),
    "llama-bpe": lambda: _split(_WORDS % "{1,3}"),
}


def gguf_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Raises ModelError for a kind of tokenizer that we cannot rebuild."""
    model = meta.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelError(
            f"tokenizer.ggml.model is {model!r}; expected 'gpt2' (byte-level BPE) or 'llama' (sentencepiece)"
        )
    for name in ("tokens", "token_type", "merges" if model == "gpt2" else "scores"):
        if not isinstance(meta.get(f"tokenizer.ggml.{name}"), list):
            raise ModelError(f"tokenizer.ggml.{name} is missing; expected a list")
    out = _byte_level(meta) if model == "gpt2" else _sentencepiece(meta)
    for token, kind in zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=False):
        if kind in (CONTROL, USER_DEFINED):
            out.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return out


def _byte_level(meta: Mapping[str, Any]) -> Tokenizer:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    out = Tokenizer(BPE(_vocab(meta), merges, ignore_merges=pre == "llama-bpe"))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        out.normalizer = normalizers.NFC()
    out.pre_tokenizer = PRE_TOKENIZERS[pre]()
    out.decoder = decoders.ByteLevel()
    return out


def _sentencepiece(meta: Mapping[str, Any]) -> Tokenizer:
    """Sentencepiece joins the pair whose result scores best: as merges, every way to make a token, best token first."""
    vocab, scores, kinds = _vocab(meta), meta["tokenizer.ggml.scores"], meta["tokenizer.ggml.token_type"]
    rows = []
    for token, i in vocab.items():
        for cut in range(1, len(token) if kinds[i] == NORMAL else 0):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                rows.append((-scores[i], left, right, token[:cut], token[cut:]))
    merges = [(left, right) for *_, left, right in sorted(rows)]
    unknown = meta["tokenizer.ggml.tokens"][meta.get("tokenizer.ggml.unknown_token_id", 0)]
    out = Tokenizer(BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefix = [normalizers.Prepend("\u2581")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    out.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    out.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return out


def _vocab(meta: Mapping[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
