"""Text inside an output to tokens whose bytes are that text, as a tokenizer would split it there."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate

from polyradix.grammar.spec import Vocabulary

GUARD = "\n"  # no tokenizer joins it with what a grammar forces, but for more white space


class Exact:
    """Tokenizers put a space before a text (sentencepiece) or normalise it (Unicode NFC), neither of which may happen
    to text that goes on. Then it is split behind a guard, or else greedily, the longest token first, as is text that
    reads like a special token."""

    def __init__(self, words: Vocabulary) -> None:
        self._words = words

    def __call__(self, text: str) -> list[int]:
        raw = text.encode()
        for guard in ("", GUARD):
            ids = self._words.encode(guard + text, add_special=False)
            pieces = [self._words.token_bytes(i) for i in ids]
            sizes = accumulate(map(len, reversed(pieces)))
            count = next((n for n, size in enumerate(sizes, 1) if size >= len(raw)), 0)
            whole = b"".join(pieces[-count:]) == raw and (guard or count == len(ids))
            if whole and self._words.special_ids.isdisjoint(ids[-count:]):
                return ids[-count:]
        return self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        out, at = list[int](), 0
        while at < len(raw):
            end = min(len(raw), at + self._longest)
            while (token := self._ids.get(raw[at:end])) is None:
                end -= 1
                if end == at:
                    raise ValueError(f"no token for byte {raw[at]:#x}")
            out.append(token)
            at = end
        return out

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special, words = self._words.special_ids, self._words
        ids = {words.token_bytes(i): i for i in range(words.vocab_size - 1, -1, -1) if i not in special}
        ids.pop(b"", None)
        return ids

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids))
