"""Tokenizers from files and from GGUF; the `tokenizers` library and hand-made vocabularies are the reference."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from polyradix.engine.chat import ChatTemplateError
from polyradix.engine.tokenizer import Tokenizer, load_tokenizer
from polyradix.graph.checkpoint import Checkpoint
from polyradix.graph.errors import CheckpointError, ModelError

CORPUS = ["the quick brown fox 12 34 the", "héllo wörld 日本語 😀 the the", "a  b\n\nc\tthe end's end"]
TEXTS = ["", "the fox", " two  spaces\n\n\ttab ", "日本語 😀 e\u0301 ß", "<s>the</s> <|im_end|>", "x" * 3000]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "<{{ m.role }}>{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ extra | tojson if extra }}"
)


def byte_level() -> tokenizers.Tokenizer:
    out = tokenizers.Tokenizer(models.BPE())
    out.pre_tokenizer, out.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    out.train_from_iterator(CORPUS, trainer)
    out.enable_truncation(16)
    out.enable_padding(length=8)
    return out


def byte_fallback() -> tokenizers.Tokenizer:
    vocab = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "t", "h", "e", "th", "the", "\u2581the"]
    ids = {token: i for i, token in enumerate(vocab)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    out = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    out.normalizer = normalizers.Replace(" ", "\u2581")
    out.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return out


def folder(path: Path, inner: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Checkpoint:
    inner.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return checkpoint(folder=path)


def checkpoint(**fields: Any) -> Checkpoint:
    base: dict[str, Any] = {
        "source": "m",
        "config": {"eos_token_id": 1},
        "names": frozenset(),
        "read": None,
        "where": str,
    }
    return Checkpoint(**{**base, **fields})


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_folder_agrees_with_the_library(tmp_path: Path, make: Any) -> None:
    inner = make()
    ours = load_tokenizer(folder(tmp_path, inner))
    inner.no_truncation()
    inner.no_padding()
    assert ours.vocab_size == inner.get_vocab_size()
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == inner.encode(text).ids
        assert ours.decode(ids) == inner.decode(ids)
        assert ours.decode(ids, skip_special=False) == text == b"".join(map(ours.token_bytes, ids)).decode()


LIBRARY = byte_level()
OURS = Tokenizer(LIBRARY)


@given(st.lists(st.integers(0, LIBRARY.get_vocab_size() - 1), max_size=30), st.booleans())
def test_any_ids_decode_as_in_the_library(ids: list[int], skip: bool) -> None:
    assert OURS.decode(ids, skip) == LIBRARY.decode(ids, skip_special_tokens=skip)


@given(st.text(), st.integers(1, 4))
def test_streamed_text_is_the_text(text: str, size: int) -> None:
    ids, detokenizer = OURS.encode(text), OURS.detokenizer(skip_special=False)
    parts = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(parts) + detokenizer.finish() == text


def test_ids_without_a_token() -> None:
    assert (OURS.token_bytes(10**6), OURS.token_bytes(-1), OURS.decode([10**6])) == (b"", b"", "")


def test_bos_is_added_once(tmp_path: Path) -> None:
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    ours = load_tokenizer(folder(tmp_path, byte_level(), config))
    bos = ours.encode("<s>", add_special=False)
    assert len(bos) == 1
    assert ours.encode("the") == bos + ours.encode("the", add_special=False)
    assert ours.encode("<s>the") == ours.encode("the")


def test_eos_ids(tmp_path: Path) -> None:
    given = folder(tmp_path, byte_level(), {"chat_template": TEMPLATE})
    end = byte_level().token_to_id("<|im_end|>")
    assert load_tokenizer(given).eos_ids == {1, end}
    config = checkpoint(folder=tmp_path, config={"eos_token_id": [5, 6]}, generation_config={"eos_token_id": 7})
    assert load_tokenizer(config).eos_ids == {5, 6, 7, end}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(given).eos_ids == {1}, "without a template nothing says that <|im_end|> ends a turn"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": TEMPLATE},
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]},
        None,
    ],
)
def test_chat_prompt(tmp_path: Path, config: dict[str, Any] | None) -> None:
    if config is None:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    ours = load_tokenizer(folder(tmp_path, byte_level(), {"bos_token": "<s>", **(config or {})}))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é"}]
    want = "<s><user>hi<|im_end|>\n<assistant>é<|im_end|>\n"
    assert ours.chat_prompt(chat) == want + "<assistant>"
    assert ours.chat_prompt(chat, add_generation_prompt=False) == want
    assert ours.chat_prompt([], extra={"é": [1]}) == '<s><assistant>{"é": [1]}'


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, [], "no chat template"),
        ("{% if %}", [], "broken"),
        (TEMPLATE, [{"role": "tool", "content": ""}], "no tools here"),
        ("{{ messages[0]['role'] + 'x' }}", [{}], "role"),
        ("{{ messages[0]['content'] + 'x' }}", [{"content": [1]}], "rejects"),
        ("{{ messages.append(1) }}", [], "rejects"),
        ("{{ messages.__class__.__mro__ }}", [], "unsafe"),
    ],
)
def test_chat_errors(template: str | None, messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ChatTemplateError, match=said):
        Tokenizer(byte_level(), template=template).chat_prompt(messages)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(checkpoint(folder=tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable"):
        load_tokenizer(checkpoint(folder=tmp_path))
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(CheckpointError, match="decoder is none"):
        load_tokenizer(folder(tmp_path, words))


def test_dummy_has_a_token_per_byte(tmp_path: Path) -> None:
    ours = load_tokenizer(checkpoint(folder=tmp_path, dummy=True))
    assert ours.encode("é a") == list("é a".encode())
    assert ours.decode(range(97, 100)) == "abc"


def gguf(pre: str, pieces: list[str], merges: list[str], /, **more: Any) -> Tokenizer:
    """A GGUF vocabulary: one control token, `pieces`, then the byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_end|>", *pieces, *(a for a in alphabet if a not in pieces)]
    meta = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": merges,
        "token_type": [3] + [1] * (len(tokens) - 1),
        "bos_token_id": 0,
        **more,
    }
    return load_tokenizer(checkpoint(gguf={f"tokenizer.ggml.{k}": v for k, v in meta.items()}))


