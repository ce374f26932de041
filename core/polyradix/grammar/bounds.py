"""What is refused before the library sees it: it would compile for minutes, take gigabytes and cannot be stopped."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation

from polyradix.grammar.spec import GrammarError

MOST_REMAINDERS = 10_000  # of a number that others must be multiples of; compiling takes the square of it

_COMBINED = re.compile(r'"(allOf|anyOf|oneOf|\$ref|patternProperties)"')
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.0-9eE]+)')
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_LITERAL = re.compile(r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|<[^<>\s]+>', re.DOTALL)
_COMPLEMENT = re.compile(r"~(?!\s*[0-9])")  # before a number, it repeats


def check_multiples(source: str) -> None:
    """Of JSON schemas, alone or in a grammar. Where one value may have to obey several, their least common multiple
    counts; elsewhere each is compiled by itself."""
    source = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), source)
    found = _MULTIPLE.findall(source)
    sizes = [_remainders(number) for number in found]
    size = math.lcm(*sizes) if _COMBINED.search(source) else math.hypot(*sizes)
    if size > MOST_REMAINDERS:
        values = ", ".join(dict.fromkeys(found))
        raise GrammarError(f"multipleOf is {values[:80]}; expected at most {MOST_REMAINDERS}, all together")


def check_complement(source: str) -> None:
    """Of a Lark grammar."""
    if _COMPLEMENT.search(_LITERAL.sub(" ", source)):
        raise GrammarError("the operator ~ (all but) is not taken, as nothing bounds what it costs")


def _remainders(number: str) -> int:
    """Digits before and after the point count alike."""
    try:
        _, digits, exponent = Decimal(number).normalize().as_tuple()
    except InvalidOperation:
        return 1  # the library says what is wrong with it
    return int("".join(map(str, digits))) * 10 ** max(0, min(int(exponent), 9)) or 1
