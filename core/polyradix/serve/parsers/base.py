"""A model's way to write tool calls, and what runs it over one output."""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from polyradix.grammar.compiler import JSON_FORM
from polyradix.serve.parsers.feed import Call, Event, Feed, Reasoning, Script

Schema: TypeAlias = dict[str, Any] | None
ANYTHING: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Shape:
    """How calls are written when a grammar makes them: `opening`, calls with `between` them, `closing`. A call is
    `before` with the function's name for NAME, its arguments, and `after`. With `single` a turn has one call.
    `trigger` is what they begin with where text may come before, "" where none may."""

    before: str
    after: str
    between: str = ""
    opening: str = ""
    closing: str = ""
    single: bool = False
    trigger: str = ""


class Format(ABC):
    """`marks` are tokens that must reach the parser though they may be special."""

    marks: tuple[str, ...] = ()
    shape: Shape

    @abstractmethod
    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        """Of an output; `tools` are the request's functions and the schemas of their arguments."""

    def arguments(self, rule: str, schema: Schema) -> str:
        """The Lark rule of this name, for arguments of the schema, and those that it needs."""
        return f"{rule}: %json {json.dumps((schema or ANYTHING) | {'x-guidance': JSON_FORM})}"

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """An earlier message as the template expects it. Given are arguments as objects, "" for no content, and
        reasoning in reasoning_content."""
        return message

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Parser:
    """One output. `calls` have begun so far; `reasoning` says that what was given out last is, `done` that nothing more
    is wanted."""

    def __init__(self, feed: Feed, script: Script, single: bool = False) -> None:
        self._feed, self._script, self._single = feed, script, single
        self.calls = 0
        self.reasoning = False
        self.done = False

    def push(self, text: str) -> list[Event]:
        """What became sure. However the output is split over pushes, the joined events are the same."""
        self._feed.text += text
        return self._run()

    def finish(self) -> list[Event]:
        self._feed.closed = True
        return self._run()

    def _run(self) -> list[Event]:
        out: list[Event] = []
        for event in self._script if not self.done else ():
            if event is None:
                break
            self.calls += isinstance(event, Call)
            self.reasoning = isinstance(event, Reasoning)
            if self._single and self.calls > 1:
                self.done = True
                break
            out.append(event)
        return out
