"""The virtio-pci transport, as a driver sees it: found through configuration space, driven through its BAR."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from framework.driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.bus import MmioBus
from hv.devices.pci.host import DATA, HostBridge
from hv.devices.pci.msix import ENABLE, ENTRY
from hv.devices.virtio import ids, pci
from hv.devices.virtio.device import COMMON_FEATURES, VirtioDevice
from hv.devices.virtio.pci import BAR_SIZE, NO_VECTOR, VirtioPci
from hv.devices.virtio.rng import Rng

START = 0xD8000000
READY = ids.ACKNOWLEDGE | ids.DRIVER | ids.FEATURES_OK
STRUCTURES = {1: "common", 2: "notify", 3: "isr", 4: "device", 5: "window"}


class Configured(VirtioDevice):
    """Two queues and eight bytes of configuration that can be written."""

    ID, NAME, KIND, QUEUES = 7, "configured", "configured", (16, 256)

    def __init__(self) -> None:
        super().__init__()
        self.bytes = bytearray(b"abcdefgh")

    def config(self) -> bytes:
        return bytes(self.bytes)

    def write_config(self, offset: int, data: bytes) -> None:
        self.bytes[offset:offset + len(data)] = data


class EventLine:
    """A vector with a real event descriptor, connected to nothing."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.sent: tuple[int, int] | None = None

    def connect(self, address: int, data: int) -> bool:
        self.sent = (address, data)
        return True

    def disconnect(self) -> None:
        self.sent = None

    def count(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def pending(self) -> bool:
        count = self.count()
        if count:
            os.eventfd_write(self.fd, count)
        return bool(count)


class Card:
    """A device in slot 1 of a bus, and what a driver does to find and use it."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device, self.mmio = device, MmioBus()
        self.driver = Driver(device)
        self.lines = [EventLine() for _ in range(len(device.queues) + 1)]
        self.kicks = [EventLine() for _ in device.queues]
        device.kick_fds = [kick.fd for kick in self.kicks]
        self.levels: list[bool] = []
        self.places: list[int | None] = []
        self.transport = VirtioPci(device, self.lines, self.levels.append, self.places.append)
        device.interrupts = self.transport
        self.transport.announce()
        self.bridge = HostBridge(self.mmio, START, START + (1 << 20))
        self.bridge.plug(self.transport, BAR_SIZE)
        self.put(4, 2, 6)
        self.at: dict[str, int] = {}
        self.length: dict[str, int] = {}
        self.capabilities()

    def get(self, register: int, size: int = 4) -> int:
        self.bridge.write(0, 4, 0x80000800 | register & 0xFC)
        return self.bridge.read(DATA + (register & 3), size)

    def put(self, register: int, size: int, value: int) -> None:
        self.bridge.write(0, 4, 0x80000800 | register & 0xFC)
        self.bridge.write(DATA + (register & 3), size, value)

    def capabilities(self) -> None:
        """4.1.4: walk the list."""
        at = self.get(0x34, 1)
        while at:
            if self.get(at, 1) == 9:
                name = STRUCTURES[self.get(at + 3, 1)]
                assert self.get(at + 2, 1) == (20 if name in ("notify", "window") else 16)
                self.at[name] = at if name == "window" else START + self.get(at + 8)
                self.length[name] = self.get(at + 12)
                if name == "notify":
                    self.step = self.get(at + 16)
            else:
                assert self.get(at, 1) == 0x11
                self.msix = at
                self.at["table"], self.at["pending"] = START + self.get(at + 4), START + self.get(at + 8)
            at = self.get(at + 1, 1)

    def read(self, offset: int, size: int, where: str = "common") -> int:
        return self.mmio.read(self.at[where] + offset, size)

    def write(self, offset: int, size: int, value: int, where: str = "common") -> None:
        self.mmio.write(self.at[where] + offset, size, value)

    def negotiate(self) -> None:
        for status in (0, ids.ACKNOWLEDGE, ids.ACKNOWLEDGE | ids.DRIVER):
            self.write(pci.DEVICE_STATUS, 1, status)
        for half in (0, 1):
            self.write(pci.DEVICE_FEATURE_SELECT, 4, half)
            self.write(pci.DRIVER_FEATURE_SELECT, 4, half)
            self.write(pci.DRIVER_FEATURE, 4, self.read(pci.DEVICE_FEATURE, 4))
        self.write(pci.DEVICE_STATUS, 1, READY)
        assert self.read(pci.DEVICE_STATUS, 1) == READY

    def set_up(self, index: int, size: int = 16, vector: int | None = None) -> None:
        self.write(pci.QUEUE_SELECT, 2, index)
        base = 0x100000 + 0x10000 * index
        self.write(pci.QUEUE_SIZE, 2, size)
        for number, field in enumerate((pci.QUEUE_DESC, pci.QUEUE_DRIVER, pci.QUEUE_DEVICE)):
            place = base + 0x4000 * number
            self.write(field, 4, place)
            self.write(field + 4, 4, 0)
        if vector is not None:
            self.write(pci.QUEUE_MSIX_VECTOR, 2, vector)
            assert self.read(pci.QUEUE_MSIX_VECTOR, 2) == vector
        self.write(pci.QUEUE_ENABLE, 2, 1)

    def close(self) -> None:
        for line in (*self.lines, *self.kicks):
            os.close(line.fd)


@pytest.fixture
def card():
    made = Card(Configured())
    yield made
    made.close()


@pytest.fixture
def rng():
    made = Card(Rng())
    yield made
    made.close()


def test_a_driver_finds_every_structure(card, rng):
    assert card.get(0) == 0x1AF4 | 0x1047 << 16 and card.get(0x08) & 0xFF >= 1 and card.get(0x2C) >> 16 >= 0x40
    assert set(card.at) == {"common", "notify", "isr", "device", "window", "table", "pending"}
    assert "device" not in rng.at                   # 4.1.4.6: only where there is a configuration
    assert card.get(card.msix + 2, 2) == 2          # three vectors
    assert card.length["common"] >= 0x3C and card.length["notify"] == 2 * card.step
    ranges = sorted((card.at[name], card.length.get(name, 48 if name == "table" else 8))
                    for name in card.at if name != "window")
    for (low, size), (high, _) in pairwise(ranges):
        assert low + size <= high
    assert ranges[-1][0] + ranges[-1][1] <= START + BAR_SIZE


def test_common_configuration_before_anything_was_written(card):
    assert card.read(pci.NUM_QUEUES, 2) == 2 and card.read(pci.DEVICE_STATUS, 1) == 0
    assert card.read(pci.CONFIG_MSIX_VECTOR, 2) == NO_VECTOR
    for index, size in enumerate((16, 256)):
        card.write(pci.QUEUE_SELECT, 2, index)
        fields = (pci.QUEUE_SIZE, pci.QUEUE_MSIX_VECTOR, pci.QUEUE_ENABLE, pci.QUEUE_NOTIFY_OFF, pci.QUEUE_RESET)
        assert [card.read(field, 2) for field in fields] == [size, NO_VECTOR, 0, index, 0]
    card.write(pci.QUEUE_SELECT, 2, 2)
    assert [card.read(field, 2) for field in range(0x18, 0x20, 2)] == [0] * 4      # no such queue
    offered = 0
    for half in (0, 1, 2, 0xFFFFFFFF):
        card.write(pci.DEVICE_FEATURE_SELECT, 4, half)
        offered |= card.read(pci.DEVICE_FEATURE, 4) << 32 * (half & 7)
    assert offered == COMMON_FEATURES and card.device.faults == 0


def test_a_queue_is_set_up_and_used_with_msix(rng):
    card = rng
    card.put(card.msix + 2, 2, ENABLE)
    for vector in (0, 1):
        for field, value in enumerate((0xFEE00000, 0, 0x40 + vector, 0)):
            card.write(ENTRY * vector + 4 * field, 4, value, "table")
    assert [line.sent for line in card.lines] == [(0xFEE00000, 0x40), (0xFEE00000, 0x41)]
    card.negotiate()
    card.write(pci.CONFIG_MSIX_VECTOR, 2, 0)
    card.set_up(0, vector=1)
    card.write(pci.DEVICE_STATUS, 1, READY | ids.DRIVER_OK)
    queue = card.device.queues[0]
    assert queue.ready and (queue.size, queue.desc, queue.avail, queue.used) == (16, 0x100000, 0x104000, 0x108000)
    memory = card.driver.memory
    memory.write(0x100000, (0x400000).to_bytes(8, "little") + b"\x20\0\0\0\2\0\0\0")
    memory.put16(0x104002, 1)
    card.write(0, 2, 0, "notify")
    assert card.kicks[0].count() == 1
    card.device.serve(0)
    assert memory.u16(0x108002) == 1 and memory.read(0x400000, 32) != bytes(32)
    assert (card.lines[1].count(), card.lines[0].count(), card.levels) == (1, 0, [])
    assert card.transport.queue_fd(0) == card.lines[1].fd
    assert card.read(0, 1, "isr") == 0
    card.device.config_changed()
    assert card.lines[0].count() == 1


def test_without_msix_the_pin_is_held_until_isr_is_read(card):
    card.negotiate()
    card.set_up(0)
    card.write(pci.DEVICE_STATUS, 1, READY | ids.DRIVER_OK)
    card.transport.queue_used(0)
    card.transport.queue_used(1)
    assert card.levels == [True] and card.get(6, 2) & 8 and card.transport.queue_fd(0) is None
    card.device.config_changed()
    assert card.read(0, 1, "isr") == 3 and card.levels == [True, False] and not card.get(6, 2) & 8
    assert card.read(0, 1, "isr") == 0
    card.put(4, 2, 0x406)                           # interrupt disable
    card.transport.queue_used(0)
    assert card.levels == [True, False] and card.get(6, 2) & 8
    card.put(4, 2, 6)
    assert card.levels == [True, False, True]
    card.write(pci.DEVICE_STATUS, 1, 0)             # a reset lets go of it
    assert card.levels[-1] is False and card.read(0, 1, "isr") == 0


def test_vectors_that_are_not_there_read_back_as_none(card):
    card.write(pci.CONFIG_MSIX_VECTOR, 2, 3)
    assert card.read(pci.CONFIG_MSIX_VECTOR, 2) == NO_VECTOR
    card.write(pci.CONFIG_MSIX_VECTOR, 2, 2)
    assert card.read(pci.CONFIG_MSIX_VECTOR, 2) == 2
    card.put(card.msix + 2, 2, ENABLE)
    card.transport.queue_used(0)                    # no vector: no interrupt at all
    assert card.levels == [] and not any(line.count() for line in card.lines)
    assert card.transport.queue_fd(0) is None
    card.write(pci.DEVICE_STATUS, 1, 0)
    assert card.read(pci.CONFIG_MSIX_VECTOR, 2) == NO_VECTOR


def test_a_masked_vector_stays_pending(card):
    card.put(card.msix + 2, 2, ENABLE)
    card.write(pci.QUEUE_MSIX_VECTOR, 2, 2)
    card.transport.queue_used(0)
    assert card.read(0, 8, "pending") == 0b100
    assert card.transport.queue_fd(0) == card.lines[2].fd


def test_a_queue_in_use_can_only_be_reset(card):
    card.negotiate()
    card.set_up(1, size=64)
    faults = card.device.faults
    card.write(pci.QUEUE_DESC, 4, 0)
    card.write(pci.QUEUE_SIZE, 2, 8)
    card.write(pci.QUEUE_ENABLE, 2, 0)
    card.write(pci.QUEUE_NOTIFY_OFF, 2, 5)
    assert card.device.faults == faults + 4
    assert card.read(pci.QUEUE_ENABLE, 2) == 1 and card.read(pci.QUEUE_DESC, 4) == 0x110000
    card.write(pci.QUEUE_RESET, 2, 1)
    assert card.read(pci.QUEUE_ENABLE, 2) == 0 and card.read(pci.QUEUE_RESET, 2) == 0
    assert card.read(pci.QUEUE_SIZE, 2) == 256
    card.set_up(1, size=32)
    assert card.read(pci.QUEUE_ENABLE, 2) == 1 and card.read(pci.QUEUE_SIZE, 2) == 32


def test_64_bit_accesses_to_addresses(card):
    card.write(pci.QUEUE_DEVICE, 8, 0x1_2345_6780)
    assert card.read(pci.QUEUE_DEVICE, 8) == 0x1_2345_6780 and card.read(pci.QUEUE_DEVICE + 4, 4) == 1


@pytest.mark.parametrize(("offset", "size"), [(0x14, 4), (0x16, 4), (0x18, 1), (0x01, 1), (0x21, 4), (0x24, 8),
                                              (0x20, 2), (0x00, 8), (0x38, 2), (0x3C, 4), (0x40, 4), (0xFFF, 1)])
def test_other_widths_and_places_do_nothing_and_are_counted(card, offset, size):
    before = [card.read(at, 2) for at in range(0x16, 0x20, 2)]
    faults = card.device.faults
    assert card.read(offset, size) == 0
    card.write(offset, size, (1 << 8 * size) - 1)
    assert card.device.faults == faults + 2
    assert [card.read(at, 2) for at in range(0x16, 0x20, 2)] == before


def test_device_configuration_in_any_width(card):
    assert card.read(0, 4, "device") == int.from_bytes(b"abcd", "little") and card.read(3, 1, "device") == ord("d")
    card.write(2, 2, 0x5958, "device")
    assert bytes(card.device.bytes) == b"abXYefgh"
    assert card.read(0x100, 4, "device") == 0
    card.write(6, 4, 0, "device")
    assert card.device.faults == 1 and bytes(card.device.bytes) == b"abXYefgh"


def test_the_bar_is_reached_through_configuration_space(card):
    window = card.at["window"]

    def access(offset: int, length: int, bar: int = 0) -> None:
        card.put(window + 4, 1, bar)
        card.put(window + 8, 4, offset)
        card.put(window + 12, 4, length)

    access(pci.CONFIG, 4)
    assert card.get(window + 16) == int.from_bytes(b"abcd", "little")
    access(pci.CONFIG + 6, 2)
    card.put(window + 16, 2, 0x5A59)
    assert bytes(card.device.bytes) == b"abcdefYZ" and card.get(window + 16, 2) == 0x5A59
    access(pci.DEVICE_STATUS, 1)
    card.put(window + 16, 1, ids.ACKNOWLEDGE)
    assert card.device.status == ids.ACKNOWLEDGE and card.get(window + 16, 1) == ids.ACKNOWLEDGE
    access(pci.NOTIFY + pci.NOTIFY_STEP, 2)
    card.put(window + 16, 2, 1)
    assert card.kicks[1].count() == 1 and not card.device.faults
    for offset, length, bar in ((0, 3, 0), (0, 0, 0), (2, 4, 0), (BAR_SIZE, 4, 0), (0xFFFFFFFC, 4, 0), (0, 4, 1),
                                (0, 4, 255)):
        faults = card.device.faults
        access(offset, length, bar)
        card.put(window + 16, 4, 0xFFFFFFFF)
        assert card.get(window + 16) == 0xFFFFFFFF and card.device.faults > faults


def test_notifications_beyond_the_queues_are_counted(card):
    card.write(2 * pci.NOTIFY_STEP, 2, 2, "notify")
    card.write(0xFFC, 4, 2, "notify")
    assert card.device.faults == 2 and not any(kick.count() for kick in card.kicks)


def test_state_goes_over():
    card, other = Card(Rng()), Card(Rng())
    try:
        card.put(card.msix + 2, 2, ENABLE)
        for field, value in enumerate((0xFEE00000, 0, 0x41, 0)):
            card.write(ENTRY + 4 * field, 4, value, "table")
        card.write(pci.QUEUE_MSIX_VECTOR, 2, 0)
        card.write(pci.CONFIG_MSIX_VECTOR, 2, 1)
        card.transport.queue_used(0)
        other.transport.load(card.transport.state())
        other.bridge.load(card.bridge.state())
        assert other.lines[1].sent == (0xFEE00000, 0x41) and other.lines[0].pending() and not other.lines[1].pending()
        assert other.read(pci.QUEUE_MSIX_VECTOR, 2) == 0 and other.read(pci.CONFIG_MSIX_VECTOR, 2) == 1
        with pytest.raises(ValueError, match="vectors of 9 queues"):
            other.transport.load({**card.transport.state(), "vectors": [0] * 9})
        other.transport.load({**card.transport.state(), "vectors": [77], "config_vector": -1,
                              "selects": [1, 2, 1 << 40]})
        assert other.read(pci.QUEUE_MSIX_VECTOR, 2) == NO_VECTOR and other.read(pci.CONFIG_MSIX_VECTOR, 2) == NO_VECTOR
    finally:
        card.close()
        other.close()


PLACES = st.one_of(st.integers(0, BAR_SIZE - 1), st.integers(0, 0x3F), st.sampled_from(range(0x4000, 0x4040, 4)),
                   st.just(pci.DEVICE_STATUS))
VALUES = st.one_of(st.integers(0, 16), st.integers(0, (1 << 64) - 1), st.sampled_from((READY, READY | 4, 0x100000)))
STEPS = st.lists(st.tuples(st.sampled_from("rwcC"), PLACES, st.sampled_from((1, 2, 4, 8)), VALUES), max_size=60)


@settings(deadline=None)
@given(STEPS)
def test_no_sequence_of_accesses_breaks_the_device(steps):
    card = Card(Rng())
    try:
        for kind, offset, size, value in steps:
            if kind == "r":
                assert 0 <= card.mmio.read(START + offset, size) < 1 << 8 * size
            elif kind == "w":
                card.mmio.write(START + offset, size, value & (1 << 8 * size) - 1)
            elif kind == "c":
                card.get(offset & 0xFF, min(size, 4))
            else:
                card.put(offset & 0xFF, min(size, 4), value & (1 << 8 * min(size, 4)) - 1)
            card.device.serve(0)
        assert card.device.status in range(256) and len(card.device.fault_texts) <= 8
    finally:
        card.close()
