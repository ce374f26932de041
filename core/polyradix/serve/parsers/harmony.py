"""Messages with headers: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`.
The channel `analysis` is reasoning; a header with `to=functions.NAME` makes the message a call's arguments.

Source: OpenAI, "OpenAI harmony response format" (cookbook), and the chat template of openai/gpt-oss-20b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from polyradix.serve.parsers.base import Format, Schema, Shape
from polyradix.serve.parsers.feed import Arguments, Call, Emit, Feed, Reasoning, Script, Text

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")


class Harmony(Format):
    marks = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    shape = Shape(f"{CHANNEL}commentary to=functions.NAME {CONSTRAIN}json{MESSAGE}", "", single=True)

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """The template refuses content and thinking in one message with calls."""
        thinking = message.pop("reasoning_content", "")
        if thinking and not (message["content"] and message.get("tool_calls")):
            message["thinking"] = thinking
        return message

    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        mark = MESSAGE
        while mark:
            head, mark = yield from feed.hold(MESSAGE)
            if not mark:
                if not re.search(r"<\|\w+\|>", head) and head.strip():
                    yield Text(head)
                return
            to: Emit = Text
            if target := re.search(r"to=functions\.([^\s<]+)", head):
                yield Call(target[1])
                to = Arguments
            elif "analysis" in head:
                to = Reasoning
            mark = yield from feed.until(*ENDS, to=to)
