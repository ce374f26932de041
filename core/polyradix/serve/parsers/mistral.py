"""`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`; newer models: `[TOOL_CALLS]name[ARGS]{...}` for each call.

Source: mistral-common's tokenizers v3 and v11 (docs.mistral.ai), and the chat templates of
mistralai/Mistral-7B-Instruct-v0.3 and mistralai/Mistral-Small-3.2-24B-Instruct-2506. Ids have nine letters and digits.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyradix.serve.parsers.base import Format, Schema, Shape, short_id
from polyradix.serve.parsers.feed import Arguments, Call, Feed, Malformed, Script, Text

BEGIN, ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class Mistral(Format):
    marks = (BEGIN, ID, ARGS)

    def __init__(self, named: bool) -> None:
        """`named`: the newer form, in which the name comes before the arguments."""
        old = Shape('{"name": NAME, "arguments": ', "}", between=", ", opening=f"{BEGIN}[", closing="]", trigger=BEGIN)
        self.shape = Shape(f"{BEGIN}NAME{ARGS}", "", trigger=BEGIN) if named else old

    def new_id(self) -> str:
        return short_id()

    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        while (yield from feed.until(BEGIN, to=Text, trim=True)):
            feed.taken = BEGIN
            try:
                yield from _list(feed) if (yield from feed.next()) == "[" else _named(feed)
                yield from feed.next()
            except Malformed:
                yield Text(feed.taken)


def _list(feed: Feed) -> Script:
    yield from feed.expect("[")
    while (yield from feed.next()) == "{":
        yield from feed.call("arguments", "parameters")
        feed.taken = ""
        if (yield from feed.next()) == ",":
            feed.take(1)
    yield from feed.expect("]")


def _named(feed: Feed) -> Script:
    name, mark = yield from feed.hold(ID, ARGS, "{")
    id = ""
    if mark == ID:
        id, mark = yield from feed.hold(ARGS, "{")
    if not mark or not name.strip():
        raise Malformed
    if mark == "{":
        feed.text = "{" + feed.text
    yield Call(name.strip(), id.strip())
    yield from feed.value(Arguments)
