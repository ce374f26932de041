"""Structural tags: free text in which certain beginnings must go on as JSON of a schema. As vLLM and SGLang spell them:
`{"structures": [{"begin": "<f=add>", "schema": {...}, "end": "</f>"}], "triggers": ["<f="]}`. Of xgrammar,
`at_least_one` (the output begins with a tag) and `stop_after_first` (nothing follows the first one)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from polyradix.grammar.spec import GrammarError


class Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    end: str
    schema: dict[str, Any] | bool = True


class Tags(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[Structure]
    triggers: list[str]
    at_least_one: bool = False
    stop_after_first: bool = False


def lark(source: str, specials: Mapping[str, int], form: Mapping[str, Any]) -> str:
    """The grammar in llguidance's Lark. `specials` are special tokens by their text, which then are single tokens in
    `begin` and `end`; `form` is how JSON is spelled. Raises GrammarError."""
    try:
        tags = msgspec.json.decode(source, type=Tags)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(str(error)) from None
    if not tags.structures or not all(tags.triggers):
        raise GrammarError("at least one structure is expected, and no empty trigger")
    rules, direct, inside = ["TEXT: /(.|\\n)*/", "text: TEXT"], [], []
    for i, item in enumerate(tags.structures):
        found = [t for t in tags.triggers if item.begin.startswith(t)]
        if not found:
            raise GrammarError(f"structures[{i}].begin is {item.begin!r}; expected one of the triggers at its start")
        trigger = min(found, key=len)  # the shortest is complete first
        schema = {**(item.schema if isinstance(item.schema, dict) else {}), "x-guidance": form}
        body = f"%json {json.dumps(schema)} {_words(item.end, specials)}"
        rules.append(f"direct_{i}: {_words(item.begin, specials)} {body}")
        head = f"TEXT {_words(trigger, specials)}"
        if not any(special in trigger for special in specials):
            rules.append(f"begin_{i}[lazy]: {head}")
            head = f"begin_{i}"
        rules.append(f"inside_{i}: {head} {_words(item.begin[len(trigger) :], specials)} {body}")
        direct.append(f"direct_{i}")
        inside.append(f"inside_{i}")
    first, more = f"({' | '.join(direct)})", f"({' | '.join(inside)})"
    if tags.at_least_one:
        start = first if tags.stop_after_first else f"{first} {more}* text"
    else:
        start = f"text | {more}" if tags.stop_after_first else f"{more}* text"
    return "\n".join(["%llguidance {}", f"start: {start}", *rules])


def _words(text: str, specials: Mapping[str, int]) -> str:
    if not text:
        return ""
    if not specials:
        return json.dumps(text)
    names = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
    parts = [part for part in re.split(f"({names})", text) if part]
    return " ".join(f"<[{specials[p]}]>" if p in specials else json.dumps(p) for p in parts)
