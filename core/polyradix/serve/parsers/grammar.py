"""Lark for llguidance: an output that calls tools, or reasons first and then keeps to a form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from polyradix.serve.parsers import thinking
from polyradix.serve.parsers.base import Format, Schema, Shape
from polyradix.serve.parsers.harmony import CHANNEL, ENDS, MESSAGE, START, Harmony

Special = Callable[[str], int | None]  # the id of a text that is one special token


def calls(form: Format, tools: Sequence[tuple[str, Schema]], parallel: bool, special: Special) -> str:
    """A rule `calls`: at least one call of tools (name, schema of its arguments), in the model's format."""
    return _calls("calls", form, form.shape, tools, parallel, special)


def offered(form: Format, tools: Sequence[tuple[str, Schema]], parallel: bool, special: Special) -> str:
    """A rule `calls`: text, in which what begins as a call of tools goes on as one. The format has a trigger."""
    shape, trigger = form.shape, form.shape.trigger
    if shape.opening:
        shape = replace(shape, opening=shape.opening.removeprefix(trigger))
    else:
        shape = replace(shape, before=shape.before.removeprefix(trigger), single=True)
    mark = _literal(trigger, form.marks, special)
    rules = ["TEXT: /(.|\\n)*/", "text: TEXT", "calls: " + ("inside* text" if parallel else "text | inside")]
    if special(trigger) is None:
        rules += ["inside: begin group", f"begin[lazy]: TEXT {mark}"]
    else:
        rules.append(f"inside: TEXT {mark} group")
    return "\n".join([*rules, _calls("group", form, shape, tools, parallel, special)])


def _calls(
    rule: str, form: Format, shape: Shape, tools: Sequence[tuple[str, Schema]], parallel: bool, special: Special
) -> str:

    def lark(text: str) -> str:
        return _literal(text, form.marks, special)

    more = f" ({lark(shape.between)} call)*" if parallel and not shape.single else ""
    rules = [f"{rule}: {lark(shape.opening)} call{more} {lark(shape.closing)}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, (name, schema) in enumerate(tools):
        quoted = json.dumps(name) if '"name": NAME' in shape.before else name
        rules.append(f"call_{i}: {lark(shape.before.replace('NAME', quoted))} args_{i} {lark(shape.after)}")
        rules.append(form.arguments(f"args_{i}", schema))
    return "\n".join(rules)


def frame(reasoning: str, inside: bool | None, calls: str, body: bool, special: Special) -> str:
    """A grammar: reasoning, and then `calls` (rules, "" for none) or what the request calls @body. `inside` is
    begins_inside's."""
    harmonic = reasoning == "gpt-oss"
    head = _literal(f"{CHANNEL}final{MESSAGE}", Harmony.marks, special) if harmonic else ""
    choices = " | ".join((["calls"] if calls else []) + ([f"{head} @body"] if body else []))
    rules = [f"start: lead ({choices})", calls]
    if harmonic:
        begin, end = (_literal(t, Harmony.marks, special) for t in (f"{CHANNEL}analysis{MESSAGE}", f"{START}assistant"))
        rules += [f"lead: ({begin} until_mark {end})?", _until(ENDS[0], special)]
    elif not reasoning or inside is None:
        rules.append('lead: ""')
    else:
        begin = _literal(thinking.BEGIN, (thinking.BEGIN,), special)
        lead = "until_mark /\\n{0,2}/"
        rules += [f"lead: {lead}" if inside else f"lead: ({begin} {lead})?", _until(thinking.END, special)]
    return "\n".join(rules)


def _until(mark: str, special: Special) -> str:
    """The rule `until_mark`: any text, and the mark."""
    id = special(mark)
    if id is not None:
        return f"until_mark: /(.|\\n)*/ <[{id}]>"
    return "until_mark[lazy]: /(.|\\n)*" + re.escape(mark).replace("/", "\\/") + "/"


def _literal(text: str, marks: Sequence[str], special: Special) -> str:
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    ids = [(part, special(part) if part in marks else None) for part in parts if part]
    return " ".join(json.dumps(part, ensure_ascii=False) if id is None else f"<[{id}]>" for part, id in ids)
