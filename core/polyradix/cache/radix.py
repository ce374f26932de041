"""The radix tree of cached prefixes: token ids to KV pages. Knows no device, no request and no pool.

An edge holds whole pages only, so a prefix is shared in steps of `page_size` tokens and a page belongs to one node.
Pages given to `insert` belong to the tree until `evict` or `flush` hands them back. Namespaces never share anything.
"""

from __future__ import annotations

import heapq
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
EvictionPolicy = Literal["lru", "lfu", "slru", "priority"]
WORD = 4  # bytes of a token id and of a page id


class Node:
    """One edge and the node below it: `key` is int32 [n * page_size] and `pages` int32 [n], both as bytes, which
    compare and join faster than arrays and take less room. The root has no parent."""

    __slots__ = ("children", "hits", "key", "label", "pages", "parent", "priority", "queued", "refs", "used")

    def __init__(self, parent: Node | None, label: bytes, key: bytes, pages: bytes, used: int, priority: int) -> None:
        self.parent = parent
        self.label = label  # the edge's first page, below the root after the namespace: the entry in parent.children
        self.key = key
        self.pages = pages
        self.used = used
        self.priority = priority  # the lowest number, which is the most important, of those that used it
        self.hits = 0  # requests that found it
        self.refs = 0
        self.queued = False
        self.children: dict[bytes, Node] = {}

    @property
    def count(self) -> int:
        """Pages."""
        return len(self.pages) // WORD


# What goes first has the lowest rank. A node's rank never falls, so an outdated entry of the heap comes up too early.
RANKS: dict[EvictionPolicy, Callable[[Node], tuple[int, int]]] = {
    "lru": lambda node: (0, node.used),
    "lfu": lambda node: (node.hits, node.used),
    "slru": lambda node: (min(node.hits, 1), node.used),
    "priority": lambda node: (-node.priority, node.used),
}


@dataclass(frozen=True)
class Match:
    """A prefix of `length` tokens, its pages in order, and the node where it ends (the root when nothing matched).
    Lock the node before anything can evict, or the pages may be gone."""

    node: Node
    pages: list[int]
    length: int


