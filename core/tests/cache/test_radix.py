from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyradix.cache.radix import Node, RadixCache


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


@pytest.fixture
def tree() -> RadixCache:
    """Pages of 2 tokens: 1 2 3 4 5 6 in pages 11, 12, 13."""
    cache = RadixCache(2)
    cache.insert(ids(1, 2, 3, 4, 5, 6), [11, 12, 13])
    return cache


@pytest.mark.parametrize(
    ("tokens", "pages"),
    [
        ((1, 2, 3, 4, 5, 6), [11, 12, 13]),
        ((1, 2, 3, 4, 5, 6, 7), [11, 12, 13]),
        ((1, 2, 3, 4, 5), [11, 12]),  # whole pages only
        ((1, 2, 3, 9, 5, 6), [11]),  # the mismatch is inside a page
        ((1, 9), []),
        ((1,), []),
        ((), []),
    ],
)
def test_match_finds_the_longest_prefix_in_whole_pages(tree, tokens, pages):
    assert tree.prefix(ids(*tokens)) == 2 * len(pages)
    found = tree.match(ids(*tokens))
    assert found.pages == pages
    assert found.length == 2 * len(pages)
    assert tree.path(found.node) == pages
    tree.check([])


def test_insert_splits_an_edge_and_returns_duplicates(tree):
    node, duplicates = tree.insert(ids(1, 2, 3, 4, 7, 8), [21, 22, 23])
    assert duplicates == [21, 22]
    assert tree.path(node) == [11, 12, 23]
    assert tree.match(ids(1, 2, 3, 4, 5, 6)).pages == [11, 12, 13]
    assert tree.cached_pages == 4
    tree.check([])


def test_insert_does_not_return_pages_that_came_from_the_tree(tree):
    node, duplicates = tree.insert(ids(1, 2, 3, 4, 5, 6, 7, 8), [11, 12, 23, 24])
    assert duplicates == [23]
    assert tree.path(node) == [11, 12, 13, 24]


def test_insert_of_a_present_prefix_ends_where_it_ends(tree):
    node, duplicates = tree.insert(ids(1, 2), [31])
    assert duplicates == [31]
    assert tree.path(node) == [11]
    tree.check([])


def test_insert_keeps_its_own_copy_of_the_tokens():
    tree, tokens = RadixCache(2), ids(1, 2)
    tree.insert(tokens, [11])
    tokens[:] = 9
    assert tree.match(ids(1, 2)).pages == [11]
    tree.check([])


def test_insert_refuses_a_partial_page(tree):
    with pytest.raises(ValueError, match="3 tokens in 2 pages of 2"):
        tree.insert(ids(1, 2, 3), [1, 2])


def test_namespaces_share_nothing(tree):
    assert tree.prefix(ids(1, 2), "other") == 0
    tree.insert(ids(1, 2), [21], "other")
    assert tree.match(ids(1, 2), "other").pages == [21]
    assert tree.match(ids(1, 2)).pages == [11]
    tree.check([])


def test_eviction_takes_the_least_recently_used_leaf_from_its_end(tree):
    tree.insert(ids(7, 8, 9, 10), [21, 22])
    assert tree.evict(1) == [13]  # older, and its last page only
    assert tree.match(ids(1, 2)).pages == [11]  # now 11 is newer than 21, 22; 12 is not
    assert tree.evict(1) == [12]
    assert tree.evict(2) == [21, 22]
    assert tree.evict(5) == [11]
    assert tree.evict(1) == []
    assert tree.cached_pages == 0
    tree.check([])


def test_a_match_renews_a_leaf(tree):
    tree.insert(ids(7, 8), [21])
    tree.match(ids(1, 2, 3, 4, 5, 6))
    assert tree.evict(2) == [21, 13]


def test_prefix_is_no_use(tree):
    tree.insert(ids(7, 8), [21])
    tree.prefix(ids(1, 2, 3, 4, 5, 6))
    assert tree.evict(1) == [13]


def test_a_parent_goes_after_its_children(tree):
    tree.insert(ids(1, 2, 7, 8), [21, 22])
    assert tree.evict(4) == [12, 13, 22, 11]


