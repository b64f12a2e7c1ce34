"""hv/memory/dirty.py: sets of pages, held to a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hv.memory.dirty import PageSet
from hv.memory.guest import GuestMemory

PAGE = 4096


class _Range:
    def __init__(self, gpa: int, pages: int) -> None:
        self.gpa, self.size = gpa, pages * PAGE


RANGES = (_Range(0, 40), _Range(1 << 32, 24))      # two, as around the MMIO hole


def pages_of(found: PageSet) -> set[int]:
    return {page for first, end in found.runs() for page in range(first, end)}


@given(st.lists(st.tuples(st.integers(0, 40 * PAGE - 1), st.integers(0, 9 * PAGE), st.booleans()), max_size=12))
def test_marks_are_the_pages_that_the_bytes_lie_in(writes):
    found, model = PageSet(RANGES), set()
    for start, length, high in writes:
        base, first, pages = ((1 << 32), 40, 24) if high else (0, 0, 40)
        start = min(start, pages * PAGE - 1)
        length = min(length, pages * PAGE - start)
        found.mark(base + start, length)
        if length:
            model |= {first + page for page in range(start // PAGE, (start + length - 1) // PAGE + 1)}
    assert pages_of(found) == model
    assert len(found) == len(model)


@given(st.binary(min_size=8, max_size=8), st.integers(0, 63))
def test_a_bitmap_is_read_as_kvm_writes_it(bitmap, pages):
    found = PageSet((_Range(0, 10), _Range(1 << 32, 64)))
    found.add_bitmap(10, bitmap, pages)
    assert pages_of(found) == {10 + bit for bit in range(pages) if bitmap[bit // 8] >> bit % 8 & 1}


def test_what_is_taken_is_gone_and_the_rest_stays():
    found = PageSet(RANGES)
    found.mark(3 * PAGE, 1)
    taken = found.take()
    found.mark(5 * PAGE, 1)
    assert pages_of(taken) == {3}
    assert pages_of(found) == {5}


def test_memory_notes_what_pyhv_writes():
    memory = GuestMemory(4 << 20)
    try:
        memory.write(PAGE, b"before")
        memory.dirty = PageSet(memory.regions)
        memory.write(2 * PAGE - 1, b"ab")
        memory.put64(7 * PAGE, 1)
        memory.discard(9 * PAGE, PAGE)
        view = memory.view(20 * PAGE + 5, PAGE)
        memory.written([view])
        del view
        assert pages_of(memory.dirty) == {1, 2, 7, 9, 20, 21}
    finally:
        memory.close()
