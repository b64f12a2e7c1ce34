"""A descriptor chain: what the driver gives the device to read, then what it may write (virtio 1.2, 2.7.4).

Both parts are lists of views of guest RAM, already checked to lie in it. `Reader` and `Writer` walk them as one
stream of bytes, for devices whose headers may be split over descriptors in any way (2.7.4.1: "the device MUST NOT make
assumptions about the particular arrangement of descriptors"). Driven by tests/unit/test_virtio_chain.py.
"""

from __future__ import annotations

__all__ = ["Chain", "Reader", "Writer"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    Views = list[memoryview]


class Chain:
    """One request: `readable` and `writable` views of guest RAM, in order."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: Views, writable: Views) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable

    @property
    def readable_bytes(self) -> int:
        """How much the device may read."""
        return sum(map(len, self.readable))

    @property
    def writable_bytes(self) -> int:
        """How much the device may write."""
        return sum(map(len, self.writable))

    def reader(self) -> Reader:
        """What the driver wrote, from its start."""
        return Reader(self.readable)

    def writer(self) -> Writer:
        """What the driver left room for, from its start."""
        return Writer(self.writable)


class _Cursor:
    __slots__ = ("_at", "_index", "_views")

    def __init__(self, views: Views) -> None:
        self._views = views
        self._index = 0
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes between here and the end."""
        rest = self._views[self._index:]
        return sum(map(len, rest)) - self._at if rest else 0

    def take(self, length: int) -> Views:
        """Views of the next `length` bytes, or of as many as there are; moves on behind them."""
        taken = []
        while length > 0 and self._index < len(self._views):
            view = self._views[self._index]
            part = view[self._at:self._at + length]
            taken.append(part)
            length -= len(part)
            self._at += len(part)
            if self._at == len(view):
                self._index += 1
                self._at = 0
        return taken


class Reader(_Cursor):
    """Reads a chain's readable part."""

    __slots__ = ()

    def read(self, length: int) -> bytes:
        """A copy of the next `length` bytes, shorter where the chain ends: the caller checks."""
        return b"".join(self.take(length))


class Writer(_Cursor):
    """Writes a chain's writable part; `written` counts, for the used ring."""

    __slots__ = ("written",)

    def __init__(self, views: Views) -> None:
        super().__init__(views)
        self.written = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Copy `data`, or as much of it as there is room for; how much that was."""
        done = 0
        for part in self.take(len(data)):
            size = len(part)
            part[:] = data[done:done + size]
            done += size
        self.written += done
        return done

    def room(self, length: int) -> Views:
        """Views of the next `length` bytes for somebody else to fill, counted as written."""
        views = self.take(length)
        self.written += sum(map(len, views))
        return views