def test_a_lock_covers_the_path_and_nothing_more(tree):
    found = tree.match(ids(1, 2, 3, 4))
    tree.lock(found.node)
    tree.lock(found.node)
    assert (tree.protected, tree.evictable_pages) == (2, 1)
    assert tree.evict(9) == [13]
    tree.unlock(found.node)
    assert tree.evict(9) == []
    tree.check([found.node])
    tree.unlock(found.node)
    assert tree.protected == 0
    assert tree.evict(9) == [11, 12]


def test_a_split_keeps_the_locks_below_it(tree):
    low = tree.match(ids(1, 2, 3, 4, 5, 6)).node
    tree.lock(low)
    high = tree.match(ids(1, 2)).node
    assert high is not low
    assert tree.protected == 3
    tree.check([low])
    tree.unlock(low)
    tree.check([])
    assert sorted(tree.evict(9)) == [11, 12, 13]


def test_unlocking_too_often_is_an_error(tree):
    node = tree.match(ids(1, 2)).node
    with pytest.raises(ValueError, match="more often than locked"):
        tree.unlock(node)


def test_flush_forgets_all_but_locked_prefixes(tree):
    tree.insert(ids(7, 8, 9, 10), [21, 22])
    node = tree.match(ids(7, 8)).node
    tree.lock(node)
    assert sorted(tree.flush()) == [11, 12, 13, 22]
    assert tree.cached_pages == 1
    assert tree.match(ids(7, 8, 9, 10)).pages == [21]


def test_check_sees_a_lost_lock(tree):
    node = tree.match(ids(1, 2)).node
    tree.lock(node)
    with pytest.raises(AssertionError, match="references"):
        tree.check([])


class Model:
    """What a radix cache means, without a tree: a dict from each stored prefix, page by page, to its page."""

    def __init__(self, page_size: int) -> None:
        self.size = page_size
        self.held: dict[tuple[str, tuple[int, ...]], int] = {}

    def keys(self, tokens: list[int], space: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(space, tuple(tokens[:end])) for end in range(self.size, len(tokens) + 1, self.size)]

    def match(self, tokens: list[int], space: str) -> list[int]:
        out = []
        for key in self.keys(tokens, space):
            if key not in self.held:
                break
            out.append(self.held[key])
        return out


@settings(max_examples=100)
@given(
    page_size=st.integers(1, 3),
    eviction=st.sampled_from(["lru", "lfu", "slru", "priority"]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["insert", "insert", "match", "lock", "unlock", "evict"]),
            st.lists(st.integers(0, 1), max_size=10),
            st.sampled_from(["", "b"]),
        ),
        max_size=40,
    ),
)
def test_agrees_with_a_dict_of_prefixes(page_size, eviction, steps):
    tree, model = RadixCache(page_size, eviction), Model(page_size)
    locks: list[tuple[Node, list[int]]] = []
    fresh = 0
    for act, tokens, space in steps:
        array = ids(*tokens)
        want = model.match(tokens, space)
        if act == "insert":
            keys = model.keys(tokens, space)
            pages = list(range(fresh, fresh + len(keys)))
            fresh += len(keys)
            _, duplicates = tree.insert(array[: len(keys) * page_size], list(pages), space, priority=len(steps) % 3)
            assert duplicates == pages[: len(want)]
            model.held.update(dict(zip(keys[len(want) :], pages[len(want) :], strict=True)))
        elif act == "match":
            assert tree.prefix(array, space) == len(want) * page_size
            found = tree.match(array, space, priority=len(tokens))
            assert found.pages == want
            tree.hit(found.node)
        elif act == "lock":
            node = tree.match(array, space).node
            tree.lock(node)
            locks.append((node, want))
        elif act == "unlock" and locks:
            tree.unlock(locks.pop(len(tokens) % len(locks))[0])
        elif act == "evict":
            kept = {page for _, pages in locks for page in pages}
            free = len(model.held) - len(kept)
            gone = tree.evict(len(tokens))
            assert len(gone) == min(len(tokens), free)
            assert not kept & set(gone)
            model.held = {key: page for key, page in model.held.items() if page not in gone}
            for space_, prefix in model.held:  # what stays is still reachable
                assert len(model.match(list(prefix), space_)) == len(prefix) // page_size
        assert (tree.cached_pages, tree.evictable_pages) == (
            len(model.held),
            len(model.held) - len({page for _, pages in locks for page in pages}),
        )
        tree.check([node for node, _ in locks])
