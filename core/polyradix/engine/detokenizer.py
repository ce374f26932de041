"""Token ids to text, a few at a time, without ever showing what may still change."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Vocabulary(Protocol):
    """What a detokenizer asks of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token: int) -> bytes: ...


@dataclass
class _Stop:
    """A stop string looked for: `matched` characters of it end the text so far (Knuth, Morris and Pratt, 1977)."""

    text: str
    fallback: list[int] = field(init=False)
    matched: int = 0

    def __post_init__(self) -> None:
        self.fallback = [0] * len(self.text)
        k = 0
        for i in range(1, len(self.text)):
            while k and self.text[i] != self.text[k]:
                k = self.fallback[k - 1]
            k += self.text[i] == self.text[k]
            self.fallback[i] = k

    def step(self, char: str) -> bool:
        """True when `char` completes the stop string."""
        k = self.matched
        while k and char != self.text[k]:
            k = self.fallback[k - 1]
        k += char == self.text[k]
        self.matched = k % len(self.text)  # afresh once found: a later occurrence never begins earlier
        return k == len(self.text)


class Detokenizer:
    """Streams the text of one request. A character is given out once it is whole and cannot be part of a stop string.

    The text ends before the stop string that begins first (after it, with include_stop); of two that begin at the same
    place, the shorter counts. How the ids are split over pushes never matters. Costs O(1) per token, amortised.
    """

    def __init__(
        self, tokenizer: Vocabulary, stop: Sequence[str] = (), skip_special: bool = True, include_stop: bool = False
    ) -> None:
        self.stop: str | None = None  # the stop string that ended the text
        self._bytes: Callable[[int], bytes] = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._include_stop = include_stop
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = [_Stop(s) for s in stop if s]
        self._held = ""  # text not given out yet
        self._given = 0  # characters given out
        self._seen = 0  # characters compared with the stop strings
        self._found: tuple[int, str] | None = None  # where the best stop string begins, and which it is

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became final; empty once stopped."""
        data = b"".join([self._bytes(i) for i in token_ids if i not in self._skip])
        return self._advance(self._decode(data))

    def take(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """`push`, one token at a time until stopped; and how many of them were pushed."""
        if not self._stops:
            return self.push(token_ids), len(token_ids)
        text = ""
        for count, token in enumerate(token_ids, 1):
            text += self.push([token])
            if self.stopped:
                return text, count
        return text, len(token_ids)

    def finish(self) -> str:
        """The rest: what was held back, and U+FFFD for a character that never became whole."""
        text = self._advance(self._decode(b"", True))
        if self.stopped:
            return text
        return text + (self._end(*self._found) if self._found else self._release(self._seen))

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        for char in text:
            self._seen += 1
            if self._step(char) and self._found:
                return self._end(*self._found)
        return self._release(self._open())

    def _end(self, start: int, stop: str) -> str:
        self.stop = stop
        return self._release(start + (len(stop) if self._include_stop else 0))

    def _release(self, end: int) -> str:
        """Gives out the text before position `end`."""
        count = end - self._given
        text, self._held = self._held[:count], self._held[count:]
        self._given = end
        return text

    def _step(self, char: str) -> bool:
        """One character into every stop string; True when no earlier stop string can come any more."""
        for stop in self._stops:
            if stop.step(char) and (self._found is None or self._seen - len(stop.text) < self._found[0]):
                self._found = (self._seen - len(stop.text), stop.text)
        return self._found is not None and self._open() >= self._found[0]

    def _open(self) -> int:
        """Where the longest unfinished match begins: text before it is out of every later stop string's reach."""
        return self._seen - max(stop.matched for stop in self._stops)
