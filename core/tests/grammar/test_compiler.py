"""The compiler alone: what one output uses up must not harm another, and specials are never allowed."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from polyradix.grammar import compiler as module
from polyradix.grammar.compiler import LlgCompiler
from polyradix.grammar.spec import GrammarError, GrammarSpec, Matcher
from polyradix.serve.fake import ByteTokenizer

HUNGRY = GrammarSpec(kind="regex", source="(a|b)*a(a|b){14}c")  # a lexer state for nearly every last 14 letters
VOCAB = 300


def _allowed(matcher: Matcher) -> set[int]:
    row = np.zeros(-(-VOCAB // 32), np.int32)
    matcher.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def _walk(matcher: Matcher, letters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(letters):
        assert {97, 98} <= _allowed(matcher) <= {97, 98, 99}
        matcher.accept(int(rng.integers(97, 99)))


def test_one_output_cannot_use_up_what_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 2000)
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    shared = compiler.compile(HUNGRY).result()
    first, other = shared.matcher(), shared.matcher()
    _walk(other, 100, seed=1)
    with pytest.raises(GrammarError, match="too many states"):
        _walk(first, 5000, seed=2)
    _walk(other, 50, seed=3)
    assert compiler.compile(HUNGRY).result() is not shared
    _walk(compiler.compile(HUNGRY).result().matcher(), 100, seed=4)
    compiler.close()


def test_ends_and_padding_are_masked_until_the_end() -> None:
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    matcher = compiler.compile(GrammarSpec(kind="regex", source="[^x]{2}")).result().matcher()
    assert _allowed(matcher) < set(range(256)) - {ord("x")}
    assert ord("y") in _allowed(matcher)
    assert not matcher.accept(ord("y"))
    assert matcher.accept(ord("z"))
    assert _allowed(matcher) == {256}
    compiler.close()


def test_forced_tokens_are_the_text_that_must_come() -> None:
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    schema = '{"type": "object", "properties": {"key": {"type": "integer"}}, "required": ["key"]}'
    matcher = compiler.compile(GrammarSpec(kind="json_schema", source=schema)).result().matcher()
    forced = bytes(matcher.forced()).decode()
    assert re.fullmatch(r'\{"key": ', forced)
    for token in forced.encode():
        assert _allowed(matcher) == {token}
        matcher.accept(token)
    assert matcher.forced() == []
    compiler.close()


def test_many_outputs_of_one_grammar_have_several_lexers_and_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MASK_THREADS", 2)
    monkeypatch.setattr(module, "CHEAP_SECONDS", 10)
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    grammar = compiler.compile(GrammarSpec(kind="regex", source="[ab]{3}c")).result()
    rows = list(enumerate(grammar.matcher() for _ in range(3 * module.USERS)))
    users = [matcher.lexer for _, matcher in rows]
    assert sorted(users.count(lexer) for lexer in set(users)) == [6, 6]
    mask = np.zeros((len(rows), -(-VOCAB // 32)), np.int32)
    for allowed in ({97, 98}, {97, 98}, {97, 98}, {99}):
        assert compiler.fill(rows, mask) == []
        assert (mask == mask[0]).all()
        assert _allowed(rows[0][1]) == allowed
        for row, matcher in rows:
            matcher.accept(max(allowed) - row % len(allowed))
    compiler.close()


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("json_schema", '{"type": "integer", "multipleOf": 999983}', "multipleOf is 999983"),
        ("json_schema", '{"multiple\\u004ff": 86400}', "multipleOf is 86400"),
        ("json_schema", '{"allOf": [{"multipleOf": 97}, {"multipleOf": 8.9}, {"multipleOf": 83}]}', "97, 8.9, 83"),
        ("json_schema", '{"prefixItems": [{"multipleOf": 9001}, {"multipleOf": 9001}]}', "9001; expected"),
        ("structural_tag", '{"structures": [{"begin": "a", "schema": {"multipleOf": 30011}, "end": "b"}]}', "30011"),
        ("ebnf", 'start: "a" %json {"multipleOf": 10007}', "multipleOf is 10007"),
        ("ebnf", "start: X\nX: ~/(.*a.{24}.*)/ & /.{40}/", "operator ~"),
        ("ebnf", 'start: <"> X <">\nX: /[a-z]+/ & ~(/a/ | "b")', "operator ~"),
        ("json_schema", '{"$ref": "#"}', "nothing can match it"),
    ],
)
def test_what_would_compile_for_minutes_is_refused_unseen(kind: Any, source: str, reason: str) -> None:
    """The library cannot be interrupted, and all later grammars would wait for it."""
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    with pytest.raises(GrammarError, match=re.escape(reason)):
        compiler.compile(GrammarSpec(kind=kind, source=source)).result()
    compiler.close()


@pytest.mark.parametrize(
    ("kind", "source", "text"),
    [
        ("json_schema", '{"type": "integer", "multipleOf": 1e4, "minimum": 1, "maximum": 19999}', "10000"),
        ("json_schema", '{"enum": ["\\"multipleOf\\": 999983"]}', '"\\"multipleOf\\": 999983"'),
        ("json_schema", '{"prefixItems": [{"multipleOf": 4999}, {"const": 1}, {"multipleOf": 128}]}', "[4999, 1, 256]"),
        ("ebnf", 'start: "~" /~/ X // ~\nX: "a" ~ 3', "~~aaa"),
        ("ebnf", 'root ::= "~" [~]', "~~"),
    ],
)
def test_what_only_looks_like_it_is_taken(kind: Any, source: str, text: str) -> None:
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    matcher = compiler.compile(GrammarSpec(kind=kind, source=source)).result().matcher()
    for token in text.encode():
        assert token in _allowed(matcher)
        matcher.accept(token)
    compiler.close()


def test_thousands_of_choices() -> None:
    compiler = LlgCompiler(ByteTokenizer, VOCAB)
    choices = [f"c{i}" for i in range(5000)]
    matcher = compiler.compile(GrammarSpec(kind="choice", source=json.dumps(choices))).result().matcher()
    for token in b"c4999":
        assert token in _allowed(matcher)
        matcher.accept(token)
    assert _allowed(matcher) == {256}
    compiler.close()
