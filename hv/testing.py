"""A mock driver: drives a virtio device without a guest and without /dev/kvm, and breaks rules on demand.

    driver = Driver(Rng())                  # memory, a loop that runs when told, interrupts that are counted
    driver.probe()                          # reset to DRIVER_OK, all queues
    used = driver.request(0, [b"out"], [16])            # one chain, notified and served: (written, [bytes, ...])

Everything goes through the device's transport-facing methods, as the transports do it. It is part of pyhv so that
devices outside of it can be tested too: docs/adding-a-virtio-device.md. Driven by tests/unit/test_virtio_device.py.
"""

from __future__ import annotations

__all__ = ["BUFFERS", "MEMORY", "RINGS", "Driver", "EpollLoop", "FakeInterrupts", "FakeLoop", "Ring"]

import os
import select
import struct

from hv.devices.virtio import ids
from hv.memory.guest import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import VirtioDevice

MEMORY = 16 << 20
RINGS = 0x100000        # queue i has 64 KiB from here + i * 0x10000: descriptors, available ring, used ring
BUFFERS = 0x400000      # handed out from here up


class FakeLoop:
    """The I/O loop's face; nothing runs before `run`."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.handlers: dict[int, tuple[int, Callable[[int], None]]] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> bool:
        """Watch a descriptor."""
        if fd in self.handlers:
            raise FileExistsError(fd)
        self.handlers[fd] = (events, handler)
        return True

    def modify(self, fd: int, events: int) -> None:
        """Change the events it is watched for."""
        self.handlers[fd] = (events, self.handlers[fd][1])

    def remove(self, fd: int) -> None:
        """Forget it."""
        self.handlers.pop(fd, None)

    def call(self, function: Callable[[], None]) -> None:
        """Keep a call for `run`."""
        self.calls.append(function)

    def call_later(self, seconds: float, function: Callable[[], None]) -> object:
        """Keep a timer; a test calls `timers[n][1]()` when it thinks it is time."""
        self.timers.append((seconds, function))
        return self.timers[-1]

    def cancel(self, timer: object) -> None:
        """Forget a timer."""
        self.timers = [kept for kept in self.timers if kept is not timer]

    def run(self, most: int = 10000) -> None:
        """Run calls until none is left."""
        for _ in range(most):
            if not self.calls:
                return
            self.calls.pop(0)()
        raise AssertionError("the device keeps calling itself")

    def poll(self, timeout: float = 0.0) -> int:
        """Serve descriptors that are ready now, as epoll would; how many were."""
        poll = select.poll()
        for fd, (events, _) in self.handlers.items():
            poll.register(fd, events & 0x3F)
        ready = poll.poll(timeout * 1000)
        for fd, events in ready:
            if fd in self.handlers:
                if self.handlers[fd][0] & select.EPOLLET:       # an eventfd: once for each time it was written
                    os.eventfd_read(fd)
                self.handlers[fd][1](events)
        self.run()
        return len(ready)


class EpollLoop(FakeLoop):
    """With the kernel's epoll, for devices that depend on its edges. Close `epoll` at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.epoll = select.epoll()

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> bool:
        """Watch a descriptor."""
        self.epoll.register(fd, events)
        return super().add(fd, events, handler)

    def modify(self, fd: int, events: int) -> None:
        """Change the events it is watched for."""
        self.epoll.modify(fd, events)
        super().modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget it."""
        if fd in self.handlers:
            self.epoll.unregister(fd)
        super().remove(fd)

    def poll(self, timeout: float = 0.0) -> int:
        """Serve descriptors that are ready; how many were."""
        ready = self.epoll.poll(timeout, 4096)
        for fd, events in ready:
            if fd in self.handlers:
                self.handlers[fd][1](events)
        self.run()
        return len(ready)


class FakeInterrupts:
    """Counts what a transport would tell the driver."""

    def __init__(self) -> None:
        self.used: dict[int, int] = {}
        self.config = 0

    def queue_used(self, index: int) -> None:
        """Requests of queue `index` were used."""
        self.used[index] = self.used.get(index, 0) + 1

    def state(self) -> dict[str, object]:
        """Nothing to keep."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """Nothing to take over."""

    def config_changed(self) -> None:
        """The configuration space has changed."""
        self.config += 1


class Ring:
    """The driver's side of one split queue."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.memory, self.index, self.size = driver.memory, index, size
        self.driver = driver
        self.desc = RINGS + index * 0x10000
        self.avail = self.desc + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.free = 0           # next descriptor to use; tests never have more than `size` in flight
        self.avail_index = self.seen = 0
        self.buffers: dict[int, list[tuple[int, int]]] = {}     # head -> writable (gpa, length)

    def describe(self, at: int, gpa: int, length: int, flags: int, following: int) -> None:
        """Write descriptor `at`, whatever it says."""
        self.memory.write(self.desc + 16 * at, struct.pack("<QIHH", gpa, length, flags, following))

    def offer(self, head: int) -> None:
        """Make the chain at `head` available."""
        self.memory.put16(self.avail + 4 + 2 * (self.avail_index % self.size), head)
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.memory.put16(self.avail + 2, self.avail_index)

    def add(self, readable: list[bytes], writable: list[int], *, indirect: bool = False) -> int:
        """A chain of `readable` buffers and writable ones of the given lengths; its head."""
        parts = [(self.driver.buffer(data), len(data), 0) for data in readable]
        parts += [(self.driver.buffer(length), length, ids.DESC_WRITE) for length in writable]
        rows = [struct.pack("<QIHH", gpa, length, flags | (ids.DESC_NEXT if n + 1 < len(parts) else 0), n + 1)
                for n, (gpa, length, flags) in enumerate(parts)]
        head = self.free
        if indirect:
            table = b"".join(rows)
            self.describe(head, self.driver.buffer(table), len(table), ids.DESC_INDIRECT, 0)
            self.free = (self.free + 1) % self.size
        else:
            for n, (gpa, length, flags) in enumerate(parts):
                last = n + 1 == len(parts)
                self.describe((head + n) % self.size, gpa, length, flags | (0 if last else ids.DESC_NEXT),
                              (head + n + 1) % self.size)
            self.free = (self.free + len(parts)) % self.size
        self.buffers[head] = [(gpa, length) for gpa, length, flags in parts if flags]
        self.offer(head)
        return head

    def take(self) -> list[tuple[int, int, list[bytes]]]:
        """What was used since the last look: (head, written, contents of the writable buffers)."""
        found = []
        while self.seen != self.memory.u16(self.used + 2):
            head, written = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8))
            found.append((head, written, [self.memory.read(*where) for where in self.buffers.pop(head, [])]))
            self.seen = (self.seen + 1) & 0xFFFF
        self.memory.put16(self.avail + 4 + 2 * self.size, self.seen)       # used_event: interrupt at the next one
        return found


