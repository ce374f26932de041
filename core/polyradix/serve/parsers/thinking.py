"""Reasoning between `<think>` and `</think>`, before everything else.

Whether the output begins inside is read from the prompt: some templates write `<think>` there themselves, and one that
was told not to think writes the whole empty pair. Source: the chat templates of Qwen/Qwen3-8B and
deepseek-ai/DeepSeek-R1 (whose first template left `<think>` to the model, which may leave it out).
"""

from __future__ import annotations

from polyradix.serve.parsers.feed import Feed, Reasoning, Script

BEGIN, END = "<think>", "</think>"


def begins_inside(prompt: str, always: bool) -> bool | None:
    """None: there will be no reasoning. `always`: the model reasons even if nothing says so."""
    tail = prompt.rstrip()
    if tail.endswith(END):
        return None
    return always or tail.endswith(BEGIN)


def think(feed: Feed, inside: bool | None, rest: Script) -> Script:
    """The reasoning, if there is any, and then `rest`."""
    if inside is not None:
        if (yield from feed.next(BEGIN)) == BEGIN:
            feed.take(len(BEGIN))
            inside = True
        if inside:
            yield from feed.next()
            yield from feed.until(END, to=Reasoning, trim=True)
            yield from feed.next()
    yield from rest
