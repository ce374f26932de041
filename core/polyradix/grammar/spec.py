"""What a request may ask its output to be, and what the rest of the engine sees of it. Knows no library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol

import msgspec

from polyradix.backend.batch import I32

Kind = Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag", "lark"]
MAX_SOURCE = 64 * 1024  # bytes


class GrammarError(ValueError):
    """A grammar that cannot be used; the text is the reason."""


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`source` is a JSON schema as text, a regular expression that the whole output matches, a grammar (Lark, or GBNF
    with `::=`; of kind `lark` always Lark), a JSON list of strings for `choice`, "" for `json_object`, and for
    `structural_tag` what grammar/tags.py says. `field` names it in errors. `frame` is a Lark grammar of what comes
    around it, in which it is called @body."""

    kind: Kind
    source: str = ""
    field: str = "grammar"
    frame: str = ""

    def check(self) -> None:
        """Raises GrammarError for a source beyond MAX_SOURCE."""
        size = len((self.source + self.frame).encode("utf-8", "replace"))
        if size > MAX_SOURCE:
            raise GrammarError(f"at most {MAX_SOURCE} bytes; it has {size}")


class Matcher(Protocol):
    """Where one output stands in its grammar."""

    def fill(self, row: I32) -> None:
        """Set `row`, i32[ceil(V/32)], to the tokens that may come next: bit t of word t//32. Raises GrammarError when
        the grammar has become too complex to go on, after which the matcher cannot be used."""

    def accept(self, token: int) -> bool:
        """Take the next token; true when the output is complete and nothing may follow."""

    def forced(self) -> list[int]:
        """The tokens that must come next whatever is sampled; empty if there is a choice. Changes nothing."""


class Grammar(Protocol):
    def matcher(self) -> Matcher: ...


class Vocabulary(Protocol):
    """What a grammar needs of a tokenizer; `Tokenizer` of the engine has it."""

    @property
    def eos_ids(self) -> Iterable[int]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...


class Compiler(Protocol):
    def compile(self, spec: GrammarSpec) -> Future[Grammar]:
        """At once; the future has the grammar, or a GrammarError."""

    def expire(self) -> None:
        """Refuse what takes too long. To be called often."""

    def fill(self, rows: Sequence[tuple[int, Matcher]], mask: I32) -> list[tuple[int, GrammarError]]:
        """`Matcher.fill` of these rows of a contiguous mask i32[S, ceil(V/32)], on several threads. Which failed."""