NUMBERS = (["1", "2", "3", "4", "12", "123", "1234", "34"], ["1 2", "12 3", "123 4", "3 4"])


@pytest.mark.parametrize(
    ("pre", "want"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("gpt-2", ["1234"]),
        ("default", ["1234"]),
    ],
)
def test_gguf_numbers(pre: str, want: list[str]) -> None:
    ours = gguf(pre, *NUMBERS, add_bos_token=False)
    assert [ours.token_bytes(i).decode() for i in ours.encode("1234")] == want


def test_gguf_words() -> None:
    pieces = ["a", "b", "ab", "\u0120", "\u0120ab"]
    merges = ["a b", "\u0120 ab"]
    for pre in ("smollm", "qwen2", "llama-bpe", "gpt-2"):
        ours = gguf(pre, pieces, merges, add_bos_token=False)
        spelled = [ours.token_bytes(i).decode() for i in ours.encode("ab ab  ab<|im_end|>")]
        assert spelled == ["ab", " ab", " ", " ab", "<|im_end|>"]
        assert ours.decode(ours.encode("é 日\n😀<|im_end|>")) == "é 日\n😀"


def test_gguf_normal_form_and_bos() -> None:
    assert gguf("qwen2", [], []).encode("e\u0301") == gguf("qwen2", [], []).encode("é")
    assert gguf("smollm", [], []).encode("e\u0301") != gguf("smollm", [], []).encode("é")
    assert gguf("llama-bpe", [], []).encode("a")[0] == 0, "llama-bpe files mean a bos token unless they deny it"
    assert gguf("qwen2", [], []).encode("a")[0] != 0


def test_gguf_sentencepiece() -> None:
    tokens = ["<unk>", "<s>", "\u2581", "a", "b", "ab", "ba", "\u2581ab", *(f"<0x{b:02X}>" for b in range(256))]
    scores = [0.0, 0.0, -5.0, -6.0, -7.0, -2.0, -1.0, -3.0] + [0.0] * 256
    kinds = [2, 3] + [1] * 6 + [6] * 256
    more = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, "add_bos_token": True}
    ours = gguf("default", [], [], **{**more, "bos_token_id": 1})
    spell = [tokens[i] for i in ours.encode("ab")]
    assert spell == ["<s>", "\u2581ab"]
    assert [tokens[i] for i in ours.encode("aba", False)] == ["\u2581", "a", "ba"], "ba scores above ab"
    assert ours.decode(ours.encode("é")) == " é"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'; expected one of .*smollm"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ],
)
def test_gguf_errors(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        gguf("smollm", [], [], **change)


def test_other_threads_run_while_a_text_is_encoded() -> None:
    """A stream must not stall for a second because another client sent a long prompt."""
    tok = Tokenizer(byte_level())
    thread = threading.Thread(target=tok.encode, args=("word " * 60_000,))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 5


def test_the_longest_token() -> None:
    assert Tokenizer(byte_fallback()).longest == len("<unk>")
    assert Tokenizer(byte_level()).longest == len("<|im_end|>")
