"""Who owns which page. Knows no queue and no plan, but for their numbers.

A page is the pool's; or the tree's; or one request's: of full groups from its `shared`-th page on, of windowed ones in
blocks without a node; or the limbo's, which keeps what a request left until every plan launched by then was applied,
because a late row of it may still be in flight; or whoever `lend` gave it to. So no plan ever writes to a page that
another plan in flight uses for another request.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from polyradix.backend.batch import I32
from polyradix.cache.blocks import Block
from polyradix.cache.pool import PagePool
from polyradix.cache.radix import Match, Node, RadixCache
from polyradix.schedule.config import SchedulerConfig
from polyradix.schedule.plan import RowTable, Slots
from polyradix.schedule.request import Request


class Ledger:
    def __init__(self, config: SchedulerConfig, table: RowTable) -> None:
        self.pool = PagePool(config.pages)
        self.tree = RadixCache(config.page_size, config.eviction, config.groups)
        self._size, self._groups, self._radix = config.page_size, config.groups, config.radix
        self._ahead = config.chunk or config.max_tokens
        self._table = table
        self._lent: set[int] = set()
        self._limbo: deque[tuple[int, list[int], list[Block], Node]] = deque()  # by the plan to wait for

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits, alone."""
        return self._groups.tokens(self.pool.capacity, self._size)

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds in all groups."""
        return self.pool.capacity // self._groups.count * self._size

    @property
    def used(self) -> int:
        """Pages of running requests, shared prefixes included."""
        return self.pool.capacity - self.pool.available - self.tree.evictable_pages

    def take(self, n: int, keep: int = 0) -> list[int] | None:
        """n pages, evicting as needed; None if `keep` would not be left to take afterwards."""
        short = n - self.pool.available
        if short + keep > self.tree.evictable_pages:
            return None
        if short > 0:
            self.pool.free(self.tree.evict(short))
        return self.pool.alloc(n)

    def lend(self, tokens: int, keep: int) -> list[int] | None:
        """Pages for so many tokens, those of each block together in the order of groups."""
        pages = self.take(-(-tokens // self._size) * self._groups.count, keep)
        self._lent.update(pages or ())
        return pages

    def give_back(self, pages: list[int]) -> None:
        self._lent.difference_update(pages)
        self.pool.free(pages)

    def match(self, req: Request) -> Match:
        """What is cached of what it has to prefill, locked and held until `unmatch`. The last token is computed even on
        a full hit."""
        found = self.tree.match(req.fed[:-1] if self._radix else req.fed[:0], req.namespace, req.priority)
        self.tree.lock(found.node)
        self.tree.hold(found.window)
        return found

    def unmatch(self, found: Match) -> None:
        self.tree.release(found.window)
        self.tree.unlock(found.node)

    def admit(self, req: Request, keep: int) -> Match | None:
        """Give a waiting request the cached prefix, a row and full pages for the rest. None, changing nothing, if fewer
        than `keep` pages would be left besides those that its windows will take."""
        found = self.match(req)
        now, soon = self._wanted(req, found, self._table.available == self._table.rows)
        pages = self.take(now, keep + soon)
        if pages is None:
            self.unmatch(found)
            return None
        req.node, req.shared, req.stored = found.node, len(found.pages), found.length
        req.pages = found.pages + pages
        req.window, req.gone = found.window, found.length // self._size - len(found.window)
        req.branch = found.full if found.full > found.length else 0
        self._table.assign(req)
        return found

    def _wanted(self, req: Request, found: Match, alone: bool) -> tuple[int, int]:
        """Pages of full groups that its prefill takes beyond what was found, and then of windowed ones: when alone as
        many as it cannot do without, else what a chunk takes, so that chunks do not get small."""
        n, groups = len(req.fed), self._groups
        blocks = -(-n // self._size)
        most = groups.pages(n, self._size, 1 if alone else min(n - found.length, self._ahead)) - groups.full * blocks
        return groups.full * blocks - len(found.pages), max(0, most - groups.windowed * len(found.window))

    def fits(self, req: Request, found: Match, without: Sequence[Request], keep: int) -> bool:
        """Whether a waiting request, whose prefix was found, could be admitted once others are gone. Nothing is in
        flight."""
        nodes = [other.node for other in without if other.node is not None]
        pages = self.pool.available + self.tree.evictable_pages + self.tree.freed_by(nodes)
        pages += sum(len(other.pages) - other.shared for other in without)
        held = Counter(block for other in without for block in other.window)
        pages += self._groups.windowed * sum(block.holds == count for block, count in held.items())
        alone = self._table.available + len(without) == self._table.rows
        return sum(self._wanted(req, found, alone)) + keep <= pages

    def grow(self, rows: list[Request], slots: Slots) -> bool:
        """A block more for each of these, whose rows are `slots`. False, changing nothing, without enough pages."""
        full, count = self._groups.full, self._groups.count
        pages = self.take(len(rows) * count)
        if pages is None:
            return False
        where = [len(req.pages) // full for req in rows]
        for group, table in enumerate(self._table.tables):
            table[slots, where] = pages[group::count]
        for at, req in enumerate(rows):
            req.pages += pages[at * count : at * count + full]
            if full < count:
                req.window.append(Block(pages[at * count + full : (at + 1) * count]))
        return True

    def widen(self, req: Request, tokens: int) -> int:
        """Blocks of windowed groups for the next tokens of a prefill; for how many of them there are enough."""
        width = self._groups.windowed
        if not width:
            return tokens
        start, begin = int(self._table.computed[req.slot]), req.gone + len(req.window)
        most = (self.pool.available + self.tree.evictable_pages) // width
        count = min(-(-(start + tokens) // self._size) - begin, most)
        if count > 0:
            each = np.array(self.take(count * width), np.int32).reshape(count, width)
            self._table.pages[self._groups.full :, req.slot, begin : begin + count] = each.T
            req.window += map(Block, each.tolist())
        return min(tokens, (req.gone + len(req.window)) * self._size - start)

    def extend(self, req: Request, tokens: int, keep: int) -> bool:
        """Pages of full groups, so that the request has them for so many tokens, if `keep` are left."""
        more = -(-tokens // self._size) * self._groups.full - len(req.pages)
        pages = self.take(max(0, more), keep)
        if pages is None:
            return False
        req.pages += pages
        self._table.set_pages(req)
        return True

    def passed(self, req: Request, plan: int) -> None:
        """Let go of what no token to come sees. Plans in flight begin at `stored` or later, so they do not either. One
        block more is kept than that, or a prompt could not go on from the last whole block."""
        if req.branch and req.stored >= req.branch:
            self.share(req, req.fed[: req.branch], plan)
            req.branch = 0
        first = self._groups.first(req.stored - req.stored % self._size, self._size)
        if (count := first - req.gone) > 0:
            self._table.pages[self._groups.full :, req.slot, req.gone : first] = 0
            self.pool.free(self.tree.release(req.window[:count]))
            del req.window[:count]
            req.gone = first

    def share(self, req: Request, tokens: I32, plan: int) -> None:
        """Give the tree the full blocks of `tokens` whose KV is there. Where it has them already, the request goes on
        with the tree's full groups. `plan` was launched last."""
        count = min(req.stored, len(tokens)) // self._size
        end = count * self._groups.full
        if not self._radix or end <= req.shared:
            return
        tokens, window = tokens[: count * self._size], req.window[: count - req.gone]
        node, duplicates = self.tree.insert(tokens, req.pages[:end], req.namespace, req.priority, window)
        self.tree.lock(node)
        old, req.node, req.shared = req.node, node, end
        if duplicates:
            req.pages[:end] = self.tree.path(node)
            self._table.set_pages(req)
        assert old is not None
        self._release(plan, duplicates, [], old)

    def leave(self, req: Request, plan: int) -> None:
        """Take a request's pages and row; what it computed goes to the tree. `plan` was launched last."""
        self.share(req, req.tokens(), plan)
        assert req.node is not None
        self._release(plan, req.pages[req.shared :], req.window, req.node)
        self._table.release(req)
        req.node, req.pages, req.shared, req.stored = None, [], 0, 0
        req.window, req.gone, req.branch = [], 0, 0

    def _release(self, plan: int, pages: list[int], window: list[Block], node: Node) -> None:
        """Free pages, release blocks and unlock a node as soon as this plan was applied."""
        self._limbo.append((plan, pages, window, node))

    def drain(self, applied: int) -> None:
        """All plans up to this one were applied."""
        while self._limbo and self._limbo[0][0] <= applied:
            _, pages, window, node = self._limbo.popleft()
            self.pool.free(pages + self.tree.release(window))
            self.tree.unlock(node)

    def check(self, running: list[Request], in_flight: bool) -> None:
        """Raises AssertionError unless every page is accounted for exactly once and every reference is real."""
        nodes = [req.node for req in running if req.node is not None]
        assert len(nodes) == len(running), "a running request has no node"
        self.tree.check(nodes + [node for *_, node in self._limbo])
        held = Counter(block for req in running for block in req.window)
        held.update(block for *_, window, _ in self._limbo for block in window)
        assert all(block.holds == held[block] for block in [*held, *self.tree.blocks()]), "holds are off"
        pages = self.pool.free_pages() + self.tree.all_pages()
        pages += [page for _, limbo, _, _ in self._limbo for page in limbo]
        pages += [page for block in held if block.node is None for page in block.pages]
        pages += self._lent
        pages += [page for req in running for page in req.pages[req.shared :]]
        assert sorted(pages) == list(range(1, self.pool.capacity + 1)), "a page is lost or has two owners"
        assert self._limbo == deque() or in_flight, "pages wait for a plan that is not in flight"
        for req in running:
            self._check_row(req)

    def _check_row(self, req: Request) -> None:
        assert req.node is not None
        assert req.pages[: req.shared] == self.tree.path(req.node), f"{req.rid} does not hold the tree's pages"
        want = np.zeros_like(self._table.pages[:, req.slot])
        groups = self._groups
        want[: groups.full, : len(req.pages) // groups.full] = np.reshape(req.pages, (-1, groups.full)).T
        for at, block in enumerate(req.window, req.gone):
            want[groups.full :, at] = block.pages
        assert (self._table.pages[:, req.slot] == want).all(), f"the table has other pages than {req.rid}"
        first = groups.first(req.stored - req.stored % self._size, self._size)
        assert req.gone == first or not groups.windowed, f"{req.rid} holds blocks {first - req.gone} behind its window"
