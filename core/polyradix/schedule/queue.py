"""Requests that wait, in the order in which they are to be admitted. Knows no pages and no tree."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Literal

from polyradix.schedule.request import Request

Policy = Literal["lpm", "fcfs", "priority"]
LPM_MAX_WAITING = 128  # above this, looking up every prefix costs more than a good order gains
OUTPUT_WEIGHT = 2  # a token of output counts as much as this many tokens of prompt
MOST_TENANTS = 1024  # remembered beyond those that wait, before the ones that would be lifted anyway are forgotten

_rank = attrgetter("rank")


class WaitingQueue:
    """fcfs: who ran before and was retracted, then who came first. lpm: the same, but the longest cached prefix first
    among those that never ran. priority: fcfs within a priority, the lowest number first.

    When `fair`, the tenant that got the least service goes first, whatever the policy but for priority and retracted
    requests: tenants have a virtual token counter each, and one that comes back starts no lower than the least of those
    that wait, so that nobody saves up. Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024).
    """

    def __init__(self, policy: Policy, fair: bool) -> None:
        self._policy = policy
        self._fair = fair
        self._count = 0
        self._queues: dict[str, list[Request]] = {}  # by tenant, none empty, in the order of rank
        self._served: Counter[str] = Counter()
        self._last = 0  # the counter of the tenant whose queue ended last

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return (req for queue in self._queues.values() for req in queue)

    def last(self) -> Request | None:
        """Of those that never ran, the least important, and of these the newest."""
        ends = [queue[-1] for queue in self._queues.values() if not queue[-1].admitted]
        return max(ends, key=_rank, default=None)

    def add(self, req: Request) -> None:
        req.rank = (req.priority if self._policy == "priority" else 0, not req.admitted, req.arrival)
        tenant = self._tenant(req)
        if tenant not in self._queues:
            self._lift(tenant)
        insort(self._queues.setdefault(tenant, []), req, key=_rank)
        self._count += 1

    def remove(self, req: Request) -> None:
        tenant = self._tenant(req)
        queue = self._queues[tenant]
        del queue[0 if queue[0] is req else bisect_left(queue, req.rank, key=_rank)]
        self._count -= 1
        if not queue:
            del self._queues[tenant]
            self._last = self._served[tenant]

    def order(self, cached: Callable[[Request], int]) -> Iterator[Request]:
        """All of them; each may be removed, and tenants charged, before the next is asked for."""
        heap: list[tuple[int, bool, int, int, Request, Iterator[Request]]] = []

        def push(requests: Iterator[Request]) -> None:
            if (req := next(requests, None)) is not None:
                first, second, arrival = req.rank
                heapq.heappush(heap, (first, second, self._served[self._tenant(req)], arrival, req, requests))

        lpm = self._policy == "lpm" and self._count <= LPM_MAX_WAITING
        for queue in self._queues.values():
            by_prefix = sorted(queue, key=lambda r: (r.rank[1], r.rank[1] and -cached(r))) if lpm else list(queue)
            push(iter(by_prefix))
        while heap:
            *_, req, rest = heapq.heappop(heap)
            yield req
            push(rest)

    def charge(self, req: Request, tokens: int) -> None:
        """Count tokens of prompt computed for the request's tenant."""
        self._served[self._tenant(req)] += tokens

    def charge_outputs(self, tenants: Iterable[str]) -> None:
        """Count a token of output for each time that a tenant is named."""
        for tenant, tokens in Counter(tenants).items():
            self._served[tenant] += OUTPUT_WEIGHT * tokens

    def _tenant(self, req: Request) -> str:
        return req.tenant if self._fair else ""

    def _lift(self, tenant: str) -> None:
        least = min((self._served[other] for other in self._queues), default=self._last)
        if len(self._served) > MOST_TENANTS + len(self._queues):
            kept = {t: n for t, n in self._served.items() if n > least or t in self._queues}
            self._served = Counter(kept)
        self._served[tenant] = max(self._served[tenant], least)
