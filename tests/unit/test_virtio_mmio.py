"""The virtio-mmio registers: a driver's way through them, and writes that must change nothing."""

from __future__ import annotations

import struct

import pytest
from framework.driver import RINGS, FakeLoop
from framework.echo import ACK, DRV, EXTRA, FEAT, READY, Echo
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import ids, mmio
from hv.devices.virtio.device import COMMON_FEATURES
from hv.devices.virtio.mmio import VirtioMmio
from hv.memory.guest import GuestMemory

RAM = GuestMemory(16 << 20)


class Guest:
    """A driver that has only the registers."""

    def __init__(self) -> None:
        self.device, self.loop, self.interrupts = Echo(), FakeLoop(), 0
        self.registers = VirtioMmio(self.device, self.interrupt)
        self.device.attach(RAM, self.loop, self.registers)

    def interrupt(self) -> None:
        self.interrupts += 1

    def get(self, offset: int, size: int = 4) -> int:
        return self.registers.read(offset, size)

    def set(self, offset: int, value: int, size: int = 4) -> None:
        self.registers.write(offset, size, value)

    def negotiate(self, features: int = COMMON_FEATURES) -> Guest:
        self.set(mmio.STATUS, 0)
        self.set(mmio.STATUS, ACK)
        self.set(mmio.STATUS, ACK | DRV)
        for half in (0, 1):
            self.set(mmio.DRIVER_FEATURES_SEL, half)
            self.set(mmio.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
        self.set(mmio.STATUS, ACK | DRV | FEAT)
        return self

    def queue(self, index: int, size: int = 8) -> int:
        """Set up a queue's rings; where they are."""
        self.set(mmio.QUEUE_SEL, index)
        base = RINGS + 0x10000 * index
        RAM.fill(base, 0x3000)
        self.set(mmio.QUEUE_NUM, size)
        for low, at in ((mmio.QUEUE_DESC_LOW, 0), (mmio.QUEUE_DRIVER_LOW, 0x1000), (mmio.QUEUE_DEVICE_LOW, 0x2000)):
            self.set(low, base + at)
            self.set(low + 4, 0)
        self.set(mmio.QUEUE_READY, 1)
        return base

    def started(self) -> Guest:
        self.negotiate()
        for index in (0, 1):
            self.queue(index)
            assert self.get(mmio.QUEUE_READY) == 1
        self.set(mmio.STATUS, READY)
        self.loop.run()
        return self

    def offer(self, index: int, gpa: int, length: int, flags: int) -> None:
        """One descriptor, as the first request of a queue; served."""
        base = RINGS + 0x10000 * index
        RAM.write(base, struct.pack("<QIHH", gpa, length, flags, 0))
        RAM.write(base + 0x1000, struct.pack("<HHH", 0, 1, 0))
        self.device.serve(index)
        self.loop.run()


def test_what_a_driver_sees_first():
    guest = Guest()
    assert guest.get(mmio.MAGIC_VALUE).to_bytes(4, "little") == b"virt"
    assert guest.get(mmio.VERSION) == 2 and guest.get(mmio.DEVICE_ID) == 63
    assert guest.get(mmio.VENDOR_ID).to_bytes(4, "little") == b"PYHV"
    assert guest.get(mmio.STATUS) == guest.get(mmio.INTERRUPT_STATUS) == guest.get(mmio.CONFIG_GENERATION) == 0


def test_features_come_in_halves():
    guest = Guest()
    seen = 0
    for half in (0, 1, 2, 0xFFFFFFFF):
        guest.set(mmio.DEVICE_FEATURES_SEL, half)
        value = guest.get(mmio.DEVICE_FEATURES)
        assert half < 2 or value == 0
        seen |= value << 32 * (half & 1)
    assert seen == COMMON_FEATURES | EXTRA == guest.device.offered


def test_features_beyond_bit_63_are_refused():
    guest = Guest().negotiate()
    guest.set(mmio.DRIVER_FEATURES_SEL, 2)
    guest.set(mmio.DRIVER_FEATURES, 0)
    assert guest.device.faults == 0
    guest.set(mmio.DRIVER_FEATURES, 1)
    assert guest.device.faults == 1 and guest.device.features == COMMON_FEATURES


def test_a_request_and_its_interrupt():
    guest = Guest().started()
    guest.offer(0, 0x8000, 4, ids.DESC_WRITE)
    assert RAM.u16(RINGS + 0x2000 + 2) == 1 and guest.interrupts == 1
    assert guest.get(mmio.INTERRUPT_STATUS) == ids.ISR_QUEUE
    guest.device.config_changed()
    assert guest.get(mmio.INTERRUPT_STATUS) == ids.ISR_QUEUE | ids.ISR_CONFIG and guest.interrupts == 2
    guest.set(mmio.INTERRUPT_ACK, ids.ISR_QUEUE)
    assert guest.get(mmio.INTERRUPT_STATUS) == ids.ISR_CONFIG
    guest.set(mmio.INTERRUPT_ACK, 0xFFFFFFFF)
    assert guest.get(mmio.INTERRUPT_STATUS) == 0 and guest.device.faults == 0


def test_queues_that_are_not_there():
    guest = Guest().negotiate()
    for index in (2, 0x7FFFFFFF, 0xFFFFFFFF):
        guest.set(mmio.QUEUE_SEL, index)
        assert guest.get(mmio.QUEUE_NUM_MAX) == guest.get(mmio.QUEUE_READY) == 0
        faults = guest.device.faults
        for register in (mmio.QUEUE_NUM, mmio.QUEUE_READY, mmio.QUEUE_DESC_LOW, mmio.QUEUE_RESET):
            guest.set(register, 1)
        assert guest.device.faults == faults + 4
    for index, size in enumerate(Echo.QUEUES):
        guest.set(mmio.QUEUE_SEL, index)
        assert guest.get(mmio.QUEUE_NUM_MAX) == size


@pytest.mark.parametrize("size", [0, 3, 7, 128, 0x10008, 0xFFFFFFFF])
def test_queue_sizes_that_cannot_be(size: int) -> None:
    guest = Guest().negotiate()
    guest.queue(0, size)
    assert guest.get(mmio.QUEUE_READY) == 0
    assert guest.get(mmio.STATUS) == ACK | DRV | FEAT | ids.NEEDS_RESET and guest.device.faults == 1
    assert Guest.started(guest).get(mmio.STATUS) == READY       # the reset that was asked for


@pytest.mark.parametrize("register", [mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW, mmio.QUEUE_DEVICE_LOW])
@pytest.mark.parametrize(("low", "high"), [(RINGS + 1, 0), (0xFFFFFFF0, 0), (RINGS, 1), (0xFFFFFFF0, 0xFFFFFFFF)])
def test_misplaced_rings(register: int, low: int, high: int) -> None:
    guest = Guest().negotiate()
    guest.queue(0)
    guest.set(mmio.QUEUE_READY, 0)
    guest.set(register, low)
    guest.set(register + 4, high)
    guest.set(mmio.QUEUE_READY, 1)
    assert guest.get(mmio.QUEUE_READY) == 0 and guest.get(mmio.STATUS) & ids.NEEDS_RESET


def test_rings_in_use_stay_where_they_are():
    guest = Guest().started()
    guest.set(mmio.QUEUE_SEL, 0)
    before = guest.device.queues[0].state()
    registers = (mmio.QUEUE_NUM, mmio.QUEUE_DESC_LOW, mmio.QUEUE_DESC_HIGH, mmio.QUEUE_DRIVER_LOW,
                 mmio.QUEUE_DRIVER_HIGH, mmio.QUEUE_DEVICE_LOW, mmio.QUEUE_DEVICE_HIGH)
    for register in registers:
        guest.set(register, 4)
    assert guest.device.queues[0].state() == before and guest.device.faults == len(registers)
    guest.set(mmio.QUEUE_READY, 1)
    assert guest.device.faults == len(registers) and guest.get(mmio.STATUS) == READY


READ_ONLY = (mmio.MAGIC_VALUE, mmio.VERSION, mmio.DEVICE_ID, mmio.VENDOR_ID, mmio.DEVICE_FEATURES,
             mmio.QUEUE_NUM_MAX, mmio.INTERRUPT_STATUS, mmio.SHM_LEN_LOW, mmio.SHM_BASE_HIGH, mmio.CONFIG_GENERATION)


@pytest.mark.parametrize("register", [*READ_ONLY, 0x018, 0x03C, 0x048, 0x0D0, 0x0F8])
def test_writes_to_registers_that_cannot_be_written(register: int) -> None:
    guest = Guest().started()
    before = [guest.get(offset) for offset in range(0, 0x200, 4)]
    state = guest.device.state()
    guest.set(register, 0xFFFFFFFF)
    assert [guest.get(offset) for offset in range(0, 0x200, 4)] == before
    assert guest.device.state() == state and guest.device.faults == 1


@pytest.mark.parametrize(("offset", "size"), [(mmio.STATUS, 1), (mmio.STATUS, 2), (mmio.STATUS, 8), (0x71, 4),
                                              (mmio.QUEUE_NUM, 2), (mmio.MAGIC_VALUE, 8), (0x0FE, 4)])
def test_registers_are_accessed_whole(offset: int, size: int) -> None:
    guest = Guest().started()
    guest.set(offset, 0, size)
    assert guest.get(offset, size) == 0 and guest.device.faults == 2 and guest.get(mmio.STATUS) == READY


def test_the_configuration_space_in_any_width():
    guest = Guest().started()
    for size in (1, 2, 4, 8):
        assert guest.get(mmio.CONFIG + 2, size) == int.from_bytes(b"23456789"[:size], "little")
    assert guest.get(mmio.CONFIG + 8, 8) == int.from_bytes(b"89", "little") and guest.get(0xFFC) == 0
    guest.set(mmio.CONFIG + 1, 0x42, 1)
    guest.set(mmio.CONFIG + 9, 0xFFFF, 2)
    assert guest.device.config() == b"0B23456789" and guest.device.faults == 1


def test_no_shared_memory_regions():
    guest = Guest()
    guest.set(mmio.SHM_SEL, 3)
    assert guest.get(mmio.SHM_LEN_LOW) == guest.get(mmio.SHM_LEN_HIGH) == 0xFFFFFFFF and guest.device.faults == 0


def test_a_notification_of_no_queue():
    guest = Guest().started()
    guest.set(mmio.QUEUE_NOTIFY, 7)
    assert guest.device.faults == 1 and guest.get(mmio.STATUS) == READY


def test_one_queue_reset():
    guest = Guest().started()
    guest.set(mmio.QUEUE_SEL, 1)
    guest.set(mmio.QUEUE_RESET, 1)
    assert guest.get(mmio.QUEUE_RESET) == guest.get(mmio.QUEUE_READY) == 0 and guest.device.faults == 0
    guest.queue(1)
    assert guest.get(mmio.QUEUE_READY) == 1


def test_a_reset_clears_everything():
    guest = Guest().started()
    guest.offer(0, 0x8000, 4, ids.DESC_WRITE)
    guest.set(mmio.STATUS, 0)
    assert guest.get(mmio.STATUS) == guest.get(mmio.INTERRUPT_STATUS) == guest.device.features == 0
    for index in (0, 1):
        guest.set(mmio.QUEUE_SEL, index)
        assert guest.get(mmio.QUEUE_READY) == 0


def test_needs_reset_is_seen_in_the_status():
    guest = Guest().started()
    guest.offer(0, 1 << 40, 4, ids.DESC_WRITE)
    assert guest.get(mmio.STATUS) == READY | ids.NEEDS_RESET
    assert guest.get(mmio.INTERRUPT_STATUS) & ids.ISR_CONFIG and guest.interrupts == 1


def test_state_goes_over():
    guest = Guest().started()
    guest.offer(0, 0x8000, 4, ids.DESC_WRITE)
    guest.set(mmio.QUEUE_SEL, 1)
    guest.set(mmio.DEVICE_FEATURES_SEL, 1)
    other = Guest()
    other.registers.load(guest.registers.state())
    other.device.load(guest.device.state())
    assert [other.get(offset) for offset in range(0, 0x200, 4)] == [guest.get(offset) for offset in range(0, 0x200, 4)]


@pytest.mark.parametrize("state", [{}, {"device_sel": None, "driver_sel": 0, "queue_sel": 0, "interrupt_status": 0}])
def test_states_that_cannot_be(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="state"):
        Guest().registers.load(state)


OFFSETS = st.one_of(st.sampled_from([mmio.STATUS, mmio.QUEUE_SEL, mmio.QUEUE_NUM, mmio.QUEUE_READY, mmio.QUEUE_RESET]),
                    st.integers(0, 0x140 // 4).map(lambda n: 4 * n), st.integers(0, 0xFFF))
VALUES = st.one_of(st.sampled_from([0, 1, 2, 3, 8, 0xB, 0xF, 64, 0x1000, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))


@given(st.booleans(), st.lists(st.tuples(OFFSETS, st.sampled_from([1, 2, 4, 4, 4, 4, 8]), VALUES), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_writes_at_all(started: bool, writes: list[tuple[int, int, int]]) -> None:
    guest = Guest()
    if started:
        guest.started()
    for offset, size, value in writes:
        size = min(size, mmio.LENGTH - offset)
        guest.set(offset, value & ((1 << 8 * size) - 1), size)
        assert 0 <= guest.get(offset, size) < 1 << 8 * size
        guest.device.serve(0)
        guest.loop.run()
    assert len(guest.device.fault_texts) <= 8
    guest.started().offer(0, 0x8000, 4, ids.DESC_WRITE)
    assert RAM.u16(RINGS + 0x2000 + 2) == 1
