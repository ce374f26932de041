"""Jump-forward through the step loop on the NumPy backend, with a tokenizer that merges across what is forced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from polyradix.engine.offline import Engine
from polyradix.engine.tokenizer import Tokenizer as OurTokenizer
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.grammar.compiler import LlgCompiler
from polyradix.grammar.exact import Exact
from polyradix.grammar.spec import GrammarSpec
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.schedule.params import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999},
        "continent": {"enum": ["Europe", "Asia", "Africa"]},
        "is_capital": {"type": "boolean"},
    },
    "required": ["name", "population", "continent", "is_capital"],
    "additionalProperties": False,
}
CORPUS = [json.dumps({"name": n, "population": 10, "continent": c, "is_capital": True})
          for n in ("Rome", "Paris", "Lima") for c in ("Europe", "Asia", "Africa")]  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "float32",
    "eos_token_id": 0, "vocab_size": 420,
}  # fmt: skip


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Llama 2's: a space goes before every text, and bytes have tokens of their own."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<0x00>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    specials = ["<end>", *(f"<0x{i:02X}>" for i in range(256))]
    alphabet = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=385, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(data))


@pytest.fixture(scope="module", params=[_byte_level, _sentencepiece], ids=["byte-level", "sentencepiece"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    request.param().save(str(path / "tokenizer.json"))
    return path


def _engine(folder: Path, jump: bool, overlapped: bool, **options: Any) -> Engine:
    base: dict[str, Any] = {"kv_pages": 200, "max_seqs": 8, "page_size": 4, "max_tokens_per_step": 24}
    base |= {"load_format": "dummy", "progress": False, "device": "numpy"}
    return Engine(str(folder), jump_forward=jump, backend_options={"async_launch": overlapped}, **(base | options))


def _spec(schema: object = SCHEMA) -> dict[str, str]:
    return {"kind": "json_schema", "source": json.dumps(schema)}


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_outputs_are_equal_in_fewer_steps(folder: Path, temperature: float) -> None:
    def run(jump: bool, overlapped: bool) -> tuple[list[tuple[Any, ...]], int]:
        engine = _engine(folder, jump, overlapped)
        done = engine.generate([f"city {i}" for i in range(5)], grammar=_spec(), max_tokens=90, seed=3,
                               temperature=temperature)  # fmt: skip
        engine.core.scheduler.check()
        assert engine.core.stats().pages_used == 0
        return [(c.text, c.tokens, c.finish, c.prompt_tokens) for c in done], engine.core.stats().steps

    results = [run(jump, overlapped) for jump in (False, True) for overlapped in (False, True)]
    assert all(result == results[0][0] for result, _ in results)
    for text, _, finish, _ in results[0][0]:
        assert finish == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    plain, plain_overlapped, jumping, jumping_overlapped = [steps for _, steps in results]
    assert jumping < jumping_overlapped < min(plain, plain_overlapped)


CHOICES = {
    "type": "object",
    "properties": {name: {"type": "boolean"} for name in ("is_capital", "continent", "population", "name")},
    "required": ["is_capital", "continent", "population", "name"],
    "additionalProperties": False,
}


def test_a_step_waits_where_most_rows_are_about_to_jump(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step made before would compute one token of theirs; where they are few, nobody waits for them."""

    def run(free: int) -> tuple[dict[str, list[int]], int, int]:
        engine = _engine(folder, True, True)
        engine.generate("x", grammar=_spec(CHOICES), max_tokens=1)  # compiles it
        core, known = engine.core, list[bool]()
        prepare = core.backend.prepare
        core.backend.prepare = lambda b, prev=None: known.append(b.from_prev.max() < 0) or prepare(b, prev)
        spec = GrammarSpec(kind="json_schema", source=json.dumps(CHOICES))
        for i in range(3):
            core.submit(f"g{i}", np.arange(5, dtype=np.int32), SamplingParams(max_tokens=90, seed=i, grammar=spec))
        for i in range(free):
            params = SamplingParams(max_tokens=40, seed=i, ignore_eos=True)
            core.submit(f"f{i}", np.arange(9, dtype=np.int32) + i, params)
        out: dict[str, list[int]] = {}
        while core.has_work:
            for chunk in core.step():
                out.setdefault(chunk.rid, []).extend(chunk.tokens)
        return out, len(known), int(sum(known))

    tokens, steps, waits = run(0)
    mixed = run(4)
    monkeypatch.setattr("polyradix.schedule.jump.expected", lambda plan: False)
    hasty = run(0)
    assert tokens == hasty[0]
    assert steps <= hasty[1] - 2
    assert waits > hasty[2]
    assert mixed == run(4)


