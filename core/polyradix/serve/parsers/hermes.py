"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call.

Source: the chat templates of NousResearch/Hermes-2-Pro-Llama-3-8B, Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen3-8B.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyradix.serve.parsers.base import Format, Schema, Shape
from polyradix.serve.parsers.feed import Feed, Malformed, Script, Text

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(Format):
    marks = (BEGIN, END)
    shape = Shape(f'{BEGIN}\n{{"name": NAME, "arguments": ', f"}}\n{END}", between="\n", trigger=BEGIN)

    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        while (yield from feed.until(BEGIN, to=Text, trim=True)):
            feed.taken = BEGIN
            try:
                yield from feed.call("arguments", "parameters")
                if (yield from feed.next(END)) == END:
                    feed.take(len(END))
                yield from feed.next()
            except Malformed:
                yield Text(feed.taken)
