"""Text to token ids and back, and chats to prompts. Knows no request and no device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from polyradix.engine.chat import ChatTemplateError, compile_template, render
from polyradix.engine.detokenizer import Detokenizer
from polyradix.engine.gguf_tokenizer import gguf_tokenizer
from polyradix.graph.checkpoint.base import Checkpoint, read_optional_json
from polyradix.graph.errors import CheckpointError
from polyradix.graph.spec import eos_ids

HARMONY_ENDS = ("<|return|>", "<|call|>")  # where <|end|> ends a message, and not the turn
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>")


class Tokenizer:
    """`template` is the chat template's source, None if the model has none. `named` has the special tokens it may use,
    bos_token and such. `bos` is put before every text that does not begin with it, None for models that want none."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        model_eos: Iterable[int] = (),
        template: str | None = None,
        named: Mapping[str, str] | None = None,
        bos: int | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner, self._template, self._named, self._bos = inner, template, dict(named or {}), bos
        added, spelled = inner.get_added_tokens_decoder(), _spelling(inner)
        self._bytes = {i: spelled(token) for token, i in inner.get_vocab(with_added_tokens=False).items()}
        self._bytes |= {i: token.content.encode() for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.template = template or ""
        ends = HARMONY_ENDS if "<|channel|>" in self.template else TURN_ENDS
        turn_ends = [i for i, t in added.items() if t.content in ends and t.content in self.template]
        self.eos_ids = frozenset([*model_eos, *turn_ends])

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Never truncates. A `chat_prompt` has its special tokens already: encode it without add_special. Other threads
        run meanwhile: of the library's methods only those for batches release Python's lock."""
        ids: list[int] = self._inner.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        if add_special and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """U+FFFD stands for bytes that are no UTF-8. Keeps the space that sentencepiece puts before a first word."""
        skip = self.special_ids if skip_special else frozenset[int]()
        return b"".join([self.token_bytes(i) for i in ids if i not in skip]).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to a text; none for an id without a token (models pad their vocabulary)."""
        return self._bytes.get(token, b"")

    @property
    def vocab_size(self) -> int:
        return int(self._inner.get_vocab_size())

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._bytes.values()))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt that asks for the next message. `kwargs` are more variables for the template.

        Raises ChatTemplateError.
        """
        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        return render(self._compiled, messages, {**self._named, **defaults, **kwargs})

    def detokenizer(
        self, stop: Sequence[str] = (), skip_special: bool = True, include_stop: bool = False
    ) -> Detokenizer:
        return Detokenizer(self, stop, skip_special, include_stop)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self._template is None:
            raise ChatTemplateError("this model has no chat template; send a prompt to the completions API instead")
        return compile_template(self._template)


def _spelling(inner: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """From a token as the vocabulary writes it to its bytes."""
    decoder = inner.decoder.__getstate__().decode() if inner.decoder else "none"
    if "ByteLevel" in decoder:
        return _from_byte_level
    if "ByteFallback" in decoder or "Metaspace" in decoder:
        return _from_sentencepiece
    raise CheckpointError(f"tokenizer.json: decoder is {decoder[:200]}; expected ByteLevel, ByteFallback or Metaspace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printable byte is itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Raises CheckpointError for missing or broken files, ModelError for a GGUF tokenizer that we cannot rebuild.

    A dummy checkpoint without a tokenizer gets one token per byte.
    """
    model_eos = eos_ids(checkpoint.config, checkpoint.generation_config or {})
    if checkpoint.gguf is not None:
        return _from_gguf(checkpoint.gguf, model_eos)
    folder = checkpoint.folder
    if folder is not None and (folder / "tokenizer.json").is_file():
        return _from_folder(folder, model_eos)
    if checkpoint.dummy:
        return Tokenizer(_bytes_only(), model_eos)
    raise CheckpointError(f"{checkpoint.source}: no tokenizer.json")


def _from_folder(folder: Path, model_eos: Iterable[int]) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a readable tokenizer: {e}") from e
    config = read_optional_json(folder / "tokenizer_config.json") or {}
    known = {**(read_optional_json(folder / "special_tokens_map.json") or {}), **config}
    named = {name: text for name, value in known.items() if name.endswith("_token") and (text := _content(value))}
    bos = (
        inner.token_to_id(named["bos_token"]) if config.get("add_bos_token") is True and "bos_token" in named else None
    )
    return Tokenizer(inner, model_eos, _template(folder, config), named, bos)


def _content(value: object) -> str | None:
    """A special token is written as a string or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template") or (read_optional_json(folder / "chat_template.json") or {}).get(
        "chat_template"
    )
    if isinstance(value, list):  # several, by name
        value = {str(t.get("name")): t.get("template") for t in value if isinstance(t, dict)}.get("default")
    return value if isinstance(value, str) else None


def _from_gguf(meta: Mapping[str, Any], model_eos: Iterable[int]) -> Tokenizer:
    tokens = meta.get("tokenizer.ggml.tokens", [])
    ids = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    add_bos = meta.get("tokenizer.ggml.add_bos_token", meta.get("tokenizer.ggml.pre") == "llama-bpe")
    return Tokenizer(
        gguf_tokenizer(meta), model_eos, meta.get("tokenizer.chat_template"), named, ids["bos"] if add_bos else None
    )


def _bytes_only() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(BPE(_ALPHABET, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    return inner
