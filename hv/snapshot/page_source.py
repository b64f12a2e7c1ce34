"""Where the pages come from that hv/snapshot/pager.py serves: a plain memory file, or a packed one.

A source answers run(page) with (address, first, end): the pages first to end-1, of which `page` is one, lie at that
address in this process; 0 stands for zeros. None: it will come by itself (hv/snapshot/page_wire.py). The answer holds
until the next call. Driven by tests/unit/test_pager.py.
"""

from __future__ import annotations

__all__ = ["FileSource", "PackedSource"]

from _ctypes import addressof
from bisect import bisect_right
from mmap import MAP_PRIVATE, mmap

from hv.linux.syscall import buffer
from hv.memory.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Source(Protocol):
        """What run() is."""

        def run(self, page: int) -> tuple[int, int, int] | None: ...

_MAP_NORESERVE = 0x4000         # asm-generic/mman.h


class FileSource:
    """The memory file `fd` of `size` bytes: pages are copied straight from the page cache, holes are zeros."""

    def __init__(self, fd: int, size: int) -> None:
        from hv.snapshot.memory import data_runs

        self._map = mmap(fd, size, MAP_PRIVATE | _MAP_NORESERVE)
        self._at = addressof((type(buffer(1))).from_buffer(self._map))
        self._edges = [0]           # pages where data and holes meet; even indices begin holes
        for first, end in data_runs(fd, 0, size):
            self._edges += [first // PAGE_SIZE, -(-end // PAGE_SIZE)]
        self._edges.append(size // PAGE_SIZE)

    def run(self, page: int) -> tuple[int, int, int]:
        """See above."""
        index = bisect_right(self._edges, page) - 1
        first, end = self._edges[index], self._edges[index + 1]
        return (self._at + first * PAGE_SIZE if index % 2 else 0), first, end


class PackedSource:
    """A packed memory file (hv/snapshot/pack.py): blocks are unpacked when they are wanted, some are kept."""

    KEPT = 16

    def __init__(self, fd: int, size: int) -> None:
        from hv.snapshot.pack import Packed

        self._packed = Packed(fd, size)
        self._pages = self._packed.block // PAGE_SIZE
        self._blocks: dict[int, Any] = {}       # number -> its content in a buffer, None for zeros; the oldest first

    def run(self, page: int) -> tuple[int, int, int]:
        """See above. SnapshotError where the block is damaged."""
        number = page // self._pages
        if number in self._blocks:
            place = self._blocks.pop(number)
        else:
            content = self._packed.read(number)
            place = None if content.count(0) == len(content) else buffer(len(content), content)
        self._blocks[number] = place
        if len(self._blocks) > self.KEPT:
            del self._blocks[next(iter(self._blocks))]
        first = number * self._pages
        end = first + self._packed.length(number) // PAGE_SIZE
        return (0 if place is None else addressof(place)), first, end
