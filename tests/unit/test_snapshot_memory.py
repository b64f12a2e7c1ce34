"""hv/snapshot/memory.py: RAM into a sparse file and back, and the checksums of it."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.errors import SnapshotError
from hv.memory.dirty import PageSet
from hv.memory.guest import GuestMemory
from hv.snapshot.format import MEMORY
from hv.snapshot.memory import check_memory, data_runs, write_memory, write_pages, write_sums

PAGE, SIZE = 4096, 8 << 20
WRITES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(max_size=3 * PAGE)), max_size=12)


def fill(memory: GuestMemory, writes: list[tuple[int, bytes]], model: bytearray) -> None:
    for at, data in writes:
        data = data[:SIZE - at]
        memory.write(at, data)
        model[at:at + len(data)] = data


@settings(max_examples=40, deadline=None)
@given(first=WRITES, second=WRITES, backing=st.sampled_from(["anon", "memfd"]))
def test_the_file_is_what_ram_was_also_of_a_restored_machine(tmp_path_factory, first, second, backing):
    folder = tmp_path_factory.mktemp("m")
    model = bytearray(SIZE)
    memory = GuestMemory(SIZE, backing=backing)
    fill(memory, first, model)
    with open(folder / "one", "w+b") as one, open(folder / "two", "w+b") as two:
        write_memory(memory, one.fileno())
        memory.close()
        assert one.read() == model
        again = GuestMemory(SIZE, file=one.fileno())
        try:
            fill(again, second, model)
            write_memory(again, two.fileno())
        finally:
            again.close()
        two.seek(0)
        assert two.read() == model
        one.seek(0)
        before = bytearray(SIZE)
        fill_model(first, before)
        assert one.read() == before         # what was restored from stays as it was


def fill_model(writes: list[tuple[int, bytes]], model: bytearray) -> None:
    for at, data in writes:
        model[at:at + len(data[:SIZE - at])] = data[:SIZE - at]


def test_untouched_and_zero_pages_are_holes(tmp_path):
    memory = GuestMemory(SIZE)
    try:
        memory.write(5 * PAGE, b"x")
        memory.write(6 * PAGE, bytes(PAGE))
        memory.write(90 * PAGE, b"y" * 2 * PAGE)
        with open(tmp_path / "m", "w+b") as file:
            assert write_memory(memory, file.fileno()) == 3 * PAGE
            assert list(data_runs(file.fileno(), 0, SIZE)) == [(5 * PAGE, 6 * PAGE), (90 * PAGE, 92 * PAGE)]
    finally:
        memory.close()


def test_a_page_of_a_restored_machine_that_became_zeros_is_zeros(tmp_path):
    (tmp_path / "m").write_bytes(b"z" * SIZE)
    with open(tmp_path / "m", "rb") as file, open(tmp_path / "n", "w+b") as new:
        memory = GuestMemory(SIZE, file=file.fileno())
        try:
            memory.write(3 * PAGE, bytes(PAGE))
            write_memory(memory, new.fileno())
        finally:
            memory.close()
        assert new.read() == b"z" * 3 * PAGE + bytes(PAGE) + b"z" * (SIZE - 4 * PAGE)


def test_only_the_pages_asked_for(tmp_path):
    memory = GuestMemory(SIZE)
    try:
        memory.write(0, b"a" * SIZE)
        pages = PageSet(memory.regions)
        pages.mark(7 * PAGE, 2 * PAGE)
        pages.mark(SIZE - 1, 1)
        with open(tmp_path / "m", "w+b") as file:
            assert write_pages(memory, pages, file.fileno()) == 3 * PAGE
            data = file.read()
        assert data.count(b"a") == 3 * PAGE
        assert data[7 * PAGE:9 * PAGE] == b"a" * 2 * PAGE
        assert data[-PAGE:] == b"a" * PAGE
    finally:
        memory.close()


@pytest.fixture
def sound(tmp_path):
    rng = random.Random(3)
    with open(tmp_path / MEMORY, "wb") as file:
        os.truncate(file.fileno(), SIZE)
        for at in (0, 3 << 20, (7 << 20) + 777):
            file.seek(at)
            file.write(rng.randbytes(9000))
    return tmp_path, write_sums(str(tmp_path))


def test_checksums_find_any_change(sound):
    folder, sums = sound
    check_memory(str(folder), sums)
    for at in (0, (3 << 20) + 8999, (5 << 20) + 5, SIZE - 1):     # data, its end, a hole, the last byte
        with open(folder / MEMORY, "r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 1]))
        with pytest.raises(SnapshotError, match=f"the MiB at {at >> 20 << 20:#x}"):
            check_memory(str(folder), sums)
        with open(folder / MEMORY, "r+b") as file:
            file.seek(at)
            file.write(old)
    check_memory(str(folder), sums)


def test_a_cut_memory_or_foreign_checksums_are_refused(sound):
    folder, sums = sound
    with pytest.raises(SnapshotError, match="is not what was saved"):
        check_memory(str(folder), "00" * 32)
    os.truncate(folder / MEMORY, SIZE - (1 << 20))
    with pytest.raises(SnapshotError, match="7 MiB, with checksums of 8"):
        check_memory(str(folder), sums)
    os.unlink(folder / MEMORY)
    with pytest.raises(SnapshotError, match="No such file"):
        check_memory(str(folder), sums)
