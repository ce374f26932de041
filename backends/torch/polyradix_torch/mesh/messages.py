"""What rank 0 tells the others: calls of Rank by name, whose arguments may be what all ranks hold under one number."""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyradix.backend.protocol import HostArray


@dataclass(frozen=True)
class Call:
    """Call number `number`. Its result is kept under `keep`, or sent back if `answer`; before it, what is held under
    `dropped` is let go of."""

    method: str
    args: tuple[Any, ...]
    keep: int | None = None
    answer: bool = False
    number: int = 0
    dropped: tuple[int, ...] = ()


class Held:
    """Something that every rank has, here rank 0's `own`. The others let go of theirs some time after this is gone."""

    own: Any

    def __init__(self, number: int, dropped: deque[int]) -> None:
        self.number, self._dropped = number, dropped

    def __del__(self) -> None:
        self._dropped.append(self.number)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> int | None:
        return obj.number if isinstance(obj, Held) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, held: Mapping[int, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._held = held

    def persistent_load(self, pid: int) -> Any:
        return self._held[pid]


def packed(call: Call) -> bytes:
    out = io.BytesIO()
    _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(call)
    return out.getvalue()


def unpacked(data: bytes, held: Mapping[int, Any]) -> Call:
    call: Call = _Unpickler(data, held).load()
    return call


Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]  # by part: dtype, shape, and where it starts


class Window:
    """Memory that rank 0 and another rank see, in which arrays travel: of no file system, so no limit of /dev/shm's."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("polyradix-weights") if fd is None else fd
        self._size = 0
        self._map: mmap.mmap | None = None

    def write(self, parts: dict[str, HostArray]) -> Layout:
        """The last ones must have been read."""
        layout: Layout = {}
        end = 0
        for name, x in parts.items():
            layout[name] = x.dtype, x.shape, end
            end += -(-x.nbytes // 64) * 64
        if end > self._size:
            os.ftruncate(self.fd, end)
            self._size, self._map = end, mmap.mmap(self.fd, end)
        for name, view in self.read(layout).items():
            view[...] = parts[name]
        return layout

    def read(self, layout: Layout) -> dict[str, HostArray]:
        """Views, until the next write."""
        end = max(start + int(np.prod(shape)) * dtype.itemsize for dtype, shape, start in layout.values())
        if self._map is None or end > len(self._map):
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        out = {}
        for name, (dtype, shape, start) in layout.items():
            count = int(np.prod(shape))
            out[name] = np.frombuffer(self._map, dtype, count, start).reshape(shape)
        return out

    def clear(self) -> None:
        """Gives the memory back; `write` takes new."""
        os.ftruncate(self.fd, 0)
        self._size = 0

    def close(self) -> None:
        os.close(self.fd)
