"""The split queue, against rings in memory: what drivers do, and what they must not."""

from __future__ import annotations

import struct

import pytest
from framework.driver import BUFFERS, MEMORY, RINGS, Driver, Ring
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import ids
from hv.devices.virtio.device import COMMON_FEATURES, VirtioDevice
from hv.devices.virtio.queue import Queue, QueueError
from hv.memory.guest import GuestMemory
from hv.memory.layout import HIGH_RAM_START, LOW_RAM_END


class Plain(VirtioDevice):
    """Does nothing by itself: the tests pop and push."""

    QUEUES = (256,)


def ring(size: int = 8, features: int = COMMON_FEATURES, start: int = 0,
         memory: GuestMemory | None = None) -> tuple[Queue, Ring]:
    """A queue in use and the driver's side of it, after `start` requests."""
    driver = Driver(Plain(), memory).probe(features, {0: size})
    queue, side = driver.device.queues[0], driver.rings[0]
    side.avail_index = side.seen = start
    driver.memory.put16(side.avail + 2, start)
    driver.memory.put16(side.used + 2, start)
    queue.load({**queue.state(), "next": start, "used_index": start, "signalled": start})
    side.take()
    return queue, side


def used_event(side: Ring, value: int) -> None:
    side.memory.put16(side.avail + 4 + 2 * side.size, value & 0xFFFF)


def avail_event(side: Ring) -> int:
    return side.memory.u16(side.used + 4 + 8 * side.size)


# chains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("start", [0, 5, 0xFFFE])
def test_a_chain_comes_and_goes(indirect: bool, start: int) -> None:
    queue, side = ring(start=start)
    for turn in range(20):
        head = side.add([b"one", b"two!"], [5, 600], indirect=indirect)
        assert queue.pending() == 1
        chain = queue.pop()
        assert chain is not None and chain.head == head and queue.pop() is None
        assert [bytes(view) for view in chain.readable] == [b"one", b"two!"]
        assert [len(view) for view in chain.writable] == [5, 600]
        assert (chain.readable_bytes, chain.writable_bytes) == (7, 605)
        writer = chain.writer()
        assert writer.write(bytes([turn]) * 7) == 7
        queue.push(chain, writer.written)
        assert side.take() == [(head, 7, [bytes([turn]) * 5, bytes([turn]) * 2 + b"\xaa" * 598])]


def test_normal_descriptors_may_lead_to_an_indirect_table():
    queue, side = ring()
    rows = struct.pack("<QIHH", BUFFERS + 64, 16, ids.DESC_WRITE | ids.DESC_NEXT, 3) + bytes(32)
    rows += struct.pack("<QIHH", BUFFERS + 128, 32, ids.DESC_WRITE, 0)
    side.memory.write(0x300000, rows)
    side.describe(0, BUFFERS, 8, ids.DESC_NEXT, 1)
    side.describe(1, 0x300000, 64, ids.DESC_INDIRECT | ids.DESC_WRITE, 0)   # 2.7.5.3.2: WRITE means nothing here
    side.offer(0)
    chain = queue.pop()
    assert chain is not None and (chain.readable_bytes, [len(v) for v in chain.writable]) == (8, [16, 32])


def test_requests_come_in_the_order_of_the_ring_and_go_back_in_any():
    queue, side = ring(8)
    heads = [side.add([bytes([n])], [1]) for n in range(4)]
    chains = list(iter(queue.pop, None))
    assert [chain.head for chain in chains] == heads
    for chain in reversed(chains):
        queue.push(chain, 1)
    assert [row[0] for row in side.take()] == heads[::-1]


def test_unpop_gives_the_same_chain_again():
    queue, side = ring()
    head = side.add([b"x"], [])
    queue.pop()
    queue.unpop()
    assert [chain.head for chain in iter(queue.pop, None)] == [head]


def test_empty_descriptors_are_no_views():
    queue, side = ring()
    side.add([b"", b"ab", b""], [0, 3])
    chain = queue.pop()
    assert chain is not None and [len(v) for v in (*chain.readable, *chain.writable)] == [2, 3]


def test_a_full_ring_of_the_largest_size():
    queue, side = ring(256)
    heads = [side.add([bytes([n])], []) for n in range(256)]
    assert queue.pending() == 256 and [chain.head for chain in iter(queue.pop, None)] == heads


# illegal chains ------------------------------------------------------------------------------------

