"""GuestMemory: layout, checked access, and what a host that can't give the RAM leads to."""

from __future__ import annotations

import re

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


@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_discarded_pages_are_the_hosts_again(backing: str) -> None:
    memory = GuestMemory(4 * MIB, backing=backing)
    memory.fill(0, 4 * MIB, 0x55)
    before = resident(memory)
    assert memory.discard(MIB, 2 * MIB) == 2 * MIB
    assert resident(memory) <= before - 2 * MIB
    assert memory.read(MIB - 1, 2) == b"\x55\0" and memory.read(3 * MIB - 1, 2) == b"\0\x55"
    assert memory.discard(4 * MIB - 8192, 8192) == 8192
    memory.close()


def test_only_whole_pages_of_ram_are_discarded() -> None:
    memory = GuestMemory(4 * MIB)
    memory.fill(0, 4 * MIB, 0x55)
    for gpa, length, whole in [(100, 4000, 0), (4095, 4097, 4096), (1, 12287, 8192), (0, 0, 0), (4096, 4095, 0)]:
        assert memory.discard(gpa, length) == whole
    assert memory.read(0, 4096) == b"\x55" * 4096
    for gpa, length in [(4 * MIB, 4096), (4 * MIB - 4096, 8192), (0, -4096), (-4096, 8192), (1 << 64, 4096)]:
        with pytest.raises(GuestError):
            memory.discard(gpa, length)
    memory.close()


def test_discard_keeps_out_of_huge_pages_it_would_split() -> None:
    memory = GuestMemory(4 * MIB)
    memory.regions[0]._page = 2 * MIB       # as with huge="2M"
    memory.fill(0, 4 * MIB, 0x55)
    assert memory.discard(4096, 2 * MIB) == 0 and memory.u8(4096) == 0x55
    assert memory.discard(4096, 4 * MIB - 4096) == 2 * MIB and memory.u8(2 * MIB - 1) == 0x55
    memory.close()


def test_views_know_where_they_are() -> None:
    memory = GuestMemory(5 << 30)
    for gpa in (0, 12345, HIGH_RAM_START + 8):
        assert memory.gpa_of(memory.view(gpa, 3)) == gpa
    for foreign in (memoryview(bytearray(8)), memoryview(bytearray())):
        with pytest.raises(GuestError):
            memory.gpa_of(foreign)
    memory.close()


def test_somebody_is_told_before_ram_is_touched() -> None:
    memory = GuestMemory(4 * MIB)
    told: list[tuple[int, int]] = []
    memory.first_use = lambda gpa, length: told.append((gpa, length))
    memory.read(1, 2)
    memory.write(3, b"1234")
    memory.view(5, 6).release()
    memory.host_address(7, 8)
    assert told == [(1, 2), (3, 4), (5, 6), (7, 8)]
    memory.discard(0, 8192)             # gives pages back: no touch
    with pytest.raises(GuestError):
        memory.read(4 * MIB - 1, 2)
    assert len(told) == 4
    memory.close()


def resident(memory: GuestMemory) -> int:
    """Bytes of the host's memory behind it (man 5 proc, smaps)."""
    with open("/proc/self/smaps") as file:
        blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", file.read())
    start = memory.regions[0].host
    for block in blocks:
        low, high = (int(text, 16) for text in block.split(" ")[0].split("-"))
        if low <= start < high and (found := re.search(r"Rss: +(\d+)", block)):
            return int(found[1]) << 10
    raise AssertionError("not mapped")
