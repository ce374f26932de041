"""What a scheduler is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from polyradix.cache.blocks import Groups
from polyradix.cache.radix import ONE_GROUP, EvictionPolicy
from polyradix.schedule.queue import Policy


@dataclass(frozen=True)
class SchedulerConfig:
    """`pages` includes scratch page 0. `max_tokens` is one step's budget, and `chunk` that of its prefill alone;
    `max_context` counts prompt and outputs. `conservativeness` scales how many pages are left for outputs to come. With
    `single_rows`, prefill that fits into one or two steps of `max_seqs` tokens is rows of one token."""

    page_size: int
    pages: int
    max_tokens: int
    max_seqs: int
    max_context: int
    policy: Policy = "lpm"
    radix: bool = True
    eviction: EvictionPolicy = "lru"
    fair: bool = False
    chunk: int | None = None
    conservativeness: float = 1.0
    single_rows: bool = False
    groups: Groups = ONE_GROUP

    def __post_init__(self) -> None:
        least = {
            "page_size": 1,
            "pages": 1 + self.groups.count,
            "max_seqs": 1,
            "max_tokens": self.max_seqs,
            "max_context": 2,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                why = " (max_seqs: every running request may decode)" if name == "max_tokens" else ""
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}{why}")
        if self.policy not in get_args(Policy):
            raise ValueError(f"policy is {self.policy!r}; expected one of {', '.join(get_args(Policy))}")
