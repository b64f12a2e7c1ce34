"""GuestMemory: layout, checked access, and what a host that can't give the RAM leads to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ConfigError, GuestError
from hv.memory.guest import GuestMemory
from hv.memory.layout import HIGH_RAM_START, LOW_RAM_END, ram_ranges

MIB = 1 << 20


def test_ram_is_split_around_the_hole() -> None:
    assert ram_ranges(256 * MIB) == [(0, 256 * MIB)]
    assert ram_ranges(8 << 30) == [(0, LOW_RAM_END), (HIGH_RAM_START, (8 << 30) - LOW_RAM_END)]


def test_eight_gib_guest_reaches_both_ends() -> None:
    memory = GuestMemory(8 << 30)
    last = HIGH_RAM_START + (8 << 30) - LOW_RAM_END - 8
    memory.put64(last, 0x1122334455667788)
    assert memory.u64(last) == 0x1122334455667788
    with pytest.raises(GuestError):
        memory.read(LOW_RAM_END - 4, 8)     # across the hole
    memory.close()


@given(gpa=st.integers(-(1 << 64), 1 << 65), length=st.integers(-(1 << 33), 1 << 33))
def test_bad_ranges_never_reach_the_mapping(gpa: int, length: int) -> None:
    inside = gpa >= 0 and length >= 0 and gpa + length <= 4 * MIB
    assert SMALL.contains(gpa, length) == inside
    if not inside:
        for access in (SMALL.read, SMALL.view, SMALL.host_address):
            with pytest.raises(GuestError):
                access(gpa, length)


SMALL = GuestMemory(4 * MIB)


@pytest.mark.parametrize("size", [0, 4096, MIB, 2 * MIB + 1, 1 << 50])
def test_impossible_sizes_are_one_clear_error(size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        GuestMemory(size)
    assert caught.value.hint


@pytest.mark.parametrize("options", [{"backing": "memfd"}, {"huge": "thp"}, {"ksm": True}, {"prefault": True}])
def test_backings_hold_data(options: dict[str, object]) -> None:
    memory = GuestMemory(4 * MIB, **options)
    memory.write(0x1000, b"hello")
    assert memory.read(0x1000, 5) == b"hello"
    memory.fill(0x1000, 3, 0x41)
    assert memory.read(0x1000, 5) == b"AAAlo"
    memory.close()
    memory.close()
