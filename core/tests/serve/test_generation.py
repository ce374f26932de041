"""Several tokens in one chunk, as jump-forward gives them, count as they would one by one."""

from __future__ import annotations

import pytest

from polyradix.engine.messages import Chunk, TokenLogProbs
from polyradix.schedule.params import SamplingParams
from polyradix.serve.fake import ByteTokenizer
from polyradix.serve.generation import Choice

TEXT = b'{"key": 1}'


def _run(size: int, stop: tuple[str, ...], logprobs: bool) -> tuple[object, ...]:
    choice = Choice(0, [1, 2], SamplingParams(), ByteTokenizer(), stop)
    text, tokens, entries = "", list[int](), list[int]()
    for at in range(0, len(TEXT), size):
        part = list(TEXT[at : at + size])
        values = [TokenLogProbs(-1.0, []) for _ in part] if logprobs else None
        piece = choice.push(Chunk("r", part, values, "length" if at + size >= len(TEXT) else None))
        text, tokens = text + piece.text, tokens + piece.tokens
        entries += [token for token, _ in piece.entries]
        if piece.finish is not None:
            break
    return text, tokens, entries, choice.output_tokens, choice.finish


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("stop", [(), ("ey",), ("k", "y"), ("}",), ("zz",)])
def test_chunks_of_any_size(stop: tuple[str, ...], logprobs: bool) -> None:
    single = _run(1, stop, logprobs)
    if stop == ("ey",):
        assert single[0] == '{"k'
        assert single[3:] == (5, "stop")
    assert all(_run(size, stop, logprobs) == single for size in (2, 3, 7, len(TEXT)))
