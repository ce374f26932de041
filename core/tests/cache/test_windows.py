"""Blocks of windowed groups in the prefix tree, and how many pages a sequence takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyradix.cache.blocks import Block, Groups
from polyradix.cache.radix import Match, RadixCache


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def tree_of(window: int) -> RadixCache:
    """Pages of 2 tokens in a full and a windowed group: 1 to 12 in pages 11 to 16, and 24 to 26 for the last 3."""
    tree = RadixCache(2, groups=Groups(1, 1, window))
    blocks = [Block([page]) for page in (24, 25, 26)]
    tree.insert(ids(*range(1, 13)), [11, 12, 13, 14, 15, 16], window=blocks)
    assert tree.release(blocks) == []
    return tree


@pytest.mark.parametrize(("window", "length"), [(5, 12), (7, 12), (8, 0), (2, 12)])
def test_a_match_ends_where_the_window_of_the_next_token_is_there(window, length):
    found = tree_of(window).match(ids(*range(1, 14)))
    assert (found.length, found.full) == (length, 12)
    seen = range(max(0, length - window + 1), length)  # what the token at position `length` sees
    assert [block.pages for block in found.window] == [[20 + i] for i in sorted({i // 2 + 1 for i in seen})]


def test_a_match_goes_back_to_an_earlier_good_end():
    tree = tree_of(3)
    assert tree.match(ids(*range(1, 11), 7, 7)).length == 10
    assert tree.match(ids(*range(1, 9), 7, 7)).length == 8
    found = tree.match(ids(*range(1, 7), 7, 7))  # its token 6 sees tokens 4 and 5, of the third block
    assert (found.length, found.full, found.pages, found.window) == (0, 6, [], [])


def test_loose_blocks_go_first_then_the_windows_that_were_used_longest_ago():
    tree = RadixCache(1, groups=Groups(1, 1, 2))
    blocks = [Block([page]) for page in (21, 22, 23)]
    tree.insert(ids(1, 2, 3), [11, 12, 13], window=blocks)
    more = [Block([24])]
    tree.insert(ids(1, 2, 3, 4), [11, 12, 13, 14], window=more)
    tree.release(blocks + more)
    tree.check([])
    assert [tree.evict(1) for _ in range(3)] == [[21], [22], [23]]  # 23 is the window of an inner node, and older
    assert tree.evict(1) == [14, 24]
    assert tree.evict(9) == [11, 12, 13]
    assert tree.cached_pages == 0


def test_a_window_that_was_hit_outlives_an_older_leaf():
    tree = RadixCache(1, groups=Groups(1, 1, 2))
    for last, page in ((2, 12), (3, 13)):
        blocks = [Block([page + 10])] if last == 3 else [Block([21]), Block([22])]
        tree.insert(ids(1, last), [11, page], window=blocks)
        tree.release(blocks)
    found = tree.match(ids(1, 9))
    assert found.window[0].pages == [21]
    tree.lock(found.node)
    tree.hold(found.window)
    tree.release(found.window)
    tree.unlock(found.node)
    assert tree.evict(1) == [12, 22]
    assert tree.match(ids(1, 9)).length == 1


def test_what_is_held_stays_and_is_counted():
    tree = tree_of(3)
    found = tree.match(ids(*range(1, 13)))
    tree.lock(found.node)
    tree.hold(found.window)
    assert tree.evictable_pages == 2
    assert sorted(tree.flush()) == [24, 25]
    tree.check([found.node])
    assert tree.release(found.window) == []
    assert tree.evictable_pages == 1
    assert tree.flush() == [26]
    with pytest.raises(ValueError, match="released more often than held"):
        tree.release(found.window)


def test_groups_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"Groups.window is 1; expected at least 2"):
        Groups(1, 1, 1)
    with pytest.raises(ValueError, match=r"Groups.full is 0; expected at least 1"):
        Groups(0, 1, 4)


@pytest.mark.parametrize("groups", [Groups(), Groups(1, 1, 5), Groups(2, 3, 9), Groups(1, 5, 2)])
def test_the_longest_sequence_takes_no_more_pages_than_there_are(groups):
    for pages in range(groups.count, 60):
        longest = groups.tokens(pages, 4)
        assert groups.pages(longest, 4) <= pages < groups.pages(longest + 1, 4)


@settings(max_examples=100)
@given(
    page_size=st.integers(1, 3),
    window=st.integers(2, 7),
    groups=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    eviction=st.sampled_from(["lru", "lfu", "slru", "priority"]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["insert", "insert", "match", "hold", "release", "evict"]),
            st.lists(st.integers(0, 1), max_size=10),
            st.integers(0, 5),
        ),
        max_size=40,
    ),
)
def test_agrees_with_a_dict_of_prefixes(page_size, window, groups, eviction, steps):
    """The dicts say which pages each prefix's last block has, of full and of windowed groups."""
    full, windowed = groups
    tree = RadixCache(page_size, eviction, Groups(full, windowed, window))
    held: dict[tuple[int, ...], list[int]] = {}
    near: dict[tuple[int, ...], list[int]] = {}
    using: list[Match] = []
    fresh = 0
    for act, tokens, n in steps:
        keys = [tuple(tokens[:end]) for end in range(page_size, len(tokens) + 1, page_size)]
        known = next((i for i, key in enumerate(keys) if key not in held), len(keys))
        array = ids(*tokens)
        if act == "insert":
            own = [[fresh + len(keys) * j + i for j in range(full + windowed)] for i in range(len(keys))]
            fresh += len(keys) * (full + windowed)
            blocks = [Block(pages[full:]) for pages in own[len(keys) - n :]]
            cut = array[: len(keys) * page_size]
            _, duplicates = tree.insert(cut, [p for pages in own for p in pages[:full]], window=blocks)
            assert duplicates == [p for pages in own[:known] for p in pages[:full]]
            held.update({key: pages[:full] for key, pages in zip(keys[known:], own[known:], strict=True)})
            back = []
            for key, block in zip(keys[len(keys) - len(blocks) :], blocks, strict=True):
                back += block.pages if key in near else []
                near.setdefault(key, block.pages)
            assert tree.release(blocks) == back
        elif act in ("match", "hold"):
            good = [
                end
                for end in range(known + 1)
                if all(key in near for key in keys[max(0, end * page_size - window + 1) // page_size : end])
            ]
            assert tree.prefix(array) == good[-1] * page_size
            found = tree.match(array)
            assert (found.length, found.full) == (good[-1] * page_size, known * page_size)
            assert found.pages == [page for key in keys[: good[-1]] for page in held[key]]
            first = max(0, found.length - window + 1) // page_size
            assert [block.pages for block in found.window] == [near[key] for key in keys[first : good[-1]]]
            if act == "hold":
                tree.lock(found.node)
                tree.hold(found.window)
                using.append(found)
        elif act == "release" and using:
            found = using.pop(n % len(using))
            assert tree.release(found.window) == []
            tree.unlock(found.node)
        elif act == "evict":
            kept = {page for found in using for page in found.pages}
            kept |= {page for found in using for block in found.window for page in block.pages}
            free = sum(map(len, held.values())) + sum(map(len, near.values())) - len(kept)
            assert tree.evictable_pages == free
            gone = set(tree.evict(n))
            assert min(n, free) <= len(gone) < n + full + windowed
            assert not kept & gone
            held = {key: pages for key, pages in held.items() if not gone & set(pages)}
            near = {key: pages for key, pages in near.items() if not gone & set(pages)}
        assert tree.cached_pages == sum(map(len, held.values())) + sum(map(len, near.values()))
        tree.check([found.node for found in using])
