"""Pages that come from the source of a machine that is on its way here (post-copy, hv/snapshot/postcopy.py).

A source of hv/snapshot/pager.py, whose process has the connection from the machine's state on: what is touched and not
here yet is asked for, what comes is filled in, and what else is said on the connection is passed on to the VM's side.
Driven by tests/kvm/test_postcopy.py and tests/unit/test_pager.py.
"""

from __future__ import annotations

__all__ = ["WireSource"]

import socket
from _ctypes import addressof

from hv.errors import HvError
from hv.linux.syscall import buffer
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.wire import GO, PAGES, PIECE, ROUND, WANT, Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.snapshot.pager import Pager

HERE, THERE, ASKED = 0, 1, 2        # where a page is: not at the source any more, or there, and asked for


class WireSource:
    """`later`: the runs of pages that are still at the other end of the connection `fd`; all others are zeros."""

    END = ROUND

    def __init__(self, fd: int, size: int, later: list[tuple[int, int]]) -> None:
        self.fd = fd
        self.wire = Wire(socket.socket(fileno=fd))
        self.where = bytearray(size // PAGE_SIZE)
        for first, end in later:
            self.where[first:end] = bytes([THERE]) * (end - first)
        self._place = buffer(PIECE)
        self._view = memoryview(self._place).cast("B")

    @property
    def left(self) -> int:
        """How many pages are not here yet."""
        return len(self.where) - self.where.count(HERE)

    def run(self, page: int) -> tuple[int, int, int] | None:
        """See hv/snapshot/page_source.py; None for a page that will come."""
        if self.where[page] == HERE:
            first = max(self.where.rfind(kind, 0, page) for kind in (THERE, ASKED)) + 1
            ends = [at for kind in (THERE, ASKED) if (at := self.where.find(kind, page)) >= 0]
            return 0, first, min(ends, default=len(self.where))
        if self.where[page] == THERE:
            self.where[page] = ASKED
            self.wire.send(WANT, page)
        return None

    def hear(self, pager: Pager) -> int:
        """Take the next frame; its kind, where it is GO or ROUND: all has been sent. HvError where it is no good."""
        kind, first, length = self.wire.receive(PAGES, GO, ROUND)
        if kind != PAGES:
            if kind == ROUND and self.left:
                raise HvError(f"the source says that all is here, and {self.left} pages are not")
            return kind
        count = length // PAGE_SIZE
        if length % PAGE_SIZE or not count or first + count > len(self.where) \
                or self.where.find(HERE, first, first + count) >= 0:
            raise HvError(f"the source sent {length} bytes for page {first}, which are not what was due")
        self.wire.read_into(self._view[:length])
        pager.install(first, count, addressof(self._place))
        self.where[first:first + count] = bytes(count)
        return 0
