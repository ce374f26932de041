"""The whole answer is `{"name": ..., "parameters": {...}}`, several with `;` between, maybe after `<|python_tag|>`.

A JSON object that names no function of the request is text. Source: the chat template of
meta-llama/Llama-3.1-8B-Instruct, and Llama's documentation of JSON based tool calling.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyradix.serve.parsers.base import Format, Schema, Shape
from polyradix.serve.parsers.feed import Feed, Malformed, Script, Text

TAG = "<|python_tag|>"


class Llama3(Format):
    marks = (TAG,)
    shape = Shape('{"name": NAME, "parameters": ', "}", between="; ")

    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        feed.taken = ""
        if (yield from feed.next(TAG)) == TAG:
            feed.take(len(TAG))
            yield from feed.next()
        try:
            while (yield from feed.next()) == "{":
                yield from feed.call("parameters", "arguments", known=tools)
                feed.taken = ""
                if (yield from feed.next()) == ";":
                    feed.take(1)
        except Malformed:
            pass
        if feed.taken:
            yield Text(feed.taken)
        yield from feed.until(to=Text)
