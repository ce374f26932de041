"""Grammars through the step loop on the NumPy backend, judged by Python's own json and re and by jsonschema."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk
from polyradix.grammar import compiler
from polyradix.grammar.spec import MAX_SOURCE, GrammarSpec
from polyradix.schedule.params import InvalidParam, SamplingParams

VOCAB = 300  # more than the tokenizer's 257, as in models that pad theirs
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 256,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Any:
    def make(overlapped: bool = False, device: str = "numpy", **options: Any) -> EngineCore:
        base: dict[str, Any] = {"kv_pages": 200, "max_seqs": 8, "page_size": 4, "max_tokens_per_step": 24}
        base |= {"load_format": "dummy", "progress": False, "model": str(folder), "device": device}
        base["backend_options"] = {"async_launch": overlapped}
        return EngineCore(EngineConfig(**(base | options)))

    return make


def _submit(core: EngineCore, rid: str, spec: GrammarSpec | None, **params: Any) -> None:
    prompt = np.arange(1, 14, dtype=np.int32) + len(rid)
    ignore = spec is None
    core.submit(
        rid, prompt, SamplingParams(**({"max_tokens": 300, "seed": 7, "ignore_eos": ignore} | params), grammar=spec)
    )


def _drain(core: EngineCore) -> dict[str, list[Chunk]]:
    out: dict[str, list[Chunk]] = {}
    while core.has_work:
        for chunk in core.step():
            out.setdefault(chunk.rid, []).append(chunk)
        core.scheduler.check()
    return out


def _text(chunks: list[Chunk]) -> str:
    to_byte = pre_tokenizers.ByteLevel.alphabet()
    assert len(to_byte) == 256
    decoder = decoders.ByteLevel()
    ids = [t for c in chunks for t in (c.tokens if c.stop_token is None else c.tokens[:-1])]
    assert all(t < 256 for t in ids), "a special or padded token was sampled"
    text: str = decoder.decode([ALPHABET[t] for t in ids])
    return text


def _tokens(chunks: list[Chunk]) -> list[int]:
    return [t for c in chunks for t in c.tokens]


def _schema(schema: object, **more: Any) -> GrammarSpec:
    return GrammarSpec(kind="json_schema", source=json.dumps(schema), **more)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_schemas_hold(make: Any, overlapped: bool, temperature: float) -> None:
    core = make(overlapped)
    for i in range(6):
        _submit(core, f"r{i}", _schema(PERSON), temperature=temperature, seed=i)
    texts = {rid: (_text(chunks), chunks[-1].finish) for rid, chunks in _drain(core).items()}
    assert len(texts) == 6
    for text, finish in texts.values():
        jsonschema.validate(json.loads(text), PERSON)
        assert finish == "stop"
    assert temperature == 0 or len(set(texts.values())) > 1
    assert core.stats().pages_used == 0


@pytest.mark.parametrize("pattern", ["[a-f]{3,9}", "(yes|no)!", r"\d{2}:\d{2}", "x*y"])
def test_regular_expressions_match_whole(make: Any, pattern: str) -> None:
    core = make(True)
    _submit(core, "r", GrammarSpec(kind="regex", source=pattern), temperature=1.0)
    chunks = _drain(core)["r"]
    assert chunks[-1].finish == "stop"
    assert re.fullmatch(pattern, _text(chunks))


def test_an_output_ends_where_nothing_may_follow(make: Any) -> None:
    core = make(True)
    _submit(core, "fixed", GrammarSpec(kind="regex", source="abc"), temperature=1.0)
    _submit(core, "short", GrammarSpec(kind="regex", source="abc"), max_tokens=2)
    _submit(core, "open", GrammarSpec(kind="regex", source="x{2,}"), max_tokens=60, temperature=1.5)
    out = _drain(core)
    assert (len(_tokens(out["fixed"])), out["fixed"][-1].finish, out["fixed"][-1].stop_token) == (3, "stop", None)
    assert (_text(out["short"]), out["short"][-1].finish) == ("ab", "length")
    assert re.fullmatch("x{2,}", _text(out["open"]))
    assert (out["open"][-1].finish, out["open"][-1].stop_token) == ("stop", 256)


def test_choices_and_grammars(make: Any) -> None:
    core = make(True)
    choices = ["red", 'gr"een', "blüe\n"]
    for i in range(6):
        _submit(core, f"c{i}", GrammarSpec(kind="choice", source=json.dumps(choices)), seed=i)
    _submit(core, "lark", GrammarSpec(kind="ebnf", source='start: "(" start ")" | "x"'), seed=3)
    _submit(core, "gbnf", GrammarSpec(kind="ebnf", source='root ::= "[" root "]" | "y"'), seed=3)
    texts = {rid: _text(chunks) for rid, chunks in _drain(core).items()}
    assert re.fullmatch(r"(\(*)x(\)*)", texts.pop("lark"))
    assert re.fullmatch(r"(\[*)y(\]*)", texts.pop("gbnf"))
    assert set(texts.values()) <= set(choices)
    assert len(set(texts.values())) > 1


@pytest.mark.parametrize("pages", [200, 24])  # 24: requests are put back and computed again
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_free_rows_are_the_same_beside_grammars(make: Any, pages: int, temperature: float) -> None:
    def run(overlapped: bool, grammars: int) -> tuple[dict[str, list[int]], int]:
        core = make(overlapped, kv_pages=pages)
        for i in range(3):
            _submit(core, f"f{i}", None, temperature=temperature, seed=i, max_tokens=30)
        for i in range(grammars):
            _submit(core, f"g{i}", _schema(PERSON), temperature=temperature, seed=i, max_tokens=50)
        return {rid: [t for c in part for t in c.tokens] for rid, part in _drain(core).items()}, core.stats().retracted

    alone, _ = run(False, 0)
    results = [run(False, 3), run(True, 3)]
    for together, retracted in results:
        assert {rid: tokens for rid, tokens in together.items() if rid in alone} == alone
        assert (retracted > 0) == (pages == 24)
    assert results[0][0] == results[1][0]  # grammar rows too, overlapped or not


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_schema({"type": "integer", "minimum": 5, "maximum": 3}), "nsatisfiable"),
        (_schema({"not": {"type": "string"}}), "not"),
        (GrammarSpec(kind="json_schema", source="{"), "EOF"),
        (GrammarSpec(kind="json_schema", source="[" * 5000), "recursion"),
        (GrammarSpec(kind="regex", source="(a{1000}){1000}"), "too many"),
        (GrammarSpec(kind="regex", source="["), "regex"),
        (GrammarSpec(kind="ebnf", source="start: ("), "xpected"),
        (GrammarSpec(kind="choice", source="[]"), "at least one"),
        (
            _schema({"$ref": "#/$defs/a", "$defs": {"a": {
                "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"],
                "additionalProperties": False}}}),
            "finite",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused(make: Any, spec: GrammarSpec, reason: str) -> None:
    core = make(True)
    _submit(core, "ok", GrammarSpec(kind="regex", source="ab"))
    assert _text(_drain(core)["ok"]) == "ab"
    _submit(core, "free", None, max_tokens=4)
    _submit(core, "bad", spec)
    chunks: list[Chunk] = []
    while not any(c.rid == "bad" for c in chunks):
        chunks += core.step()
    last = next(c for c in chunks if c.rid == "bad")
    assert (last.finish, last.param) == ("error", "grammar")
    assert re.search(f"{reason}|longer than", last.error)
    chunks += [c for part in _drain(core).values() for c in part]
    assert sum(len(c.tokens) for c in chunks if c.rid == "free") == 4


def test_a_grammar_that_outgrows_its_limits_later_ends_its_request_alone(make: Any) -> None:
    core = make(True)
    _submit(core, "free", None, max_tokens=20)
    _submit(core, "late", GrammarSpec(kind="regex", source="ab", field="here"))
    for _ in range(50):
        core.step()
        req = core.scheduler._known.get("late")
        if req is not None and req.outputs:
            break
    assert req is not None
    assert req.matcher is not None
    req.matcher.accept(99)  # not what the grammar allows: it is broken from now on
    out = _drain(core)
    assert (out["late"][-1].finish, out["late"][-1].param) == ("error", "here")
    assert out["free"][-1].finish == "length"
    assert core.stats().pages_used == 0


def test_too_large_or_without_masks_is_refused_at_once(make: Any) -> None:
    with pytest.raises(InvalidParam, match=f"at most {MAX_SOURCE}") as error:
        _submit(make(), "r", GrammarSpec(kind="regex", source="a" * (MAX_SOURCE + 1), field="structured_outputs"))
    assert error.value.param == "structured_outputs"
    with pytest.raises(InvalidParam, match="null has no masks"):
        _submit(make(device="null"), "r", GrammarSpec(kind="regex", source="a"))


def test_a_request_can_be_aborted_while_its_grammar_is_made(make: Any) -> None:
    core = make()
    _submit(core, "r", _schema(PERSON))
    with pytest.raises(InvalidParam, match="rid"):
        _submit(core, "r", _schema(PERSON))
    assert core.abort("r")
    assert not core.has_work
    assert not core.abort("r")


def test_what_takes_too_long_is_refused_and_kept_for_the_next(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make()
    _submit(core, "ok", GrammarSpec(kind="regex", source="ab"))
    _drain(core)
    slow = _schema({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}})
    with monkeypatch.context() as patch:
        patch.setattr("polyradix.grammar.compiler.LIMIT_SECONDS", 0.005)
        _submit(core, "slow", slow)
        last = _drain(core)["slow"][-1]
    assert (last.finish, last.param) == ("error", "grammar")
    assert "longer than 0.005 s" in last.error
    deadline = time.monotonic() + 120
    while last.finish == "error":
        assert time.monotonic() < deadline
        _submit(core, "again", slow, max_tokens=5)
        last = _drain(core)["again"][-1]
    assert last.finish == "length"


def test_a_flood_of_large_schemas_is_refused_and_delays_no_small_one(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, go, begun = make(max_seqs=64), threading.Event(), list[str]()
    _submit(core, "first", GrammarSpec(kind="regex", source="ab"))
    _drain(core)
    compiled = compiler._Compiled

    def slow(tokenizer: Any, spec: GrammarSpec, specials: dict[str, int]) -> Any:
        begun.append(spec.source)
        assert len(spec.source) < compiler.SMALL or go.wait(120)
        return compiled(tokenizer, spec, specials)

    monkeypatch.setattr(compiler, "_Compiled", slow)
    monkeypatch.setattr(compiler, "LIMIT_SECONDS", 120)
    bigs = [_schema({"const": f"{i}" + "x" * compiler.SMALL}) for i in range(compiler.QUEUE + 8)]
    for i, spec in enumerate(bigs):
        _submit(core, f"big{i}", spec, max_tokens=2)
    _submit(core, "small", GrammarSpec(kind="regex", source="[a-f]{3}"))
    last: dict[str, Chunk] = {}
    while len(last) < 9:
        last |= {chunk.rid: chunk for chunk in core.step() if chunk.finish is not None}
    assert last.pop("small").finish == "stop"
    assert set(last) == {f"big{i}" for i in range(compiler.QUEUE, compiler.QUEUE + 8)}
    assert all("too many others wait" in chunk.error for chunk in last.values())
    monkeypatch.setattr(compiler, "LIMIT_SECONDS", 0.01)
    out = _drain(core)
    assert len(out) == compiler.QUEUE
    assert all("took longer than 0.01 s" in chunks[-1].error for chunks in out.values())
    monkeypatch.setattr(compiler, "LIMIT_SECONDS", 120)
    go.set()
    _submit(core, "again", bigs[-1], max_tokens=2)
    assert _drain(core)["again"][-1].finish == "length"
    assert len(begun) == 3  # what nobody waited for any more was not begun


def test_a_broken_matcher_ends_its_request_alone(make: Any) -> None:
    core = make(True)
    for i in range(4):
        _submit(core, f"r{i}", GrammarSpec(kind="regex", source="[a-z]{20}"), seed=i)
    for _ in range(60):
        core.step()
        known = core.scheduler._known.get("r2")
        if known is not None and known.outputs:
            break
    assert known is not None
    assert known.matcher is not None
    known.matcher.accept(ord("!"))
    out = _drain(core)
    assert out["r2"][-1].finish == "error"
    for rid in ("r0", "r1", "r3"):
        assert out[rid][-1].finish == "stop"


@pytest.mark.parametrize("grammars", [0, 1])
def test_only_the_sampling_waits_for_the_tokens_before(make: Any, grammars: int) -> None:
    core = make(True)
    events: list[str] = []
    step, sample, harvest = core._step, core.backend.sample, core._harvest

    def log(name: str, call: Any) -> Any:
        def logged(*args: Any) -> Any:
            masked = name == "sample" and args[1].mask is not None
            events.append("masked" if masked else name)
            return call(*args)

        return logged

    core._step, core._harvest = log("step", step), log("harvest", harvest)
    core.backend.sample = log("sample", sample)
    for i in range(2):
        _submit(core, f"free{i}", None, max_tokens=12)
    for i in range(grammars):
        _submit(core, f"g{i}", GrammarSpec(kind="regex", source="[a-z]{40}"), max_tokens=12)
        core._gate._waiting["g0"][2].result()
    for _ in range(8):
        core.step()
    order = ["step", "harvest", "masked"] if grammars else ["step", "sample", "harvest"]
    start = 2  # the first step has nothing before it to harvest
    assert events[start : start + 12] == order * 4