def test_jumps_may_be_rows_of_one_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where steps of such rows are captured: the same tokens, and no chunk that fits into rows is left."""
    plain, jumping = _engine(folder, False, True), _engine(folder, True, True, max_seqs=24)
    core = jumping.core
    monkeypatch.setattr(core.scheduler, "config", replace(core.scheduler.config, single_rows=True))
    shapes: list[tuple[int, int]] = []
    prepare = core.backend.prepare
    monkeypatch.setattr(core.backend, "prepare", lambda b, prev: shapes.append(b.sizes[:2]) or prepare(b, prev))
    assert _texts(jumping) == _texts(plain)
    assert core.stats().jumped_tokens > 0
    assert max(rows for _, rows in shapes) > 3
    assert all(tokens == rows for tokens, rows in shapes)
    core.scheduler.check()


def _texts(engine: Engine, **params: Any) -> list[Any]:
    params = {"max_tokens": 90, "seed": 5, "grammar": _spec()} | params
    return [(c.text, c.tokens, c.finish) for c in engine.generate(["a", "bb", "ccc"], **params)]


@pytest.mark.parametrize("overlapped", [False, True])
def test_limits_and_stops_are_where_they_were(folder: Path, overlapped: bool) -> None:
    plain, jumping = (_engine(folder, jump, overlapped, kv_pages=60) for jump in (False, True))
    whole = _texts(plain)
    length = max(len(tokens) for _, tokens, _ in whole)
    cases: list[dict[str, Any]] = [{"max_tokens": n} for n in range(1, length + 1, 3)]
    cases += [{"stop": [text]} for text in ("name", 'e": ', "popul", '"continent', "ital", "}")]
    cases += [{"stop_token_ids": (token,)} for token in sorted({t for _, tokens, _ in whole for t in tokens})[::2]]
    for case in cases:
        assert _texts(jumping, **case) == _texts(plain, **case), case
    assert jumping.core.stats().jumped_tokens > 0
    assert jumping.core.stats().pages_used == 0


def test_logprobs_are_of_every_token(folder: Path) -> None:
    plain, jumping = (_engine(folder, jump, True) for jump in (False, True))
    expected, got = (engine.generate("x", grammar=_spec(), seed=5, max_tokens=90, logprobs=2)[0]
                     for engine in (plain, jumping))  # fmt: skip
    assert got == expected
    assert len(got.logprobs) == len(got.tokens)
    assert jumping.core.stats().jumped_tokens == 0


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_prefix_cache_has_the_true_ids_and_kv(folder: Path, overlapped: bool) -> None:
    jumping, fresh = _engine(folder, True, overlapped), _engine(folder, True, False)
    first = jumping.generate("x", grammar=_spec(), seed=5, max_tokens=90)[0]
    turn = [*jumping.tokenizer.encode("x"), *first.tokens, 40, 41]
    again = jumping.generate([turn], max_tokens=8, temperature=0.0, logprobs=1)[0]
    assert again.cached_tokens >= len(first.tokens) - 8
    miss = fresh.generate([turn], max_tokens=8, temperature=0.0, logprobs=1)[0]
    assert miss.cached_tokens == 0
    assert (again.tokens, again.logprobs) == (miss.tokens, miss.logprobs)


def test_other_rows_get_what_they_got(folder: Path) -> None:
    def run(jump: bool | None) -> dict[str, list[int]]:
        core = _engine(folder, bool(jump), True).core
        for i in range(3):
            free = SamplingParams(max_tokens=40, seed=i, ignore_eos=True)
            core.submit(f"f{i}", np.arange(9, dtype=np.int32) + i, free)
            if jump is not None:
                spec = GrammarSpec(kind="json_schema", source=json.dumps(SCHEMA))
                core.submit(f"g{i}", np.arange(5, dtype=np.int32), SamplingParams(max_tokens=60, seed=i, grammar=spec))
        out: dict[str, list[int]] = {}
        while core.has_work:
            for chunk in core.step():
                out.setdefault(chunk.rid, []).extend(chunk.tokens)
            core.scheduler.check()
        return out

    alone, masked, jumping = run(None), run(False), run(True)
    assert masked == jumping
    assert {rid: tokens for rid, tokens in jumping.items() if rid in alone} == alone


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=30))
def test_forced_text_is_exactly_its_tokens(folder: Path, text: str) -> None:
    """Also of text that no model saw; and what a tokenizer splits without a change is split so."""
    tokenizer = load_tokenizer(open_checkpoint(str(folder), load_format="dummy"))
    tokens = Exact(tokenizer)(text)
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()
    plain = tokenizer.encode(text, add_special=False)
    if tokenizer.decode(plain) == text:
        assert tokens == plain


def test_text_that_a_tokenizer_would_normalise_is_kept() -> None:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    text = '{"Cafe\u0301": '
    ours = OurTokenizer(tokenizer, [0])
    assert ours.decode(ours.encode(text)) != text
    assert ours.decode(Exact(ours)(text)) == text


def test_forced_tokens_are_the_tokenizers_own(folder: Path) -> None:
    """At every border of the whole text's tokens, what is forced is what comes next in them."""
    tokenizer = load_tokenizer(open_checkpoint(str(folder), load_format="dummy"))
    compiler = LlgCompiler(lambda: tokenizer, CONFIG["vocab_size"])
    grammar = compiler.compile(GrammarSpec(kind="json_schema", source=json.dumps(SCHEMA))).result()
    count = 0
    for name, continent in (("Oslo", "Europe"), ("", "Asia"), ("né\\n", "Africa")):
        value = f'{{"name": "{name}", "population": 120, "continent": "{continent}", "is_capital": true}}'
        tokens, matcher = Exact(tokenizer)(value), grammar.matcher()
        for at, token in enumerate(tokens):
            forced = matcher.forced()
            assert forced == tokens[at : at + len(forced)]
            count += len(forced)
            done = matcher.accept(token)
        assert done
    assert count > 40
    compiler.close()
