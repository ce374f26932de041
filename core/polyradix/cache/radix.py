"""The radix tree of cached prefixes: token ids to KV pages. Knows no device, no request and no pool.

An edge holds whole blocks only, so a prefix is shared in steps of `page_size` tokens and a page belongs to one node.
Pages given to `insert` belong to the tree until `evict` or `flush` hands them back. Namespaces never share anything.

Of windowed groups the tree has those blocks that requests could still hand over. A match ends where all that its next
token sees is there, so it cannot reach a page that was given back. See docs/decisions/024-windowed-kv.md.
"""

from __future__ import annotations

import heapq
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from polyradix.cache.blocks import Block, Groups

Tokens = NDArray[np.int32]
EvictionPolicy = Literal["lru", "lfu", "slru", "priority"]
WORD = 4  # bytes of a token id and of a page id


NO_WINDOW: dict[int, Block] = {}  # many nodes' own, never written to


class Node:
    """One edge and the node below it: `key` is int32 [n * page_size] and `pages` int32 [n * full groups], as bytes,
    which compare and join faster than arrays and take less room. The root has no parent."""

    __slots__ = (
        *("children", "ended", "hits", "idle", "key", "label", "pages", "parent", "priority", "queued", "refs"),
        *("used", "window"),
    )

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
        self.window = NO_WINDOW  # by index, those blocks of windowed groups that are there
        self.idle = 0  # of these, held by no request
        self.ended = used  # when last a window that reaches into it was stored or found

    @property
    def count(self) -> int:
        """Pages, of full groups."""
        return len(self.pages) // WORD

    @property
    def is_leaf(self) -> bool:
        """Whether nothing stands in the way of evicting its last block."""
        return not (self.refs or self.children or self.parent is None)


# What goes first has the lowest rank. A node's rank never falls, so an outdated entry of the heap comes up too early.
RANKS: dict[EvictionPolicy, Callable[[Node], tuple[int, int]]] = {
    "lru": lambda node: (0, node.used),
    "lfu": lambda node: (node.hits, node.used),
    "slru": lambda node: (min(node.hits, 1), node.used),
    "priority": lambda node: (-node.priority, node.used),
}


@dataclass(frozen=True)
class Match:
    """A prefix of `length` tokens, the full groups' pages of each block in order, and the node where it ends (the root
    when nothing matched). `window` is what its next token sees of windowed groups; full groups have `full` tokens.
    Lock the node and hold the window before anything can evict, or the pages may be gone."""

    node: Node
    pages: list[int]
    length: int
    full: int
    window: list[Block]


ONE_GROUP = Groups()