class Driver:
    """Drives `device` from reset to its queues."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory | None = None, loop: FakeLoop | None = None,
                 interrupts: FakeInterrupts | None = None) -> None:
        self.device = device
        self.memory = memory or GuestMemory(MEMORY)
        self.loop = loop or FakeLoop()
        self.interrupts = interrupts or FakeInterrupts()
        self.rings: list[Ring] = []
        self._free = BUFFERS
        device.attach(self.memory, self.loop, self.interrupts)

    def buffer(self, content: bytes | int) -> int:
        """Guest memory with `content`, or of that many bytes of 0xAA; where it is."""
        data = b"\xaa" * content if isinstance(content, int) else content
        if self._free + len(data) > self.memory.size:
            self._free = BUFFERS
        at = self._free
        self.memory.write(at, data)
        self._free = (at + len(data) + 15) & ~15
        return at

    def probe(self, features: int | None = None, sizes: dict[int, int] | None = None) -> Driver:
        """Reset, negotiate (everything offered, by default), set up all queues, DRIVER_OK."""
        device = self.device
        device.set_status(0)
        device.set_status(ids.ACKNOWLEDGE)
        device.set_status(ids.ACKNOWLEDGE | ids.DRIVER)
        wanted = device.offered if features is None else features
        device.select_features(True, wanted & 0xFFFFFFFF)
        device.select_features(False, wanted >> 32)
        device.set_status(ids.ACKNOWLEDGE | ids.DRIVER | ids.FEATURES_OK)
        assert device.status & ids.FEATURES_OK, device.fault_texts
        self.rings = []
        for index, queue in enumerate(device.queues):
            ring = Ring(self, index, (sizes or {}).get(index, min(queue.max_size, 64)))
            self.memory.fill(ring.desc, 0x10000)
            queue.size, queue.desc, queue.avail, queue.used = ring.size, ring.desc, ring.avail, ring.used
            device.enable_queue(index, True)
            self.rings.append(ring)
        device.set_status(ids.ACKNOWLEDGE | ids.DRIVER | ids.FEATURES_OK | ids.DRIVER_OK)
        self.loop.run()
        return self

    def notify(self, index: int) -> None:
        """Kick queue `index` and let the device work."""
        self.device.serve(index)
        self.loop.run()

    def request(self, index: int, readable: list[bytes], writable: list[int], *,
                indirect: bool = False) -> tuple[int, list[bytes]]:
        """One chain, to its end: (written, contents of the writable buffers)."""
        head = self.rings[index].add(readable, writable, indirect=indirect)
        self.notify(index)
        used = self.rings[index].take()
        assert [row[0] for row in used] == [head], (used, self.device.fault_texts)
        return used[0][1], used[0][2]
