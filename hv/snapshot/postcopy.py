"""Post-copy: the guest runs at the target already, and its pages follow. The source's side, and a part of the target's.

    STATE with "later", the pages that the target lacks ->
                                    <-  WANT    a page that somebody there waits for
    PAGES it, and what is missing behind it ->
    PAGES the others, while nobody waits ->
    ROUND all has been sent ->
                                    <-  ROUND   all of it is here

LOADED, GO and DONE come between these as always. Each page is sent once: after GO the target's is the true one. So a
connection that is lost in that time costs the machine: neither side has all of it.
Driven by tests/kvm/test_postcopy.py.
"""

from __future__ import annotations

__all__ = ["Later", "Relay"]

from hv.errors import HvError, SnapshotError
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.lazy import LazyMemory, Served
from hv.snapshot.wire import PAGES, PATIENCE, ROUND, WANT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.memory.dirty import PageSet
    from hv.memory.guest import GuestMemory
    from hv.snapshot.wire import Wire

_PIECE = 16         # pages sent at once: who waits for another waits for no more than these


class Later:
    """`pages` of a machine that stands still, for who is at the other end of `wire`."""

    def __init__(self, machine: Machine, wire: Wire, pages: PageSet) -> None:
        self._memory, self._wire = machine.memory, wire
        self._left = bytearray(pages.pages)         # 1: the target lacks it
        for first, end in pages.runs():
            self._left[first:end] = b"\1" * (end - first)
        self._at = 0                                # none is left before it

    def receive(self, *kinds: int) -> None:
        """Wait for a frame of one of `kinds`, and send pages meanwhile."""
        while True:
            if not self._wire.ready() and self._push():
                continue
            kind, argument, _ = self._wire.receive(WANT, *kinds)
            if kind != WANT:
                return
            if argument >= len(self._left):
                raise HvError(f"the other side wants page {argument} of {len(self._left)}")
            if self._left[argument]:
                self._send(argument)

    def finish(self) -> None:
        """Send what is left; all of it is there when this returns."""
        while True:
            while self._wire.ready():
                _, argument, _ = self._wire.receive(WANT)
                if argument < len(self._left) and self._left[argument]:
                    self._send(argument)
            if not self._push():
                break
        self._wire.send(ROUND)
        self.receive(ROUND)

    def _push(self) -> bool:
        """Send the next piece; False where none is left."""
        self._at = self._left.find(1, self._at)
        if self._at < 0:
            self._at = len(self._left)
            return False
        self._send(self._at)
        return True

    def _send(self, first: int) -> None:
        end = self._left.find(0, first, first + _PIECE)
        end = min(first + _PIECE, len(self._left)) if end < 0 else end
        number = 0
        for region in self._memory.regions:
            count = region.size // PAGE_SIZE
            if number <= first < number + count:
                end = min(end, number + count)
                view = region.view[(first - number) * PAGE_SIZE:(end - number) * PAGE_SIZE]
                try:
                    self._wire.send(PAGES, first, view)
                finally:
                    view.release()
            number += count
        self._left[first:end] = bytes(end - first)


class Relay:
    """The target's connection from the machine's state on: the process that fills its `memory` in has it.

    `later`: runs of bytes that the source has still; what is here of them is older, and dropped.
    """

    def __init__(self, machine: Machine, memory: GuestMemory, wire: Wire, later: list[tuple[int, int]]) -> None:
        if not isinstance(memory, LazyMemory):
            raise SnapshotError("later", "comes without post-copy having been asked for", "the source is hostile")
        start = 0
        for region in memory.regions:
            for first, end in later:
                low, high = max(first, start), min(end, start + region.size)
                if low < high and region.discard(low - start, high - low) != high - low:
                    raise HvError("the host keeps pages of the guest that it should give back",
                                  "memory must not be locked for post-copy")
            start += region.size
        runs = [(first // PAGE_SIZE, end // PAGE_SIZE) for first, end in later]
        memory.serve(machine, Served("wire", wire.fileno(), later=runs))
        self._memory = memory

    def send(self, kind: int) -> None:
        """A frame without content."""
        self._memory.say(kind)

    def receive(self, kind: int) -> None:
        """Wait for one."""
        self._memory.wait_for(kind, PATIENCE)
