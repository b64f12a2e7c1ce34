"""The network device by the mock driver: its queues, its limits, its link; a cable or a tap at its other end."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from framework.driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import ids
from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net import PATIENCE, Net
from hv.devices.virtio.net_pair import NetCable
from hv.devices.virtio.rate import TokenBucket

HEADER = bytes(net.HEADER_SIZE)
FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(range(200))   # an experimental ether type
COMMON = ids.F_VERSION_1 | ids.F_EVENT_IDX | ids.F_INDIRECT_DESC


class Wired:
    """A device on a cable whose other end is `peer`, a socket."""

    def __init__(self, features: int | None = None, *, size: int = 64, **options: object) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        self.peer = theirs
        self.device = Net(NetCable(ours.detach()), **options)       # type: ignore[arg-type]
        self.driver = Driver(self.device)
        self.driver.probe(features, {0: size, 1: size})

    def send(self, frame: bytes, header: bytes = HEADER) -> None:
        self.peer.send(header + frame)

    def give(self, count: int, size: int = 2048, **options: bool) -> None:
        for _ in range(count):
            self.driver.rings[net.RX].add([], [size], **options)
        self.driver.notify(net.RX)

    def arrived(self) -> list[bytes]:
        """The frames that the driver gets, put together as a driver does."""
        while self.driver.loop.poll():
            pass
        frames = []
        rows = self.driver.rings[net.RX].take()
        while rows:
            count = struct.unpack_from("<H", rows[0][2][0], net.NUM_BUFFERS)[0]
            assert 1 <= count <= len(rows)
            data = b"".join(b"".join(parts)[:written] for _, written, parts in rows[:count])
            frames.append(data[net.HEADER_SIZE:])
            del rows[:count]
        return frames

    def close(self) -> None:
        self.peer.close()
        self.device.close()


@pytest.fixture
def wired():
    made = []

    def make(*arguments, **options):
        made.append(Wired(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_frames_go_both_ways(wired):
    wire = wired()
    for indirect in (False, True):
        wire.driver.request(net.TX, [HEADER, FRAME[:20], FRAME[20:]], [], indirect=indirect)
        assert wire.peer.recv(4096) == HEADER + FRAME
    wire.give(4)
    wire.send(FRAME)
    wire.send(FRAME[:60])
    assert wire.arrived() == [FRAME, FRAME[:60]]
    assert (wire.device.sent, wire.device.received, wire.device.dropped) == (2, 2, 0)
    assert wire.driver.interrupts.used[net.RX] == 1, "two frames, one interrupt"


def test_the_configuration_space(wired):
    wire = wired(mac=bytes.fromhex("020000000009"), mtu=9000)
    assert wire.device.config() == bytes.fromhex("020000000009 0100 0100 2823")
    assert wire.device.offered & net.F_MTU and not wired().device.offered & net.F_MTU


@pytest.mark.parametrize("feature, needed", [(net.F_GUEST_TSO4, net.F_GUEST_CSUM), (net.F_HOST_TSO6, net.F_CSUM),
                                             (net.F_HOST_ECN, net.F_CSUM | net.F_HOST_TSO4)])
def test_features_that_need_others(wired, feature, needed):
    device = wired().device
    for features, status in ((COMMON | feature, 0), (COMMON | feature | needed, ids.FEATURES_OK)):
        device.set_status(0)
        device.set_status(ids.ACKNOWLEDGE | ids.DRIVER)
        device.select_features(True, features & 0xFFFFFFFF)
        device.select_features(False, features >> 32)
        device.set_status(ids.ACKNOWLEDGE | ids.DRIVER | ids.FEATURES_OK)
        assert device.status & ids.FEATURES_OK == status


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(14, 65550), min_size=1, max_size=6),
       st.lists(st.integers(13, 9000), min_size=1, max_size=5))
def test_frames_of_any_size_in_buffers_of_any_size(sizes, rooms):
    wire = Wired()
    try:
        ring, at = wire.driver.rings[net.RX], 0
        for size in sizes:
            frame = FRAME[:14] + os.urandom(size - 14)
            wire.send(frame)
            before, got = wire.device.dropped, []
            for _ in range(10):
                while (ring.avail_index - ring.seen) & 0xFFFF < ring.size:
                    ring.add([], [rooms[at % len(rooms)]])
                    at += 1
                wire.driver.notify(net.RX)
                got = wire.arrived()
                if got or wire.device.dropped > before:
                    break
            if wire.device.dropped > before:    # all buffers of the ring together have no room for it
                assert not got and size + net.HEADER_SIZE > min(rooms) * ring.size
            else:
                assert got == [frame]
    finally:
        wire.close()


def test_a_frame_waits_for_buffers_and_nothing_spins(wired):
    wire = wired()
    frame = FRAME * 30
    wire.send(frame)
    wire.send(FRAME)
    wire.give(1, 1024)      # the first one needs more
    assert wire.arrived() == [] and wire.device.backend.fd not in wire.driver.loop.handlers
    ring = wire.driver.rings[net.RX]
    assert wire.driver.memory.u16(ring.used + 4 + 8 * ring.size) == ring.avail_index, "asks to hear of the next buffer"
    wire.give(30, 1024)
    assert wire.arrived() == [frame, FRAME]
    assert wire.device.backend.fd in wire.driver.loop.handlers
    assert wire.device.dropped == 0


def test_without_mergeable_buffers_a_frame_must_fit_one(wired):
    wire = wired(COMMON | net.F_MAC)
    wire.give(2, 1526)
    wire.send(FRAME * 10)
    wire.send(FRAME)
    assert wire.arrived() == [FRAME]
    assert wire.device.dropped == 1


@pytest.mark.parametrize("size", [0, 5, 12, 25, net.LONGEST + 1, 3 << 20])
def test_frames_too_short_and_too_long_are_counted(wired, size):
    wire = wired()
    wire.driver.request(net.TX, [bytes(size)] if size else [], [] if size else [8])
    assert wire.device.dropped == wire.device.faults == 1
    wire.driver.request(net.TX, [HEADER + FRAME], [])
    assert wire.peer.recv(4096) == HEADER + FRAME


def test_receive_buffers_without_room(wired):
    wire = wired(size=8)
    for _ in range(8):
        wire.driver.rings[net.RX].add([b"x" * 16], [])      # readable only
    wire.driver.notify(net.RX)
    for _ in range(5):
        wire.send(FRAME)
    assert wire.arrived() == [] and wire.device.dropped == 5


def test_more_small_buffers_than_the_host_takes_at_once(wired):
    wire = wired()
    for count in (60, 42):      # the second frame would be laid out over as many as the first one took: 42 of 30 parts
        wire.send(FRAME * 290)
        for _ in range(count):
            wire.driver.rings[net.RX].add([], [50] * 30, indirect=True)
        wire.driver.notify(net.RX)
        assert wire.arrived() == [FRAME * 290]
    assert wire.device.config()[6] == 1


def test_a_broken_ring_while_frames_wait(wired):
    wire = wired()
    wire.send(FRAME)
    ring = wire.driver.rings[net.RX]
    ring.describe(0, 1 << 40, 100, ids.DESC_WRITE, 0)
    ring.offer(0)
    wire.driver.notify(net.RX)
    wire.driver.loop.poll()
    assert wire.device.status & ids.NEEDS_RESET
    wire.driver.loop.poll()
    assert wire.device.backend.fd not in wire.driver.loop.handlers, "nobody would read it: no watching"
    wire.driver.probe()
    wire.give(2)
    assert wire.arrived() == [FRAME]


def test_a_full_peer_holds_frames_back_then_loses_them(wired):
    wire = wired()
    ring = wire.driver.rings[net.TX]
    while not wire.device._full:
        ring.add([HEADER + bytes(60000)], [])
        wire.driver.notify(net.TX)
        ring.take()
    sent = wire.device.sent
    assert wire.device.dropped == 0 and wire.driver.loop.handlers[wire.device.backend.fd][0] & 4
    for _ in range(sent):
        wire.peer.recv(1 << 17)             # there is room again
    wire.driver.loop.poll()
    assert wire.device.sent == sent + 1 and not wire.device._full and len(ring.take()) == 1
    while not wire.device._full:
        ring.add([HEADER + bytes(60000)], [])
        wire.driver.notify(net.TX)
        ring.take()
    delay, give_up = wire.driver.loop.timers[-1]
    assert delay == PATIENCE
    give_up()
    wire.driver.loop.run()
    assert wire.device.dropped == 1 and len(ring.take()) == 1, "the driver gets its buffer back"


def test_the_link(wired):
    wire = wired()
    wire.give(4)
    wire.device.set_link(False)
    wire.driver.loop.run()
    assert wire.device.config()[6] == 0 and wire.driver.interrupts.config == 1
    wire.driver.request(net.TX, [HEADER + FRAME], [])
    wire.send(FRAME)
    assert wire.arrived() == [] and wire.device.dropped == 2
    wire.device.set_link(True)
    wire.device.set_link(True)
    wire.send(FRAME)
    assert wire.arrived() == [FRAME] and wire.driver.interrupts.config == 2 and wire.device.config()[6] == 1
    with pytest.raises(BlockingIOError):
        wire.peer.recv(100)


def test_the_peer_leaves(wired):
    wire = wired()
    wire.give(4)
    wire.peer.close()
    wire.driver.loop.poll()
    assert wire.device.config()[6] == 0 and wire.driver.interrupts.config == 1
    wire.driver.request(net.TX, [HEADER + FRAME], [])
    assert wire.device.dropped == 1 and wire.driver.loop.poll() == 0


@pytest.mark.parametrize("direction", ["sent", "received"])
def test_a_rate_limit(wired, direction):
    now = [1000.0]
    wire = wired(rate=1)
    wire.device._limits = tuple(TokenBucket(len(FRAME) * 10, lambda: now[0]) for _ in range(2))     # holds one frame
    ring = wire.driver.rings[net.TX]
    if direction == "sent":
        for _ in range(20):
            ring.add([HEADER + FRAME], [])
        wire.driver.notify(net.TX)
    else:
        wire.give(30)
        for _ in range(20):
            wire.send(FRAME)
        wire.arrived()
    began = now[0]
    while getattr(wire.device, direction) < 20:
        assert len(wire.driver.loop.timers) == 1 and wire.driver.loop.poll() == 0, "a timer, no spinning"
        delay, function = wire.driver.loop.timers.pop()
        now[0] += delay
        function()
        wire.arrived()
    assert 1.7 <= now[0] - began <= 2.1 and wire.device.dropped == 0


def test_a_device_that_needs_a_reset_watches_nothing(wired):
    wire = wired()
    wire.give(4)
    assert wire.device.backend.fd in wire.driver.loop.handlers
    ring = wire.driver.rings[net.TX]
    ring.describe(0, 1 << 40, 100, 0, 0)
    ring.offer(0)
    wire.driver.notify(net.TX)
    assert wire.device.status & ids.NEEDS_RESET
    wire.send(FRAME)
    wire.driver.loop.poll()
    assert wire.driver.loop.poll() == 0 and wire.device.received == 0


def test_reset_pause_and_state_with_buffers_held(wired):
    wire = wired()
    wire.send(FRAME * 30)
    wire.give(2)
    assert wire.device._held and wire.device._late
    wire.device.stop()
    assert not wire.device._held and wire.device.backend.fd not in wire.driver.loop.handlers
    state = wire.device.state()
    assert state["queues"][net.RX]["next"] == 0, "buffers taken are the driver's again"
    wire.device.resume()
    wire.driver.loop.run()
    wire.give(30)
    assert wire.arrived() == [FRAME * 30]
    wire.device.stop()
    mac = wire.device.mac
    wire.device.load(wire.device.state())
    wire.device.resume()
    wire.driver.loop.run()
    assert wire.device.mac == mac
    wire.send(FRAME)
    assert wire.arrived() == [FRAME]
    for bad in ("", "00", "zz" * 6):
        with pytest.raises(ValueError):
            wire.device.load({**state, "model": {**state["model"], "mac": bad}})
    wire.device.resume()
    wire.driver.probe()
    wire.give(2)
    wire.send(FRAME)
    assert wire.arrived() == [FRAME]


def test_a_queue_is_reset(wired):
    wire = wired()
    wire.send(FRAME * 30)
    wire.give(2)
    queue, ring = wire.device.queues[net.RX], wire.driver.rings[net.RX]
    places = queue.desc, queue.avail, queue.used
    wire.device.reset_queue(net.RX)
    assert not wire.device._held
    wire.driver.memory.fill(ring.desc, 0x10000)
    ring.avail_index = ring.seen = ring.free = 0
    queue.size, (queue.desc, queue.avail, queue.used) = ring.size, places
    wire.device.enable_queue(net.RX, True)
    wire.give(30)
    assert wire.arrived() == [FRAME * 30]


def test_the_bucket():
    now = [0.0]
    bucket = TokenBucket(1000, lambda: now[0])
    assert bucket.delay() == 0
    bucket.spend(600)
    assert bucket.delay() == pytest.approx(0.5)
    now[0] = 0.5
    assert bucket.delay() == 0
    now[0] = 100
    bucket.delay()
    bucket.spend(101)
    assert bucket.delay() > 0, "at most a tenth of a second is saved up"
