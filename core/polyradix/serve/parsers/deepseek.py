"""`<|tool▁calls▁begin|>`, calls, `<|tool▁calls▁end|>`, with fullwidth bars. A call is `<|tool▁call▁begin|>`, then in V3
and R1 `function<|tool▁sep|>NAME` and the arguments in a fenced json block, in V3.1 `NAME<|tool▁sep|>` and the
arguments, and `<|tool▁call▁end|>`.

Source: the chat templates of deepseek-ai/DeepSeek-V3-0324, DeepSeek-R1-0528 and DeepSeek-V3.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from polyradix.serve.parsers.base import Format, Schema, Shape
from polyradix.serve.parsers.feed import Arguments, Call, Feed, Script, Text

BAR = "\uff5c"
ALL, END_ALL, BEGIN, SEP, END = (
    f"<{BAR}tool▁{name}{BAR}>" for name in ("calls▁begin", "calls▁end", "call▁begin", "sep", "call▁end")
)
FENCE, END_FENCE = "\n```json\n", "\n```"


class DeepSeek(Format):
    marks = (ALL, END_ALL, BEGIN, SEP, END)

    def __init__(self, fenced: bool) -> None:
        """`fenced`: as V3 and R1."""
        self.shape = Shape(f"{BEGIN}NAME{SEP}", END, opening=ALL, closing=END_ALL, trigger=ALL)
        if fenced:
            self.shape = Shape(f"{BEGIN}function{SEP}NAME{FENCE}", f"{END_FENCE}{END}", "\n", ALL, END_ALL, trigger=ALL)

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """The template joins text to the arguments, and looks for calls where the content is none."""
        if calls := message.get("tool_calls"):
            message["content"] = message["content"] or None
            for call in calls:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return message

    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        while mark := (yield from feed.until(ALL, BEGIN, END_ALL, to=Text, trim=True)):
            yield from feed.next()
            if mark != BEGIN:
                continue
            name, mark = yield from feed.hold(SEP)
            if mark and (yield from feed.next()) != "{":
                name, mark = yield from feed.hold(FENCE)
            if not mark:
                return
            yield Call(name.strip())
            yield from feed.value(Arguments)
            yield from feed.hold(END)
            yield from feed.next()