class RadixCache:
    def __init__(self, page_size: int, eviction: EvictionPolicy = "lru") -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; expected at least 1")
        if eviction not in RANKS:
            raise ValueError(f"eviction_policy is {eviction!r}; expected one of {', '.join(RANKS)}")
        self.page_size = page_size
        self.cached_pages = 0  # in the tree
        self.protected = 0  # of these, under a lock
        self.version = 0  # changes when a prefix is added
        self._page = page_size * WORD
        self._rank = RANKS[eviction]
        self._root = Node(None, b"", b"", b"", 0, 0)
        self._clock = 0
        self._heap: list[tuple[tuple[int, int], int, Node]] = []  # (rank, serial, leaf); one a node, may be outdated
        self._serial = 0

    @property
    def evictable_pages(self) -> int:
        return self.cached_pages - self.protected

    def match(self, tokens: Tokens, namespace: str = "", priority: int = 0) -> Match:
        """The longest cached prefix of tokens int32 [n], in whole pages. Marks it as used now and splits an edge where
        it ends, so that a lock covers the prefix and nothing more."""
        node, pages = self._use(tokens.tobytes(), namespace, priority)
        return Match(node, _ids(pages), len(pages) // WORD * self.page_size)

    def prefix(self, tokens: Tokens, namespace: str = "") -> int:
        """The length `match` would find; changes nothing."""
        return sum(common for _, common in self._find(tokens.tobytes(), namespace)) // WORD

    def insert(
        self, tokens: Tokens, pages: list[int], namespace: str = "", priority: int = 0
    ) -> tuple[Node, list[int]]:
        """Store tokens int32 [len(pages) * page_size] held by pages. Returns the node where they end, and those of
        `pages` the tree did not take because it holds the same tokens in other pages: they stay the caller's."""
        if len(tokens) != len(pages) * self.page_size:
            raise ValueError(f"{len(tokens)} tokens in {len(pages)} pages of {self.page_size}; expected full pages")
        raw, own = tokens.tobytes(), struct.pack(f"{len(pages)}i", *pages)
        node, held = self._use(raw, namespace, priority)
        duplicates: list[int] = []
        if not own.startswith(held):
            duplicates = [mine for mine, other in zip(pages, _ids(held), strict=False) if mine != other]
        if len(held) == len(own):
            return node, duplicates
        key = raw[len(held) * self.page_size :]
        label = key[: self._page] if node.parent is not None else namespace.encode() + key[: self._page]
        leaf = Node(node, label, key, own[len(held) :], self._clock, priority)
        node.children[label] = leaf
        self.cached_pages += leaf.count
        self.version += 1
        self._offer(leaf)
        return leaf, duplicates

    def path(self, node: Node) -> list[int]:
        """The pages of the whole prefix that ends at node, in order."""
        parts: list[bytes] = []
        while node.parent is not None:
            parts.append(node.pages)
            node = node.parent
        return _ids(b"".join(reversed(parts)))

    def hit(self, node: Node) -> None:
        """Count that a request found the prefix that ends at node."""
        while node.parent is not None:
            node.hits += 1
            node = node.parent

    def freed_by(self, nodes: Sequence[Node]) -> int:
        """Pages that nobody would lock any more after one `unlock` of each of these."""
        locks: Counter[Node] = Counter()
        for node in nodes:
            while node.parent is not None:
                locks[node] += 1
                node = node.parent
        return sum(node.count for node, count in locks.items() if count == node.refs)

    def lock(self, node: Node) -> None:
        """Keep node and the path above it from eviction, until `unlock` was called as often."""
        while node.parent is not None:
            if node.refs == 0:
                self.protected += node.count
            node.refs += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        leaf = node
        while node.parent is not None:
            if node.refs == 0:
                raise ValueError("a node of the prefix tree was unlocked more often than locked")
            node.refs -= 1
            if node.refs == 0:
                self.protected -= node.count
            node = node.parent
        self._offer(leaf)

    def evict(self, n: int) -> list[int]:
        """Forget up to n pages, leaves in the order of the policy and each leaf from its end. They are the caller's."""
        out: list[int] = []
        while len(out) < n and self._heap:
            rank, _, node = heapq.heappop(self._heap)
            node.queued = False
            if rank == self._rank(node) and node.refs == 0 and not node.children:
                take = min(n - len(out), node.count)
                out += _ids(node.pages[-take * WORD :])
                node = self._trim(node, take)
            self._offer(node)
        self.cached_pages -= len(out)
        return out

    def flush(self) -> list[int]:
        """Forget everything that is not locked; the pages are the caller's."""
        return self.evict(self.evictable_pages)

    def all_pages(self) -> list[int]:
        """Every page in the tree, for accounting."""
        return [page for node in self._nodes() for page in _ids(node.pages)]

    def check(self, locks: list[Node] | None = None) -> None:
        """Raises AssertionError for a broken invariant. `locks`: the locks that are held, one entry per lock."""
        nodes = self._nodes()
        for node in nodes:
            self._check_node(node)
        pages = self.all_pages()
        assert len(set(pages)) == len(pages) == self.cached_pages, f"{len(pages)} pages, {self.cached_pages} counted"
        assert self.protected == sum(node.count for node in nodes if node.refs), "protected is off"
        queue = [id(node) for _, _, node in self._heap]
        assert len(queue) == len(set(queue)), "a node is queued twice"
        assert {id(node) for node in nodes if node.queued} <= set(queue), "a queued node is not in the queue"
        if locks is not None:
            self._check_locks(nodes, locks)

    def _check_node(self, node: Node) -> None:
        assert node.parent is not None
        assert node.parent.children.get(node.label) is node, "a node is not its parent's child"
        label = node.label[-self._page :] if node.parent is self._root else node.label
        assert label == node.key[: self._page], "a label does not match its edge"
        assert len(node.key) == node.count * self._page > 0, "an edge is not whole pages"
        assert node.refs >= sum(child.refs for child in node.children.values()), "a parent has too few references"
        if node.parent is not self._root:
            assert self._rank(node) <= self._rank(node.parent), "a child would be kept longer than its parent"
        assert node.children or node.refs or node.queued, "an evictable leaf is not queued"

    def _check_locks(self, nodes: list[Node], locks: list[Node]) -> None:
        want: dict[int, int] = {}
        for lock in locks:
            node = lock
            while node.parent is not None:
                want[id(node)] = want.get(id(node), 0) + 1
                node = node.parent
        have = {id(node): node.refs for node in nodes if node.refs}
        assert have == want, "references do not match the locks held"

    def _nodes(self) -> list[Node]:
        out, todo = list[Node](), list(self._root.children.values())
        while todo:
            out.append(node := todo.pop())
            todo += node.children.values()
        return out

    def _find(self, raw: bytes, namespace: str) -> Iterator[tuple[Node, int]]:
        """The nodes along raw and how many bytes of each match: all of them, but for the last node."""
        node, at, label = self._root, 0, namespace.encode() + raw[: self._page]
        while len(raw) - at >= self._page and (child := node.children.get(label)) is not None:
            if not raw.startswith(child.key, at):
                yield child, self._common(child.key, raw, at)
                return
            yield child, len(child.key)
            node, at = child, at + len(child.key)
            label = raw[at : at + self._page]

    def _common(self, key: bytes, raw: bytes, at: int) -> int:
        """Bytes that key and raw from `at` on have in common, rounded down to whole pages."""
        n = min(len(key), len(raw) - at) // WORD
        differ = np.frombuffer(key, np.int32, n) != np.frombuffer(raw, np.int32, n, at)
        first = int(differ.argmax())
        n = (first if differ[first] else n) * WORD
        return n - n % self._page

    def _use(self, raw: bytes, namespace: str, priority: int) -> tuple[Node, bytes]:
        """The node where the longest prefix of raw ends, made by a split if need be, and the prefix's pages."""
        self._clock += 1
        node, parts = self._root, list[bytes]()
        for child, common in self._find(raw, namespace):
            node = child if common == len(child.key) else self._split(child, common)
            node.used = self._clock
            node.priority = min(node.priority, priority)
            parts.append(node.pages)
        return node, b"".join(parts)

    def _split(self, node: Node, at: int) -> Node:
        """Cut the edge of `node` after `at` bytes and return the new upper node. `node` stays the lower one, so
        whoever locked it still covers the whole path."""
        assert node.parent is not None
        end = at // self.page_size
        upper = Node(node.parent, node.label, node.key[:at], node.pages[:end], node.used, node.priority)
        upper.refs, upper.hits = node.refs, node.hits
        node.parent.children[node.label] = upper
        node.key, node.pages, node.parent = node.key[at:], node.pages[end:], upper
        node.label = node.key[: self._page]
        upper.children[node.label] = node
        return upper

    def _trim(self, node: Node, count: int) -> Node:
        """Drop the last `count` pages of a leaf; returns the node that may be the next leaf to go."""
        if count < node.count:
            node.pages = node.pages[: -count * WORD]
            node.key = node.key[: -count * self._page]
            return node
        parent = node.parent
        assert parent is not None
        del parent.children[node.label]
        return parent

    def _offer(self, node: Node) -> None:
        """Queue `node` for eviction if it is an unlocked leaf."""
        if node.parent is not None and not (node.queued or node.refs or node.children):
            node.queued = True
            self._serial += 1
            heapq.heappush(self._heap, (self._rank(node), self._serial, node))


def _ids(raw: bytes) -> list[int]:
    return memoryview(raw).cast("i").tolist()
