"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import math

from polyradix.backend.registry import parse_option


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Which backend, and with which options of its `create`."""
    parser.add_argument("--backend", required=True, help="entry-point name in polyradix.backends")
    parser.add_argument("--emulate", action="store_true", help="allow a backend to run without its hardware")
    parser.add_argument(
        "--option", action="append", default=[], type=parse_option, metavar="KEY=VALUE", help="an option of the backend"
    )


def count(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def seconds(text: str) -> float:
    """As `positive`, and says of what."""
    try:
        return positive(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e} of seconds") from None
