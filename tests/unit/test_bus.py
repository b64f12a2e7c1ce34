"""Port and MMIO routing: what is claimed, what is split, what nobody answers."""

from __future__ import annotations

import random

import pytest

from hv.devices.base import Device
from hv.devices.bus import MmioBus, PioBus
from hv.errors import ConfigError


class Recorder(Device):
    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return 0x10 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


def test_a_byte_wide_device_sees_a_wide_access_byte_by_byte():
    bus, device = PioBus(), Recorder()
    bus.add(device, 0x300, 4)
    assert bus.read(0x300, 4) == 0x13121110
    bus.write(0x302, 2, 0xBBAA)
    assert device.log == [("read", 0, 1), ("read", 1, 1), ("read", 2, 1), ("read", 3, 1),
                          ("write", 2, 1, 0xAA), ("write", 3, 1, 0xBB)]


def test_a_wide_device_sees_it_whole():
    bus, device = PioBus(), Recorder()
    bus.add(device, 0x600, 8, wide=True)
    bus.write(0x604, 2, 0x3400)
    assert device.log == [("write", 4, 2, 0x3400)]


def test_unclaimed_ports_read_as_ones_and_are_counted():
    bus = PioBus()
    assert bus.read(0x1234, 1) == 0xFF
    assert bus.read(0x1234, 4) == 0xFFFFFFFF
    bus.write(0xFFFF, 4, 1)      # wraps at the end of the port space
    assert bus.unclaimed == 1 + 4 + 4
    for port in range(0x10000):
        bus.read(port, 1)
    assert len(bus.unclaimed_ports) <= 64


@pytest.mark.parametrize(("base", "length"), [(0x302, 1), (0x2FF, 2), (0x10000, 1), (0xFFFF, 2), (5, 0)])
def test_ports_are_given_once_and_within_the_space(base, length):
    bus = PioBus()
    bus.add(Device(), 0x300, 4)
    with pytest.raises(ConfigError):
        bus.add(Device(), base, length)


def test_mmio_finds_the_device_and_refuses_to_straddle():
    bus, low, high = MmioBus(), Recorder(), Recorder()
    bus.add(high, 0xD0001000, 0x200)
    bus.add(low, 0xD0000000, 0x200)
    assert bus.read(0xD0000004, 4) == 0x14
    assert bus.read(0xD0001008, 4) == 0x18
    bus.write(0xD00001FC, 8, 1)         # begins inside, ends outside
    assert bus.read(0xD0000200, 2) == 0xFFFF
    assert bus.read(0xCFFFFFFF, 1) == 0xFF
    assert bus.unclaimed == 3
    assert low.log == [("read", 4, 4)]
    with pytest.raises(ConfigError):
        bus.add(Device(), 0xD00001FF, 2)


def test_random_accesses_always_return():
    bus, dice = MmioBus(), random.Random(1)
    for slot in range(8):
        bus.add(Recorder(), 0xD0000000 + 0x1000 * slot, 0x200)
    for _ in range(5000):
        address, size = dice.randrange(0xCFFFF000, 0xD0009000), dice.choice((1, 2, 4, 8))
        assert isinstance(bus.read(address, size), int)
        bus.write(address, size, dice.getrandbits(8 * size))


def test_a_device_taken_away_is_gone_even_if_hit_last():
    bus, first, second = MmioBus(), Recorder(), Recorder()
    bus.add(first, 0xD0000000, 0x1000)
    bus.add(second, 0xD0001000, 0x1000)
    assert bus.read(0xD0000004, 4) == 0x14
    bus.remove(0xD0000000)
    bus.remove(0xD0000000)      # nobody is there: nothing happens
    assert bus.read(0xD0000004, 4) == 0xFFFFFFFF and bus.read(0xD0001000, 4) == 0x10
    bus.add(first, 0xD0000800, 0x800)
    assert bus.read(0xD0000804, 4) == 0x14
    assert [row[0] for row in bus.devices] == [0xD0000800, 0xD0001000]
