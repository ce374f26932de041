"""Structural tags, letter by letter, and special tokens inside them."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from polyradix.grammar.compiler import LlgCompiler
from polyradix.grammar.spec import GrammarError, GrammarSpec
from polyradix.serve.fake import ByteTokenizer

VOCAB = 300
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [("<f=get>", CITY, "</f>"), ("<f=put>", True, "</f>"), ("[add]", CITY, "")]
GET, PUT = '<f=get>{"city": "x"}</f>', "<f=put>[1, {}]</f>"


def structural_tag(tools: Any, triggers: list[str], **switches: bool) -> GrammarSpec:
    structures = [{"begin": begin, "schema": schema, "end": end} for begin, schema, end in tools]
    source = json.dumps({"structures": structures, "triggers": triggers, **switches})
    return GrammarSpec(kind="structural_tag", source=source)


class Special(ByteTokenizer):
    """Token 257 is the special `<|call|>`."""

    @property
    def special_ids(self) -> frozenset[int]:
        return super().special_ids | {257}

    def token_bytes(self, token: int) -> bytes:
        return b"<|call|>" if token == 257 else super().token_bytes(token)


@pytest.fixture(scope="module")
def compiler() -> Any:
    made = LlgCompiler(Special, VOCAB)
    yield made
    made.close()


def _fits(compiler: LlgCompiler, spec: GrammarSpec, text: str) -> bool:
    """Whether it may be sampled, and the output may end there."""
    matcher = compiler.compile(spec).result().matcher()
    ids = [257 if part == "<|call|>" else list(part.encode()) for part in re.split(r"(<\|call\|>)", text)]
    done = False
    for token in np.hstack(ids).astype(int).tolist():
        if done or not _allowed(matcher, token):
            return False
        done = matcher.accept(token)
    return done or _allowed(matcher, 256)


def _allowed(matcher: Any, token: int) -> bool:
    row = np.zeros(-(-VOCAB // 32), np.int32)
    matcher.fill(row)
    return bool(row[token // 32] >> (token % 32) & 1)


@pytest.mark.parametrize(
    ("text", "free", "starts", "one", "call"),
    [
        ("hello <f", True, False, True, False),
        (GET, True, True, True, True),
        (f"so {GET} and {PUT}", True, False, False, False),
        (f"{GET} and {PUT} bye", True, True, False, False),
        (GET[:-1], False, False, False, False),
        ("<f=no>1</f>", False, False, False, False),
        ('<f=get>{"town": "x"}</f>', False, False, False, False),
        ('hm [add]{"city": ""}', True, False, True, False),
        ("", True, False, True, False),
    ],
)
def test_tags(compiler: LlgCompiler, text: str, free: bool, starts: bool, one: bool, call: bool) -> None:
    for first, only, fits in ((False, False, free), (True, False, starts), (False, True, one), (True, True, call)):
        spec = structural_tag(TOOLS, ["<f=", "[add]"], at_least_one=first, stop_after_first=only)
        assert _fits(compiler, spec, text) == fits, (first, only)


def test_special_tokens_are_one_token(compiler: LlgCompiler) -> None:
    tools = [("<|call|>get:", CITY, "<|call|>")]
    free = structural_tag(tools, ["<|call|>"])
    call = structural_tag(tools, ["<|call|>"], at_least_one=True, stop_after_first=True)
    text = '<|call|>get:{"city": "x"}<|call|>'
    assert _fits(compiler, free, f"hm {text} bye")
    assert not _fits(compiler, free, "<|call|>put")
    assert _fits(compiler, call, text)
    assert not _fits(compiler, call, "hm")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"structures": [], "triggers": ["<"]}, "at least one structure"),
        ({"structures": [{"begin": "a", "end": ""}], "triggers": ["b"]}, r"structures\[0\].begin is 'a'"),
        ({"structures": [{"begin": "a", "end": ""}], "triggers": [""]}, "no empty trigger"),
        ({"structures": [{"begin": "a", "end": "", "schema": {"not": {}}}], "triggers": ["a"]}, "not"),
        ({"structures": [{"begin": "a"}], "triggers": ["a"]}, "missing required field `end`"),
        ({"structures": [], "triggers": [], "format": {}}, "unknown field `format`"),
    ],
)
def test_what_is_wrong_is_named(compiler: LlgCompiler, source: object, reason: str) -> None:
    spec = GrammarSpec(kind="structural_tag", source=json.dumps(source))
    with pytest.raises(GrammarError, match=reason):
        compiler.compile(spec).result()
