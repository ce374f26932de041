"""What `polyradix bench` asks: conversations of one turn or more, from a generator or a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATASETS = ("random", "shared-prefix", "multi-turn", "json")
WORDS = (
    "river",
    "stone",
    "light",
    "paper",
    "garden",
    "window",
    "silver",
    "music",
    "winter",
    "bridge",
    "engine",
    "candle",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": list(WORDS[:5])}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class DatasetError(ValueError):
    """The file cannot be used; the message names it, the line and what was expected."""


@dataclass(frozen=True)
class Talk:
    """`prompt` is a text or token ids, asked once; or `turns` are user messages, each asked after the answer before.
    `schema` is what the answer must follow."""

    output: int  # tokens of an answer
    prompt: str | list[int] | None = None
    turns: list[str] = field(default_factory=list)
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sizes:
    """Lengths are tokens for random and shared-prefix, whose ids are below `vocab`; words for the others."""

    requests: int = 64
    input: int = 512
    output: int = 128
    prefixes: int = 4
    prefix: int = 1024
    turns: int = 4
    vocab: int = 1000
    seed: int = 0


def talks(dataset: str, sizes: Sizes) -> list[Talk]:
    """`dataset` is one of DATASETS or the path of a file. Raises DatasetError."""
    if dataset not in DATASETS:
        found = list(from_file(Path(dataset), sizes.output))
        if not found:
            raise DatasetError(f"{dataset} has no requests; expected one on each line")
        return found
    rng = np.random.default_rng(sizes.seed)

    def ids(n: int) -> list[int]:
        return [int(t) for t in rng.integers(sizes.vocab // 10, sizes.vocab, n)]

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    if dataset == "random":
        return [Talk(sizes.output, ids(sizes.input)) for _ in range(sizes.requests)]
    if dataset == "shared-prefix":
        heads = [ids(sizes.prefix) for _ in range(sizes.prefixes)]
        return [Talk(sizes.output, heads[i % len(heads)] + ids(sizes.input)) for i in range(sizes.requests)]
    if dataset == "multi-turn":
        return [
            Talk(sizes.output, turns=[words(sizes.input) for _ in range(sizes.turns)]) for _ in range(sizes.requests)
        ]
    prompts = [f"{words(sizes.input)}\nA person, as JSON:" for _ in range(sizes.requests)]
    return [Talk(sizes.output, prompt, schema=SCHEMA) for prompt in prompts]


def from_file(path: Path, output: int) -> Iterator[Talk]:
    """Each line an object with `prompt` (a text or token ids) or `turns` (texts), and perhaps `max_tokens`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"dataset is '{path}'; expected one of {', '.join(DATASETS)} or a file: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            talk = Talk(found.get("max_tokens", output), found.get("prompt"), found.get("turns", []))
        except (ValueError, AttributeError) as error:
            raise DatasetError(f"{path}:{number} is not a JSON object: {error}") from None
        if (not talk.prompt) == (not talk.turns):
            raise DatasetError(f"{path}:{number} has neither or both of prompt and turns; expected one of them")
        yield talk