class RadixCache:
    def __init__(self, page_size: int, eviction: EvictionPolicy = "lru", groups: Groups = ONE_GROUP) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; expected at least 1")
        if eviction not in RANKS:
            raise ValueError(f"eviction_policy is {eviction!r}; expected one of {', '.join(RANKS)}")
        self.page_size = page_size
        self.cached_pages = 0  # in the tree
        self.protected = 0  # of these, under a lock or held
        self.version = 0  # changes when a prefix is added
        self._groups = groups
        self._page = page_size * WORD
        self._entry = groups.full * WORD  # bytes of a block in Node.pages
        self._rank = RANKS[eviction]
        self._root = Node(None, b"", b"", b"", 0, 0)
        self._clock = 0
        self._heap: list[tuple[tuple[int, int], int, Node]] = []  # (rank, serial, node); one a node, may be outdated
        self._serial = 0
        self._loose: deque[Block] = deque()  # blocks that are, and some that no longer are

    @property
    def evictable_pages(self) -> int:
        return self.cached_pages - self.protected

    def match(self, tokens: Tokens, namespace: str = "", priority: int = 0) -> Match:
        """The longest cached prefix of tokens int32 [n], in whole blocks. Marks it as used now and splits an edge where
        it ends, so that a lock covers the prefix and nothing more."""
        raw, full, window = tokens.tobytes(), -1, list[Block]()
        if self._groups.windowed:
            found = list(self._find(raw, namespace))
            full, blocks = sum(common for _, common in found) // WORD, self._usable(found)
            raw = raw[: blocks * self._page]
        node, pages = self._use(raw, namespace, priority)
        length = len(pages) // self._entry * self.page_size
        if self._groups.windowed:
            window = self._window(node, length)
            for block in window:
                assert block.node is not None
                block.node.ended = self._clock
        return Match(node, _ids(pages), length, max(full, length), window)

    def prefix(self, tokens: Tokens, namespace: str = "") -> int:
        """The length `match` would find; changes nothing."""
        found = self._find(tokens.tobytes(), namespace)
        if self._groups.windowed:
            return self._usable(list(found)) * self.page_size
        return sum(common for _, common in found) // WORD

    def insert(
        self, tokens: Tokens, pages: list[int], namespace: str = "", priority: int = 0, window: Sequence[Block] = ()
    ) -> tuple[Node, list[int]]:
        """Store tokens int32 [blocks * page_size] held by pages, those of each block together, and by `window`, the
        last blocks of windowed groups. Returns the node where they end, and those of `pages` the tree did not take
        because it holds the same tokens in other pages: they stay the caller's. So do blocks of `window` that get no
        node; the others are the tree's from now on, and the caller holds them."""
        if len(tokens) * self._groups.full != len(pages) * self.page_size:
            raise ValueError(f"{len(tokens)} tokens in {len(pages)} pages of {self.page_size}; expected full pages")
        raw, own = tokens.tobytes(), struct.pack(f"{len(pages)}i", *pages)
        node, held = self._use(raw, namespace, priority)
        duplicates: list[int] = []
        if not own.startswith(held):
            duplicates = [mine for mine, other in zip(pages, _ids(held), strict=False) if mine != other]
        if len(held) < len(own):
            node = self._add(node, raw[len(held) // self._entry * self._page :], own[len(held) :], namespace, priority)
        if window:
            self._put(node, len(own) // self._entry, window)
        return node, duplicates

    def _add(self, node: Node, key: bytes, pages: bytes, namespace: str, priority: int) -> Node:
        label = key[: self._page] if node.parent is not None else namespace.encode() + key[: self._page]
        leaf = Node(node, label, key, pages, self._clock, priority)
        node.children[label] = leaf
        self.cached_pages += leaf.count
        self.version += 1
        self._offer(leaf)
        return leaf

    def path(self, node: Node) -> list[int]:
        """The full groups' pages of the whole prefix that ends at node, in order."""
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
        """Pages of full groups that nobody would lock any more after one `unlock` of each of these."""
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

    def hold(self, blocks: Sequence[Block]) -> None:
        """Keep these blocks of windowed groups from eviction, until `release` was called as often."""
        for block in blocks:
            if not block.holds:
                assert block.node is not None
                block.node.idle -= 1
                self.protected += self._groups.windowed
            block.holds += 1
            block.loose = False

    def release(self, blocks: Sequence[Block]) -> list[int]:
        """The pages of those that were never the tree's: they are the caller's."""
        out: list[int] = []
        for block in blocks:
            if not block.holds:
                raise ValueError("a block of windowed groups was released more often than held")
            block.holds -= 1
            if block.node is None:
                out += block.pages
            elif not block.holds:
                block.node.idle += 1
                self.protected -= self._groups.windowed
                self._offer(block.node)
        return out

    def evict(self, n: int) -> list[int]:
        """Forget n pages or a block more, or all there are, and hand them to the caller: loose blocks first, then in
        the order of the policy windows in which no request is, and leaves, each from its end."""
        out: list[int] = []
        while len(out) < n and self._loose:
            block = self._loose.popleft()
            if block.loose and not block.holds and block.node is not None:
                out += self._drop(block.node, block.index)
        while len(out) < n and self._heap:
            rank, _, node = heapq.heappop(self._heap)
            node.queued = False
            if rank == self._order(node):
                if node.is_leaf:
                    pages, node = self._trim(node, (n - len(out)) // self._groups.count or 1)
                    out += pages
                else:
                    for index in sorted(index for index, block in node.window.items() if not block.holds):
                        if len(out) < n:
                            out += self._drop(node, index)
            self._offer(node)
        self.cached_pages -= len(out)
        return out

    def flush(self) -> list[int]:
        """Forget everything that is not locked; the pages are the caller's."""
        return self.evict(self.evictable_pages)

    def all_pages(self) -> list[int]:
        """Every page in the tree, for accounting."""
        nodes = self._nodes()
        windowed = [page for node in nodes for block in node.window.values() for page in block.pages]
        return [page for node in nodes for page in _ids(node.pages)] + windowed

    def blocks(self) -> list[Block]:
        """Those of windowed groups, for accounting."""
        return [block for node in self._nodes() for block in node.window.values()]

    def check(self, locks: list[Node] | None = None) -> None:
        """Raises AssertionError for a broken invariant. `locks`: the locks that are held, one entry per lock."""
        nodes = self._nodes()
        for node in nodes:
            self._check_node(node)
        pages = self.all_pages()
        assert len(set(pages)) == len(pages) == self.cached_pages, f"{len(pages)} pages, {self.cached_pages} counted"
        held = sum(self._groups.windowed for block in self.blocks() if block.holds)
        assert self.protected == held + sum(node.count for node in nodes if node.refs), "protected is off"
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
        assert len(node.key) * self._groups.full == node.count * self._page > 0, "an edge is not whole blocks"
        assert node.refs >= sum(child.refs for child in node.children.values()), "a parent has too few references"
        if node.parent is not self._root:
            assert self._rank(node) <= self._rank(node.parent), "a child would be kept longer than its parent"
        assert node.queued or not (node.is_leaf or node.idle), "an evictable node is not queued"
        assert node.idle == sum(not block.holds for block in node.window.values()), "idle is off"
        for index, block in node.window.items():
            assert (block.node, block.index) == (node, index), "a block is not where it says"
            assert 0 <= index * self._entry < len(node.pages), "a block is beyond its edge"
            assert len(block.pages) == self._groups.windowed, "a block has not a page of each group"
            assert node.refs or not block.holds, "a block is held, and its full pages are not locked"

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
        blocks = at // self._page
        end = blocks * self._entry
        upper = Node(node.parent, node.label, node.key[:at], node.pages[:end], node.used, node.priority)
        upper.refs, upper.hits, upper.ended = node.refs, node.hits, node.ended
        node.parent.children[node.label] = upper
        node.key, node.pages, node.parent = node.key[at:], node.pages[end:], upper
        node.label = node.key[: self._page]
        upper.children[node.label] = node
        if node.window:
            held, node.window, node.idle = node.window, NO_WINDOW, 0
            for index, block in held.items():
                self._place(block, *((upper, index) if index < blocks else (node, index - blocks)))
            self._offer(upper)
        return upper

    def _trim(self, node: Node, blocks: int) -> tuple[list[int], Node]:
        """Drop the last `blocks` of a leaf, or all it has: their pages, and the node that may be the next to go."""
        assert node.parent is not None
        end = len(node.pages) // self._entry
        blocks = min(blocks, end)
        out = _ids(node.pages[-blocks * self._entry :])
        for index in range(end - blocks, end) if node.window else ():
            if index in node.window:
                out += self._drop(node, index)
        if blocks == end:
            del node.parent.children[node.label]
            return out, node.parent
        node.pages = node.pages[: -blocks * self._entry]
        node.key = node.key[: -blocks * self._page]
        return out, node

    def _put(self, node: Node, end: int, window: Sequence[Block]) -> None:
        """Take the blocks that are not there yet; the last one ends at `node`, `end` blocks from the root."""
        first = self._groups.first(end * self.page_size, self.page_size)
        start, loose = end, list[Block]()
        for at, block in zip(range(end - 1, -1, -1), reversed(window), strict=False):
            while at < (start := end - len(node.pages) // self._entry):
                assert node.parent is not None
                node, end = node.parent, start
            node.ended = self._clock
            if block.node is None and at - start not in node.window:
                self._place(block, node, at - start)
                self.cached_pages += len(block.pages)
                self.protected += len(block.pages)
                self.version += 1
                if at < first:
                    block.loose = True
                    loose.append(block)
        self._loose.extend(reversed(loose))

    def _place(self, block: Block, node: Node, index: int) -> None:
        block.node, block.index = node, index
        if not node.window:
            node.window = {}
        node.window[index] = block
        node.idle += not block.holds

    def _drop(self, node: Node, index: int) -> list[int]:
        """Forget a block that nobody holds; its pages."""
        block = node.window.pop(index)
        block.node = None
        node.idle -= 1
        return block.pages

    def _usable(self, found: list[tuple[Node, int]]) -> int:
        """Blocks of the longest prefix of these whose next token finds all it sees of windowed groups."""
        best = start = run = 0  # run: blocks in a row that are there, up to the one looked at
        for node, common in found:
            count, last = common // self._page, -1
            for index in sorted(index for index in node.window if index < count):
                run = run + 1 if index == last + 1 else 1
                last, end = index, start + index + 1
                if run >= end - self._groups.first(end * self.page_size, self.page_size):
                    best = end
            run = run if last == count - 1 else 0
            start += count
        return best

    def _window(self, node: Node, length: int) -> list[Block]:
        """What the token after the prefix of `length` that ends at node sees of windowed groups, in order."""
        out, end = list[Block](), length // self.page_size
        first = self._groups.first(length, self.page_size)
        while node.parent is not None and end > first:
            start = end - len(node.pages) // self._entry
            out += [node.window[at - start] for at in range(end - 1, max(start, first) - 1, -1)]
            node, end = node.parent, start
        return out[::-1]

    def _order(self, node: Node) -> tuple[int, int]:
        """Of a leaf by the policy; of a window by when it was stored or found, not by what passed through since."""
        rank = self._rank(node)
        return rank if node.is_leaf else (rank[0], node.ended)

    def _offer(self, node: Node) -> None:
        """Queue `node` for eviction if it is an unlocked leaf or has blocks that nobody holds."""
        if not node.queued and (node.is_leaf or node.idle):
            node.queued = True
            self._serial += 1
            heapq.heappush(self._heap, (self._order(node), self._serial, node))


def _ids(raw: bytes) -> list[int]:
    return memoryview(raw).cast("i").tolist()
