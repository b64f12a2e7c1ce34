"""A set of pages of guest RAM: what was written since somebody began to look.

The pages of all ranges are numbered one behind the other, as they lie in a snapshot's memory file. KVM tells of what
the guest wrote (hv/snapshot/track.py); what pyhv itself writes to guest RAM, it notes here: GuestMemory.write, the
queues of virtio devices, the instructions that hv/softkvm completes. Driven by tests/unit/test_dirty.py.
"""

from __future__ import annotations

__all__ = ["PageSet"]

from hv.memory.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from hv.memory.region import Region

_SHIFT = PAGE_SIZE.bit_length() - 1


class PageSet:
    """Pages of the ranges `regions`. Adding is safe from any thread: a page is one byte."""

    def __init__(self, regions: tuple[Region, ...]) -> None:
        self._starts = []           # (first gpa, end, number of the first page)
        count = 0
        for region in regions:
            self._starts.append((region.gpa, region.gpa + region.size, count))
            count += region.size >> _SHIFT
        self.pages = count
        self._bytes = bytearray(count)

    def mark(self, gpa: int, length: int) -> None:
        """[gpa, gpa+length), which lies in one range, was written."""
        if length <= 0:
            return
        for start, end, number in self._starts:
            if start <= gpa < end:
                first = number + (gpa - start >> _SHIFT)
                last = number + (min(gpa + length, end) - 1 - start >> _SHIFT)
                if first == last:
                    self._bytes[first] = 1
                else:
                    self._bytes[first:last + 1] = b"\1" * (last + 1 - first)
                return

    def add_bitmap(self, number: int, bitmap: bytes | bytearray, pages: int) -> None:
        """The `pages` pages of the range that begins with page `number`: bit n of `bitmap` is page n of it.

        So KVM_GET_DIRTY_LOG has it. Most of a log is empty: whole stretches of it are skipped.
        """
        into = self._bytes
        size = (pages + 7) // 8
        for start in range(0, size, 512):
            piece = bitmap[start:min(start + 512, size)]
            if piece.count(0) == len(piece):
                continue
            for at, byte in enumerate(piece, start):
                if byte:
                    for bit in range(8):
                        page = 8 * at + bit
                        if byte >> bit & 1 and page < pages:
                            into[number + page] = 1

    def add_page(self, number: int) -> None:
        """One page."""
        self._bytes[number] = 1

    def add_run(self, first: int, end: int) -> None:
        """Pages first to end-1."""
        self._bytes[first:end] = b"\1" * (end - first)

    def take(self) -> PageSet:
        """A set of what was marked so far; this one is empty then."""
        taken = PageSet(())
        taken._starts, taken.pages = self._starts, self.pages
        taken._bytes = bytes(self._bytes)  # type: ignore[assignment]
        # Byte by byte: what another thread marks meanwhile stays marked.
        at = taken._bytes.find(1)
        while at >= 0:
            self._bytes[at] = 0
            at = taken._bytes.find(1, at + 1)
        return taken

    def __len__(self) -> int:
        return self._bytes.count(1)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs of marked pages as (first, end)."""
        data = self._bytes
        at = data.find(1)
        while at >= 0:
            end = data.find(0, at)
            if end < 0:
                end = self.pages
            yield at, end
            at = data.find(1, end)