WRITE, NEXT, INDIRECT = ids.DESC_WRITE, ids.DESC_NEXT, ids.DESC_INDIRECT
TABLE = 0x300000
ILLEGAL: dict[str, tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]], int]] = {
    # what: (rows of the descriptor table, of an indirect table at TABLE, head)
    "a head outside the table": ([], [], 8),
    "a head far outside the table": ([], [], 0xFFFF),
    "a next outside the table": ([(BUFFERS, 1, NEXT, 8)], [], 0),
    "a loop of one": ([(BUFFERS, 1, NEXT, 0)], [], 0),
    "a loop of two, empty ones": ([(BUFFERS, 0, NEXT, 1), (BUFFERS, 0, NEXT, 0)], [], 0),
    "an address beyond RAM": ([(MEMORY, 1, 0, 0)], [], 0),
    "an end beyond RAM": ([(MEMORY - 8, 9, WRITE, 0)], [], 0),
    "an end that wraps": ([((1 << 64) - 4, 8, WRITE, 0)], [], 0),
    "a length of 4 GiB": ([(0, 0xFFFFFFFF, WRITE, 0)], [], 0),
    "a readable one behind a writable one": ([(BUFFERS, 4, WRITE | NEXT, 1), (BUFFERS, 4, 0, 0)], [], 0),
    "an indirect one with NEXT": ([(TABLE, 16, INDIRECT | NEXT, 1), (BUFFERS, 4, 0, 0)], [(BUFFERS, 1, 0, 0)], 0),
    "an indirect one in a table": ([(TABLE, 16, INDIRECT, 0)], [(TABLE, 16, INDIRECT, 0)], 0),
    "an indirect table of nothing": ([(TABLE, 0, INDIRECT, 0)], [], 0),
    "an indirect table of a part of a row": ([(TABLE, 24, INDIRECT, 0)], [(BUFFERS, 1, 0, 0)], 0),
    "an indirect table longer than the queue": ([(TABLE, 16 * 9, INDIRECT, 0)], [(BUFFERS, 1, 0, 0)], 0),
    "an indirect table outside RAM": ([(MEMORY - 8, 16, INDIRECT, 0)], [], 0),
    "a loop in an indirect table": ([(TABLE, 32, INDIRECT, 0)], [(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)], 0),
    "a next outside an indirect table": ([(TABLE, 32, INDIRECT, 0)], [(BUFFERS, 1, NEXT, 2)], 0),
    "more descriptors than the queue has, by a table": ([(BUFFERS, 1, NEXT, 1), (TABLE, 16 * 8, INDIRECT, 0)], [
        *((BUFFERS, 1, NEXT, n + 1) for n in range(7)), (BUFFERS, 1, 0, 0)], 0),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_illegal_chains_are_refused(what: str) -> None:
    rows, table, head = ILLEGAL[what]
    queue, side = ring(8)
    for at, row in enumerate(rows):
        side.describe(at, *row)
    side.memory.write(TABLE, b"".join(struct.pack("<QIHH", *row) for row in table))
    before = side.memory.read(0, 16) + side.memory.read(BUFFERS, 64)
    side.offer(head)
    with pytest.raises(QueueError):
        queue.pop()
    assert side.memory.read(0, 16) + side.memory.read(BUFFERS, 64) == before


def test_a_chain_of_more_than_4_gib():
    queue, side = ring(8, memory=GuestMemory(LOW_RAM_END))
    for at in range(3):
        side.describe(at, 0, 0x80000000, NEXT if at < 2 else 0, at + 1)
    side.offer(0)
    with pytest.raises(QueueError, match=r"2\.7\.5\.2"):
        queue.pop()


def test_a_chain_as_long_as_the_queue_is_legal():
    queue, side = ring(8)
    side.add([b"r"] * 4, [1] * 4)
    chain = queue.pop()
    assert chain is not None and len(chain.readable) == len(chain.writable) == 4


def test_indirect_needs_its_feature():
    queue, side = ring(8, COMMON_FEATURES & ~ids.F_INDIRECT_DESC)
    side.add([b"x"], [], indirect=True)
    with pytest.raises(QueueError, match="INDIRECT_DESC"):
        queue.pop()


@pytest.fixture(scope="module")
def holed() -> GuestMemory:
    """RAM around the hole below 4 GiB; untouched pages cost nothing."""
    return GuestMemory(LOW_RAM_END + (64 << 20))


@pytest.mark.parametrize(("address", "length"), [
    (LOW_RAM_END - 8, 16), (LOW_RAM_END, 16), (HIGH_RAM_START - 8, 16), (0xD0000000, 4), (0xFEE00000, 4),
    (HIGH_RAM_START + (64 << 20) - 8, 16)])
def test_buffers_may_not_touch_the_hole(holed: GuestMemory, address: int, length: int) -> None:
    queue, side = ring(8, memory=holed)
    side.describe(0, address, length, WRITE, 0)
    side.offer(0)
    with pytest.raises(QueueError, match="not guest RAM"):
        queue.pop()


@pytest.mark.parametrize("address", [LOW_RAM_END - 16, HIGH_RAM_START, HIGH_RAM_START + (64 << 20) - 16])
def test_buffers_up_to_the_edges_of_the_hole(holed: GuestMemory, address: int) -> None:
    queue, side = ring(8, memory=holed)
    side.describe(0, address, 16, WRITE, 0)
    side.offer(0)
    chain = queue.pop()
    chain.writer().write(b"0123456789abcdef")       # type: ignore[union-attr]
    assert holed.read(address, 16) == b"0123456789abcdef"


def test_rings_above_the_hole(holed: GuestMemory) -> None:
    queue = Queue(holed, 0, 8)
    queue.desc, queue.avail, queue.used = HIGH_RAM_START, HIGH_RAM_START + 0x1000, HIGH_RAM_START + 0x2000
    queue.enable()
    holed.write(queue.desc, struct.pack("<QIHH", 0x1000, 4, 0, 0))
    holed.write(queue.avail, struct.pack("<HHH", 0, 1, 0))
    chain = queue.pop()
    assert chain is not None
    queue.push(chain)
    assert holed.read(queue.used, 12) == struct.pack("<HHII", 0, 1, 0, 0)


# the rings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 5, 255, 512, 0x10000, 0xFFFFFFFF])
def test_sizes_that_cannot_be(size: int) -> None:
    queue = Queue(GuestMemory(MEMORY), 0, 256)
    queue.size, queue.desc, queue.avail, queue.used = size, RINGS, RINGS + 0x8000, RINGS + 0xA000
    with pytest.raises(QueueError, match=f"a size of {size}"):
        queue.enable()
    assert not queue.ready


@pytest.mark.parametrize("size", [1, 2, 256])
def test_sizes_that_can_be(size: int) -> None:
    queue, side = ring(size)
    for _ in range(2 * size):
        side.add([b"x"], [])
        chain = queue.pop()
        assert chain is not None
        queue.push(chain)
        assert len(side.take()) == 1


@pytest.mark.parametrize(("name", "address"), [
    ("desc", RINGS + 8), ("avail", RINGS + 0x1001), ("used", RINGS + 0x2002),
    ("desc", MEMORY - 0x70), ("avail", MEMORY - 4), ("used", MEMORY - 8), ("desc", (1 << 64) - 16), ("used", 1 << 63)])
def test_rings_that_cannot_be_there(name: str, address: int) -> None:
    queue = Queue(GuestMemory(MEMORY), 0, 8)
    queue.size, queue.desc, queue.avail, queue.used = 8, RINGS, RINGS + 0x1000, RINGS + 0x2000
    setattr(queue, name, address)
    with pytest.raises(QueueError):
        queue.enable()
    assert not queue.ready


def test_rings_at_the_very_end_of_ram():
    queue = Queue(GuestMemory(MEMORY), 0, 8)
    queue.size, queue.desc, queue.avail, queue.used = 8, MEMORY - 256 - 128, MEMORY - 256, MEMORY - (6 + 64 + 2)
    queue.enable()
    queue.event_idx = True
    assert not queue.listen()


@pytest.mark.parametrize("jump", [9, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps(jump: int) -> None:
    queue, side = ring(8, start=0xFFFC)
    side.memory.put16(side.avail + 2, (0xFFFC + jump) & 0xFFFF)
    for look in (queue.pop, queue.pending, queue.listen):
        with pytest.raises(QueueError, match=f"jumped by {jump}"):
            look()


def test_a_queue_enabled_again_starts_anew():
    # The driver zeroes the rings before it enables a queue (4.2.3.2, step 4), so the device begins at 0 too.
    queue, side = ring(8)
    side.add([b"x"], [])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain)
    queue.disable()
    side.memory.fill(side.desc, 0x1000)
    side.avail_index = side.seen = 0
    queue.enable()
    assert queue.pop() is None and not queue.needs_interrupt()
    side.add([b"y"], [])
    chain = queue.pop()
    assert chain is not None and bytes(chain.readable[0]) == b"y"
    queue.push(chain)
    assert len(side.take()) == 1


# notifications -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 0xFFFD])
def test_interrupts_with_event_idx(start: int) -> None:
    queue, side = ring(8, start=start)
    for _ in range(6):
        side.add([b"x"], [])
    chains = list(iter(queue.pop, None))
    used_event(side, start + 2)             # interrupt when entry start + 2 has been used
    wanted = []
    for chain in chains:
        queue.push(chain)
        wanted.append(queue.needs_interrupt())
    assert wanted == [False, False, True, False, False, False]


def test_a_batch_that_passes_the_event_interrupts_once():
    queue, side = ring(8, start=0xFFFE)
    for _ in range(5):
        side.add([b"x"], [])
    used_event(side, 0)
    for chain in iter(queue.pop, None):
        queue.push(chain)
    assert queue.needs_interrupt() and not queue.needs_interrupt()


@pytest.mark.parametrize("event", [-1, 5, 100, 0x8000])
def test_no_interrupt_where_the_event_is_behind_or_far_ahead(event: int) -> None:
    queue, side = ring(8)
    for _ in range(5):
        side.add([b"x"], [])
    used_event(side, event)
    for chain in iter(queue.pop, None):
        queue.push(chain)
    assert not queue.needs_interrupt()


def test_interrupts_without_event_idx():
    queue, side = ring(8, COMMON_FEATURES & ~ids.F_EVENT_IDX)
    used_event(side, 100)                   # not looked at
    for flags, wanted in ((0, True), (ids.AVAIL_NO_INTERRUPT, False), (0, True)):
        side.memory.put16(side.avail, flags)
        side.add([b"x"], [])
        chain = queue.pop()
        assert chain is not None
        queue.push(chain)
        assert queue.needs_interrupt() == wanted
        assert not queue.needs_interrupt()


def test_notifications_with_event_idx():
    queue, side = ring(8, start=0xFFFE)
    assert not queue.listen() and avail_event(side) == 0xFFFE       # notify of the very next
    side.add([b"x"], [])
    assert queue.listen()                                           # it came before we asked: look again
    queue.quiet()
    for _ in range(3):
        side.add([b"x"], [])
    assert avail_event(side) == 0xFFFE                              # asked for nothing new meanwhile
    assert len(list(iter(queue.pop, None))) == 4
    assert not queue.listen() and avail_event(side) == 2
    assert side.memory.u16(side.used) == 0


def test_notifications_without_event_idx():
    queue, side = ring(8, COMMON_FEATURES & ~ids.F_EVENT_IDX)
    queue.quiet()
    assert side.memory.u16(side.used) == ids.USED_NO_NOTIFY
    assert not queue.listen() and side.memory.u16(side.used) == 0
    side.add([b"x"], [])
    assert queue.listen()


# state ---------------------------------------------------------------------------------------------


def test_state_goes_over_into_another_queue():
    queue, side = ring(8, start=0xFFFF)
    side.add([b"a"], [4])
    side.add([b"b"], [4])
    chain = queue.pop()
    assert chain is not None
    other = Queue(side.memory, 0, 256)
    other.event_idx = other.indirect = True
    other.load(queue.state())
    assert other.state() == queue.state()
    second = other.pop()
    assert second is not None and bytes(second.readable[0]) == b"b"
    other.push(chain, 1)
    other.push(second, 2)
    assert [row[:2] for row in side.take()] == [(chain.head, 1), (second.head, 2)]


@given(st.fixed_dictionaries({
    "size": st.integers(-5, 1 << 33), "ready": st.integers(-1, 2),
    "desc": st.integers(-(1 << 70), 1 << 70), "avail": st.integers(0, MEMORY), "used": st.integers(0, MEMORY),
    "next": st.integers(-1, 1 << 20), "used_index": st.integers(-1, 1 << 20), "signalled": st.integers(-1, 1 << 20)}))
@settings(max_examples=100, deadline=None)
def test_hostile_states(state: dict[str, object]) -> None:
    queue = Queue(HOSTILE, 0, 256)
    try:
        queue.load(state)
    except QueueError:
        assert not queue.ready
        return
    if queue.ready:
        try:
            while (chain := queue.pop()) is not None:
                queue.push(chain)
        except QueueError:
            pass


HOSTILE = GuestMemory(MEMORY)
