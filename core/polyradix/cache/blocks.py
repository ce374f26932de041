"""A block is `page_size` tokens of a sequence: a page for each group of layers (KVSpec.groups), the windowed among them
only while it is in the window. Knows no device, no tree and no pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyradix.cache.radix import Node


@dataclass(frozen=True)
class Groups:
    """`full` groups keep all tokens. Each of `windowed` groups, which come after, keeps what a query sees: the newest
    `window` keys, itself included. Raises ValueError for what cannot be."""

    full: int = 1
    windowed: int = 0
    window: int = 1

    def __post_init__(self) -> None:
        for name, least in {"full": 1, "windowed": 0, "window": 2 if self.windowed else 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"Groups.{name} is {getattr(self, name)}; expected at least {least}")

    @property
    def count(self) -> int:
        return self.full + self.windowed

    def first(self, position: int, page_size: int) -> int:
        """The first block whose keys a query at `position` sees through the window."""
        return max(0, position - self.window + 1) // page_size

    def pages(self, tokens: int, page_size: int, ahead: int = 1) -> int:
        """The most pages a sequence of `tokens` holds while it computes up to `ahead` of them at once."""
        blocks, new = -(-tokens // page_size), -(-ahead // page_size)
        return self.full * blocks + self.windowed * min(blocks, self._reach(page_size) + new)

    def tokens(self, pages: int, page_size: int) -> int:
        """The longest sequence that fits into so many pages when alone."""
        live = self._reach(page_size) + 1
        if pages <= self.count * live:
            return pages // self.count * page_size
        return (pages - self.windowed * live) // self.full * page_size

    def _reach(self, page_size: int) -> int:
        """Blocks in the window of a query that begins a block."""
        return -(-(self.window - 1) // page_size)


class Block:
    """The windowed groups' pages of one block. Without a node it belongs to the one request that holds it. With one it
    is the tree's, is block `index` of the node's edge, and `holds` requests use it. `loose`: no request is known to go
    on within reach of it."""

    __slots__ = ("holds", "index", "loose", "node", "pages")

    def __init__(self, pages: list[int]) -> None:
        self.pages = pages
        self.holds = 1
        self.node: Node | None = None
        self.index = 0
        self.loose = False
