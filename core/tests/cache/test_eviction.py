"""Each policy against what its definition says of a small history."""

from __future__ import annotations

import numpy as np
import pytest

from polyradix.cache.radix import RadixCache

# Three prefixes of one page each, in the order of their last use: a, b, c. a was hit twice, b once, c never; a is the
# least important (the highest number), c the most.
PREFIXES = {"a": (11, 5), "b": (12, 1), "c": (13, 0)}
HISTORY = ["a", "a", "b"]


def tokens(name: str) -> np.ndarray:
    return np.full(2, ord(name), np.int32)


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", [11, 12, 13]),
        ("lfu", [13, 12, 11]),  # hits 0, 1, 2
        ("slru", [13, 11, 12]),  # those never hit first, then the least recently used
        ("priority", [11, 12, 13]),  # 5, 1, 0
    ],
)
def test_order_of_eviction(policy, order):
    tree = RadixCache(2, policy)
    for name in "ab":
        tree.insert(tokens(name), [PREFIXES[name][0]], priority=PREFIXES[name][1])
    for name in HISTORY:
        tree.hit(tree.match(tokens(name), priority=9).node)
    tree.insert(tokens("c"), [PREFIXES["c"][0]], priority=0)
    assert [tree.evict(1)[0] for _ in range(3)] == order


def test_priority_beats_recency_and_the_best_user_counts():
    tree = RadixCache(2, "priority")
    tree.insert(tokens("a"), [11], priority=9)
    tree.insert(tokens("b"), [12], priority=0)
    tree.insert(tokens("c"), [13], priority=9)
    tree.match(tokens("a"), priority=-1)
    tree.match(tokens("a"), priority=50)
    assert [tree.evict(1)[0] for _ in range(3)] == [13, 12, 11]


def test_a_hit_counts_for_the_whole_path_and_a_split_keeps_it():
    tree = RadixCache(1, "lfu")
    tree.insert(np.array([1, 2, 3], np.int32), [11, 12, 13])
    tree.hit(tree.match(np.array([1, 2, 3], np.int32)).node)
    tree.insert(np.array([1, 7], np.int32), [11, 14])
    tree.check([])
    assert tree.evict(4) == [14, 12, 13, 11]


def test_freed_by_counts_what_only_these_lock():
    tree = RadixCache(1)
    low = tree.insert(np.array([1, 2, 3], np.int32), [11, 12, 13])[0]
    other = tree.insert(np.array([1, 4], np.int32), [11, 14])[0]
    for node in (low, other):
        tree.lock(node)
    assert tree.freed_by([low]) == 2
    assert tree.freed_by([other]) == 1
    assert tree.freed_by([low, other]) == 4 == tree.protected


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="eviction_policy is 'fifo'; expected one of lru, lfu, slru, priority"):
        RadixCache(2, "fifo")  # type: ignore[arg-type]
