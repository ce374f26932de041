"""The pool of KV page ids. Knows no device and no content: a page is a number, and here it is free or it is not."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Ids 1 .. pages-1. Page 0 is the backend's scratch page and is never handed out."""

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise ValueError(f"pages is {pages}; expected at least 2 (page 0 is scratch)")
        self.capacity = pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._is_free = bytearray(b"\1" * pages)
        self._is_free[0] = 0

    @property
    def available(self) -> int:
        return len(self._free)

    def alloc(self, n: int) -> list[int]:
        """n pages, owned by the caller from now on. Raises MemoryError, taking none, when fewer are free."""
        if n > len(self._free):
            raise MemoryError(f"{n} pages wanted; {len(self._free)} of {self.capacity} are free")
        if n <= 0:
            return []
        pages = self._free[-n:]
        del self._free[-n:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises ValueError for an id that is out of range or already free."""
        for page in pages:
            if not 0 < page <= self.capacity:
                raise ValueError(f"page {page} freed; expected 1 to {self.capacity}")
            if self._is_free[page]:
                raise ValueError(f"page {page} freed twice")
            self._is_free[page] = 1
            self._free.append(page)

    def free_pages(self) -> list[int]:
        """The free ids, for accounting."""
        return list(self._free)
