"""Whatever the split of the ids, the streamed text is the decoded text up to the first stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyradix.engine.detokenizer import Detokenizer

SPECIAL = 256


class Bytes:
    """256 one-byte tokens, one special token, then a few long ones that cut through characters and words."""

    special_ids = frozenset({SPECIAL})
    table = (
        *(bytes([b]) for b in range(256)),
        b"<end>",
        b"ab",
        "né".encode()[:2],
        "😀".encode()[1:],
        b"\xa9a",
        b"bcab",
    )

    def token_bytes(self, token: int) -> bytes:
        return self.table[token]


def expected(ids: list[int], stop: list[str], include: bool = False) -> str:
    text = b"".join(Bytes.table[i] for i in ids if i != SPECIAL).decode("utf-8", "replace")
    hits = [(text.find(s), len(s)) for s in stop if s in text]
    if not hits:
        return text
    start, size = min(hits)
    return text[: start + (size if include else 0)]


def stream(ids: list[int], cuts: list[int], stop: list[str], include: bool = False) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(Bytes(), stop, include_stop=include)
    bounds = [0, *sorted(cuts), len(ids)]
    parts = [detokenizer.push(ids[a:b]) for a, b in pairwise(bounds)]
    return [*parts, detokenizer.finish()], detokenizer


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "ab", "é", "😀", "\u0301", "日", " "]), max_size=30).map("".join)
TEXT_IDS = (TEXTS | st.text("ab", max_size=30)).map(lambda text: list(text.encode()))
ANY_IDS = st.lists(st.sampled_from([*b"abc", *"é😀".encode(), *range(SPECIAL, len(Bytes.table))]), max_size=40)
STOPS = st.lists(st.text("abcé😀 ", min_size=1, max_size=4) | st.text("ab", min_size=3, max_size=5), max_size=4)


@given(st.data(), TEXT_IDS | ANY_IDS, STOPS, st.booleans())
def test_any_split_gives_the_same_text(data: st.DataObject, ids: list[int], stop: list[str], include: bool) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))
    parts, detokenizer = stream(ids, cuts, stop, include)
    assert "".join(parts) == expected(ids, stop, include)
    whole = expected(ids, [])
    assert detokenizer.stopped == any(s in whole for s in stop)
    if detokenizer.stop is not None:
        assert whole.startswith(expected(ids, stop) + detokenizer.stop)


@given(TEXT_IDS, STOPS)
def test_nothing_given_out_is_taken_back(ids: list[int], stop: list[str]) -> None:
    """At every point, what was given out begins the final text of every continuation that completes a stop string."""
    detokenizer, given_out = Detokenizer(Bytes(), stop), ""
    for n, token in enumerate(ids):
        given_out += detokenizer.push([token])
        assert "\ufffd" not in given_out
        for s in stop:
            assert expected([*ids[: n + 1], *s.encode()], stop).startswith(given_out)


def test_text_comes_as_early_as_it_can() -> None:
    detokenizer = Detokenizer(Bytes(), ["stop!"])
    assert [detokenizer.push([t]) for t in "ast é".encode()] == ["a", "", "", "st ", "", "é"]


def test_earlier_stop_string_wins_even_when_it_completes_later() -> None:
    parts, detokenizer = stream(list(b"abcde"), [1, 2, 3, 4], ["c", "bcd"])
    assert ("".join(parts), detokenizer.stop) == ("a", "bcd")
    parts, detokenizer = stream(list(b"abcx"), [1, 2, 3], ["c", "bcd"])
    assert ("".join(parts), detokenizer.stop) == ("ab", "c")


def test_pending_stop_string_decides_at_the_end() -> None:
    parts, detokenizer = stream(list(b"abc"), [1, 2], ["c", "bcd"])
    assert ("".join(parts), detokenizer.stop) == ("ab", "c")


@pytest.mark.parametrize(("text", "stop"), [("aaab", "aab"), ("abababc", "ababc"), ("aabaaabaa", "aabaa")])
def test_stop_string_begun_twice(text: str, stop: str) -> None:
    parts, detokenizer = stream(list(text.encode()), list(range(len(text))), [stop])
    assert ("".join(parts), detokenizer.stop) == (text[: text.index(stop)], stop)


def test_silent_after_the_stop() -> None:
    detokenizer = Detokenizer(Bytes(), ["b"])
    assert detokenizer.push(list(b"abab")) == "a"
    assert (detokenizer.stopped, detokenizer.push(list(b"more")), detokenizer.finish()) == (True, "", "")


def test_special_tokens_and_broken_characters() -> None:
    ids = [97, SPECIAL, 0xF0, 0x9F]
    shown = Detokenizer(Bytes(), skip_special=False)
    assert shown.push(ids) + shown.finish() == "a<end>\ufffd"
    hidden = Detokenizer(Bytes())
    assert (hidden.push(ids), hidden.finish()) == ("a", "\ufffd")


def test_a_near_match_for_ever_holds_only_its_length() -> None:
    detokenizer = Detokenizer(Bytes(), ["a" * 50 + "b"])
    given_out = "".join(detokenizer.push([97] * (1 + n % 5)) for n in range(1000))
    assert (given_out, detokenizer.finish()) == ("a" * 2950, "a" * 50)
