"""The radix tree of cached prefixes: token ids to KV pages. Knows no device, no request and no pool.

An edge holds whole pages only, so a prefix is shared in steps of `page_size` tokens and a page belongs to one node.
Pages given to `insert` belong to the tree until `evict` or `flush` hands them back. Namespaces never share anything.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Node:
    """One edge and the node below it: `key` int32 [n * page_size] and its n pages. The root has no parent."""

    __slots__ = ("children", "key", "label", "pages", "parent", "queued", "refs", "used")

    def __init__(self, parent: Node | None, label: tuple[str, bytes], key: Tokens, pages: list[int], used: int) -> None:
        self.parent = parent
        self.label = label  # namespace and the bytes of the edge's first page: the entry in parent.children
        self.key = key
        self.pages = pages
        self.used = used
        self.refs = 0
        self.queued = False
        self.children: dict[tuple[str, bytes], Node] = {}


@dataclass(frozen=True)
class Match:
    """A prefix of `length` tokens, its pages in order, and the node where it ends (the root when nothing matched).
    Lock the node before anything can evict, or the pages may be gone."""

    node: Node
    pages: list[int]
    length: int


class RadixCache:
    def __init__(self, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; expected at least 1")
        self.page_size = page_size
        self.cached_pages = 0  # in the tree
        self.protected = 0  # of these, under a lock
        self.version = 0  # changes when a prefix is added
        self._root = Node(None, ("", b""), np.empty(0, np.int32), [], 0)
        self._clock = 0
        self._heap: list[tuple[int, int, Node]] = []  # (used, serial, leaf); one entry a node, may be outdated
        self._serial = 0

    @property
    def evictable_pages(self) -> int:
        return self.cached_pages - self.protected

    def match(self, tokens: Tokens, namespace: str = "") -> Match:
        """The longest cached prefix of tokens int32 [n], in whole pages. Marks it as used now and splits an edge where
        it ends, so that a lock covers the prefix and nothing more."""
        self._clock += 1
        node, pages, at = self._root, list[int](), 0
        while (child := self._child(node, tokens, at, namespace)) is not None:
            common = self._common(child.key, tokens[at:])
            node = child if common == len(child.key) else self._split(child, common)
            node.used = self._clock
            pages += node.pages
            at += common
            if node is not child:
                break
        return Match(node, pages, at)

    def prefix(self, tokens: Tokens, namespace: str = "") -> int:
        """The length `match` would find; changes nothing."""
        node, at = self._root, 0
        while (child := self._child(node, tokens, at, namespace)) is not None:
            common = self._common(child.key, tokens[at:])
            at += common
            if common < len(child.key):
                break
            node = child
        return at

    def insert(self, tokens: Tokens, pages: list[int], namespace: str = "") -> tuple[Node, list[int]]:
        """Store tokens int32 [len(pages) * page_size] held by pages. Returns the node where they end, and those of
        `pages` the tree did not take because it holds the same tokens in other pages: they stay the caller's."""
        if len(tokens) != len(pages) * self.page_size:
            raise ValueError(f"{len(tokens)} tokens in {len(pages)} pages of {self.page_size}; expected full pages")
        found = self.match(tokens, namespace)
        have = len(found.pages)
        duplicates = [own for own, held in zip(pages, found.pages, strict=False) if own != held]
        if have == len(pages):
            return found.node, duplicates
        key = np.array(tokens[found.length :], np.int32)
        leaf = Node(found.node, self._label(key, namespace), key, pages[have:], self._clock)
        found.node.children[leaf.label] = leaf
        self.cached_pages += len(leaf.pages)
        self.version += 1
        self._offer(leaf)
        return leaf, duplicates

    def path(self, node: Node) -> list[int]:
        """The pages of the whole prefix that ends at node, in order."""
        parts: list[list[int]] = []
        while node.parent is not None:
            parts.append(node.pages)
            node = node.parent
        return [page for part in reversed(parts) for page in part]

    def lock(self, node: Node) -> None:
        """Keep node and the path above it from eviction, until `unlock` was called as often."""
        while node.parent is not None:
            if node.refs == 0:
                self.protected += len(node.pages)
            node.refs += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        leaf = node
        while node.parent is not None:
            if node.refs == 0:
                raise ValueError("a node of the prefix tree was unlocked more often than locked")
            node.refs -= 1
            if node.refs == 0:
                self.protected -= len(node.pages)
            node = node.parent
        self._offer(leaf)

    def evict(self, n: int) -> list[int]:
        """Forget up to n pages, least recently used leaves first and each leaf from its end. They are the caller's."""
        out: list[int] = []
        while len(out) < n and self._heap:
            used, _, node = heapq.heappop(self._heap)
            node.queued = False
            if used == node.used and node.refs == 0 and not node.children:
                take = min(n - len(out), len(node.pages))
                out += node.pages[-take:]
                node = self._trim(node, take)
            self._offer(node)
        self.cached_pages -= len(out)
        return out

    def flush(self) -> list[int]:
        """Forget everything that is not locked; the pages are the caller's."""
        return self.evict(self.evictable_pages)

    def all_pages(self) -> list[int]:
        """Every page in the tree, for accounting."""
        return [page for node in self._nodes() for page in node.pages]

    def check(self, locks: list[Node] | None = None) -> None:
        """Raises AssertionError for a broken invariant. `locks`: the locks that are held, one entry per lock."""
        nodes = self._nodes()
        for node in nodes:
            self._check_node(node)
        pages = self.all_pages()
        assert len(set(pages)) == len(pages) == self.cached_pages, f"{len(pages)} pages, {self.cached_pages} counted"
        assert self.protected == sum(len(node.pages) for node in nodes if node.refs), "protected is off"
        queue = [id(node) for _, _, node in self._heap]
        assert len(queue) == len(set(queue)), "a node is queued twice"
        assert {id(node) for node in nodes if node.queued} <= set(queue), "a queued node is not in the queue"
        if locks is not None:
            self._check_locks(nodes, locks)

    def _check_node(self, node: Node) -> None:
        assert node.parent is not None
        assert node.parent.children.get(node.label) is node, "a node is not its parent's child"
        assert node.label == self._label(node.key, node.label[0]), "a label does not match its edge"
        assert len(node.key) == len(node.pages) * self.page_size > 0, "an edge is not whole pages"
        assert all(child.label[0] == node.label[0] for child in node.children.values()), "namespaces are mixed"
        assert node.refs >= sum(child.refs for child in node.children.values()), "a parent has too few references"
        assert node.parent.parent is None or node.used <= node.parent.used, "a child is newer than its parent"
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

    def _label(self, tokens: Tokens, namespace: str) -> tuple[str, bytes]:
        return namespace, tokens[: self.page_size].tobytes()

    def _child(self, node: Node, tokens: Tokens, at: int, namespace: str) -> Node | None:
        if not node.children or len(tokens) - at < self.page_size:
            return None
        return node.children.get(self._label(tokens[at:], namespace))

    def _common(self, key: Tokens, tokens: Tokens) -> int:
        """Tokens in common, rounded down to whole pages."""
        n = min(len(key), len(tokens))
        differ = key[:n] != tokens[:n]
        first = int(differ.argmax())
        n = first if differ[first] else n
        return n - n % self.page_size

    def _split(self, node: Node, at: int) -> Node:
        """Cut the edge of `node` after `at` tokens and return the new upper node. `node` stays the lower one, so
        whoever locked it still covers the whole path."""
        assert node.parent is not None
        count = at // self.page_size
        upper = Node(node.parent, node.label, node.key[:at], node.pages[:count], node.used)
        upper.refs = node.refs
        node.parent.children[node.label] = upper
        node.key, node.pages, node.parent = node.key[at:], node.pages[count:], upper
        node.label = self._label(node.key, node.label[0])
        upper.children[node.label] = node
        return upper

    def _trim(self, node: Node, count: int) -> Node:
        """Drop the last `count` pages of a leaf; returns the node that may be the next leaf to go."""
        if count < len(node.pages):
            del node.pages[-count:]
            node.key = node.key[: len(node.pages) * self.page_size]
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
            heapq.heappush(self._heap, (node.used, self._serial, node))
