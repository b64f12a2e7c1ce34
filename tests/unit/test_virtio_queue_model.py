"""The queue against a reference model: any order of what a driver and a device may do gives what the model says."""

from __future__ import annotations

import struct

from framework.driver import BUFFERS, Driver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hv.devices.virtio import ids
from hv.devices.virtio.chain import Chain
from hv.devices.virtio.device import COMMON_FEATURES, VirtioDevice
from hv.memory.guest import GuestMemory

SIZE = 8
MEMORY = GuestMemory(16 << 20)
TABLES = 0x300000       # an indirect table for each head
SLOT = 0x100            # bytes of buffer for each descriptor
PARTS = st.lists(st.tuples(st.integers(0, SLOT), st.booleans()), min_size=1, max_size=4)


class Plain(VirtioDevice):
    QUEUES = (SIZE,)


class QueueModel(RuleBasedStateMachine):
    """`waiting` chains were made available, `taken` ones popped; counters never wrap, the queue's do."""

    @initialize(start=st.sampled_from([0, 1, 0x7FFD, 0xFFF0, 0xFFFA, 0xFFFF]), event_idx=st.booleans())
    def begin(self, start: int, event_idx: bool) -> None:
        driver = Driver(Plain(), MEMORY).probe(COMMON_FEATURES & ~(0 if event_idx else ids.F_EVENT_IDX))
        self.ring, self.queue, self.event_idx = driver.rings[0], driver.device.queues[0], event_idx
        for at in (self.ring.avail, self.ring.used):
            MEMORY.put16(at + 2, start)
        self.queue.load({**self.queue.state(), "next": start, "used_index": start, "signalled": start})
        self.available = self.popped = self.pushed = self.seen = self.signalled = start
        self.event = start          # used_event: interrupt when this entry has been used
        self.no_interrupt = False
        self.set_event(0)
        self.free = list(range(SIZE))
        self.waiting: list[tuple[int, bytes, int, list[int]]] = []
        self.taken: list[tuple[Chain, int, list[int]]] = []
        self.returned: list[tuple[int, int, list[int]]] = []

    @rule(parts=PARTS, fill=st.integers(0, 255), indirect=st.booleans())
    def add(self, parts: list[tuple[int, bool]], fill: int, indirect: bool) -> None:
        if len(self.free) < (1 if indirect else len(parts)):
            return
        parts.sort(key=lambda part: part[1])
        slots = [self.free.pop(0) for _ in range(1 if indirect else len(parts))]
        head, out, room = slots[0], b"", 0
        rows = []
        for n, (length, writable) in enumerate(parts):
            address = BUFFERS + (head * 8 + n) * SLOT
            flags = (ids.DESC_WRITE if writable else 0) | (ids.DESC_NEXT if n + 1 < len(parts) else 0)
            following = n + 1 if indirect else slots[n + 1] if n + 1 < len(parts) else 0
            rows.append(struct.pack("<QIHH", address, length, flags, following))
            MEMORY.fill(address, SLOT, fill)
            out, room = out + (b"" if writable else bytes([fill]) * length), room + length * writable
        if indirect:
            MEMORY.write(TABLES + head * 0x100, b"".join(rows))
            self.ring.describe(head, TABLES + head * 0x100, 16 * len(rows), ids.DESC_INDIRECT, 0)
        else:
            for slot, row in zip(slots, rows, strict=True):
                MEMORY.write(self.ring.desc + 16 * slot, row)
        MEMORY.put16(self.ring.avail + 4 + 2 * (self.available % SIZE), head)
        self.available += 1
        MEMORY.put16(self.ring.avail + 2, self.available)
        self.waiting.append((head, out, room, slots))

    @rule()
    def pop(self) -> None:
        chain = self.queue.pop()
        if not self.waiting:
            assert chain is None
            return
        head, out, room, slots = self.waiting.pop(0)
        assert chain is not None
        assert (chain.head, b"".join(chain.readable), chain.writable_bytes) == (head, out, room)
        self.popped += 1
        self.taken.append((chain, room, slots))

    @precondition(lambda self: self.taken)
    @rule(which=st.integers(0, SIZE), written=st.integers(0, 4 * SLOT), byte=st.integers(0, 255))
    def push(self, which: int, written: int, byte: int) -> None:
        chain, room, slots = self.taken.pop(which % len(self.taken))
        writer = chain.writer()
        assert writer.write(bytes([byte]) * written) == min(written, room)
        self.queue.push(chain, writer.written)
        self.pushed += 1
        self.returned.append((chain.head, min(written, room), slots))

    @rule()
    def take(self) -> None:
        while MEMORY.u16(self.ring.used + 2) != self.seen & 0xFFFF:
            entry = MEMORY.read(self.ring.used + 4 + 8 * (self.seen % SIZE), 8)
            head, written, slots = self.returned.pop(0)
            assert struct.unpack("<II", entry) == (head, written)
            self.free += slots
            self.seen += 1
        assert not self.returned

    @rule(ahead=st.integers(-2, 4))
    def set_event(self, ahead: int) -> None:
        self.event = self.pushed + ahead
        MEMORY.put16(self.ring.avail + 4 + 2 * SIZE, self.event)

    @rule()
    def toggle_interrupts(self) -> None:
        self.no_interrupt = not self.no_interrupt
        MEMORY.put16(self.ring.avail, ids.AVAIL_NO_INTERRUPT if self.no_interrupt else 0)

    @rule()
    def needs_interrupt(self) -> None:
        fresh = self.pushed > self.signalled
        wanted = self.signalled <= self.event < self.pushed if self.event_idx else fresh and not self.no_interrupt
        assert self.queue.needs_interrupt() == wanted
        self.signalled = self.pushed

    @rule()
    def listen(self) -> None:
        assert self.queue.listen() == bool(self.waiting)
        if self.event_idx:
            assert MEMORY.u16(self.ring.used + 4 + 8 * SIZE) == self.popped & 0xFFFF
        else:
            assert MEMORY.u16(self.ring.used) == 0

    @rule()
    def save_and_load(self) -> None:
        state = self.queue.state()
        self.queue.load(state)
        assert self.queue.state() == state

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "waiting"):
            assert self.queue.pending() == len(self.waiting)
            assert MEMORY.u16(self.ring.used + 2) == self.pushed & 0xFFFF


QueueModel.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestQueueModel = QueueModel.TestCase
