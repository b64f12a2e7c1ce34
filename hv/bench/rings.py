"""A mock driver's queue whose requests are set up once, so that sending one costs the driver a few stores.

    ring = FastRing(driver, 1)
    chain = ring.chain([header, body], [16, 4096])      # in guest memory; chain.readable and chain.writable are views
    ring.offer(chain, ...)                              # as often as you like, after it came back
    for head, written in ring.taken(): ...

Driven by tests/unit/test_bench_load.py.
"""

from __future__ import annotations

__all__ = ["Chain", "FastRing"]

from hv.devices.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from hv.testing import Driver


class Chain:
    """A request at descriptor `head`, and its buffers."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: list[memoryview], writable: list[memoryview]) -> None:
        self.head, self.readable, self.writable = head, readable, writable


class FastRing:
    """Queue `index` of a probed driver; nobody else uses it from here on. Drop it before the memory is closed."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver, self._ring = driver, driver.rings[index]
        ring, memory = self._ring, driver.memory
        self._mask = ring.size - 1
        self._avail = memory.view(ring.avail, 6 + 2 * ring.size).cast("H")     # virtio 1.2, 2.7.6
        self._used = memory.view(ring.used, 4).cast("H")                       # 2.7.8
        self._entries = memory.view(ring.used + 4, 8 * ring.size).cast("I")
        self._offered = self._seen = 0

    @property
    def in_flight(self) -> int:
        """Requests that have not been taken."""
        return (self._offered - self._seen) & 0xFFFF

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return bool(self._used[1] != self._seen)

    @property
    def done(self) -> bool:
        """Whether all that was offered has come back."""
        return bool(self._used[1] == self._offered)

    def chain(self, readable: list[bytes], writable: list[int]) -> Chain:
        """Descriptors and buffers for a request. They are never given back."""
        driver, ring = self._driver, self._ring
        parts = [(driver.buffer(data), len(data), 0) for data in readable]
        parts += [(driver.buffer(length), length, ids.DESC_WRITE) for length in writable]
        head = ring.free
        ring.free += len(parts)
        if ring.free > ring.size:
            raise ValueError("no descriptor is left")
        for at, (gpa, length, flags) in enumerate(parts, head):
            more = ids.DESC_NEXT if at + 1 < ring.free else 0
            ring.describe(at, gpa, length, flags | more, at + 1 if more else 0)
        views = [driver.memory.view(gpa, length) for gpa, length, _ in parts]
        return Chain(head, views[:len(readable)], views[len(readable):])

    def offer(self, *chains: Chain) -> None:
        """Make them available. With EVENT_IDX the interrupt is asked for at the last one (2.7.7)."""
        avail, at, mask = self._avail, self._offered, self._mask
        for chain in chains:
            avail[2 + (at & mask)] = chain.head
            at += 1
        avail[mask + 3] = (at - 1) & 0xFFFF
        self._offered = avail[1] = at & 0xFFFF

    def taken(self) -> Iterator[tuple[int, int]]:
        """(head, bytes written) of what came back since the last look."""
        used, entries = self._used, self._entries
        while self._seen != used[1]:
            at = 2 * (self._seen & self._mask)
            self._seen = (self._seen + 1) & 0xFFFF
            yield entries[at], entries[at + 1]
