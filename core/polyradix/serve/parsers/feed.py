"""What parsers are made of: a script reads a Feed of text, and gives out events as soon as they are sure.

A script is a generator that yields None where it needs more text. Text that may be the beginning of a mark is held back
until it is clear that it is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Generator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass
class Text:
    """Of the answer itself."""

    text: str


@dataclass
class Reasoning:
    text: str


@dataclass
class Call:
    """A tool call begins. `id` is the model's own, if it gave one."""

    name: str
    id: str = ""


@dataclass
class Arguments:
    """More of the arguments of the call begun last: a piece of JSON, as the model wrote it."""

    text: str


Event: TypeAlias = Text | Reasoning | Call | Arguments
Script: TypeAlias = Generator[Event | None, None, None]
Emit: TypeAlias = Callable[[str], Event]
SPACE = " \t\r\n"


class Malformed(Exception):
    """Not what the format says. Feed.taken is what was read of it."""


class Feed:
    def __init__(self) -> None:
        self.text = ""  # not read yet
        self.taken = ""  # read since it was last set to ""
        self.closed = False

    def take(self, count: int) -> str:
        out, self.text = self.text[:count], self.text[count:]
        self.taken += out
        return out

    def until(self, *marks: str, to: Emit, trim: bool = False) -> Generator[Event | None, None, str]:
        """Gives out the text before the first mark, and takes that; "" if the text ends without. With `trim`, white
        space just before a mark is dropped."""
        while True:
            found = [(at, mark) for mark in marks if (at := self.text.find(mark)) >= 0]
            at, mark = min(found, default=(self._sure(marks, trim), ""))
            text = self.take(at)
            text = text.rstrip(SPACE) if trim and mark else text
            if text:
                yield to(text)
            if mark or self.closed:
                return self.take(len(mark))
            yield None

    def _sure(self, marks: tuple[str, ...], trim: bool) -> int:
        """How much of the text, which has no mark, can be no part of one."""
        if self.closed:
            return len(self.text)
        longest = max(map(len, marks), default=1) - 1
        starts = range(max(0, len(self.text) - longest), len(self.text))
        end = next((i for i in starts if any(mark.startswith(self.text[i:]) for mark in marks)), len(self.text))
        return len(self.text[:end].rstrip(SPACE)) if trim else end

    def hold(self, *marks: str) -> Generator[None, None, tuple[str, str]]:
        """The text before the first mark, and the mark; ("...", "") with all of it if the text ends without."""
        while True:
            found = [(at, mark) for mark in marks if (at := self.text.find(mark)) >= 0]
            if found or self.closed:
                at, mark = min(found, default=(len(self.text), ""))
                return self.take(at), self.take(len(mark))
            yield None

    def next(self, prefix: str = "") -> Generator[None, None, str]:
        """White space is skipped; then the next character, which stays. "" at the end. With `prefix`: all of it if the
        text begins so."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip(SPACE)))
            if self.text.startswith(prefix) and self.text:
                return prefix or self.text[0]
            if self.closed or not prefix.startswith(self.text):
                return self.text[:1]
            yield None

    def value(self, to: Emit | None = None) -> Generator[Event | None, None, str]:
        """One JSON value, given out as it comes and returned. Only its end is looked for: brackets and quotes count."""
        yield from self.next()
        depth, quoted, escaped, whole = 0, False, False, ""
        while True:
            end, done = len(self.text), False
            for at, c in enumerate(self.text):
                if quoted:
                    quoted, escaped = c != '"' or escaped, c == "\\" and not escaped
                elif c == '"':
                    quoted = True
                elif depth == 0 and c in ",:}]" + SPACE:
                    end, done = at, True
                    break
                else:
                    depth += (c in "{[") - (c in "}]")
                if depth == 0 and not quoted and c in '}]"':
                    end, done = at + 1, True
                    break
            part = self.take(end)
            whole += part
            if part and to is not None:
                yield to(part)
            if done or self.closed:
                return whole
            yield None

    def call(self, *keys: str, known: Container[str] | None = None) -> Generator[Event | None, None, None]:
        """A call `{"name": ..., KEY: {...}}` with its members in any order, KEY one of `keys`. Raises Malformed before
        the call has begun if it is none, or if its name is not among the `known`."""
        name, held = "", ""
        yield from self.expect("{")
        while (yield from self.next()) == '"':
            key = loads(str((yield from self.value())))
            yield from self.expect(":")
            if key in keys and name:
                held = yield from self.value(Arguments)
            elif key in keys:
                held = yield from self.value()
            else:
                value = loads((yield from self.value()))
                if key == "name":
                    name = value if isinstance(value, str) else ""
                    if not name or (known is not None and name not in known):
                        raise Malformed
                    yield Call(name)
                    if held:
                        yield Arguments(held)
            if (yield from self.next()) == ",":
                self.take(1)
        if not name:
            raise Malformed
        if not held:
            yield Arguments("{}")
        if (yield from self.next()) == "}":
            self.take(1)

    def expect(self, char: str) -> Generator[None, None, None]:
        if (yield from self.next()) != char:
            raise Malformed
        self.take(1)


def loads(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    return value
