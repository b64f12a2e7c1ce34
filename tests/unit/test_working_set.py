"""hv/snapshot/working_set.py: what is noted, and what a note may say."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import SnapshotError
from hv.memory.guest import GuestMemory
from hv.snapshot.format import Snapshot, checksum
from hv.snapshot.working_set import WORKING_SET, joined, load, populate, read_ahead, touched, write

PAGE, SIZE = 4096, 16 << 20


@pytest.fixture
def memory(tmp_path: Path) -> GuestMemory:
    with open(tmp_path / "memory", "w+b") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), b"m" * (8 << 20), 4 << 20)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        made = GuestMemory(SIZE, file=file.fileno())
        made.fd = os.dup(file.fileno())  # type: ignore[attr-defined]
        yield made
        os.close(made.fd)  # type: ignore[attr-defined]
        made.close()


def test_what_was_read_and_written_is_noted(memory):
    assert touched(memory) == []
    memory.read(5 << 20, 1)
    memory.write(13 << 20, b"x" * (PAGE + 1))
    runs = touched(memory)
    pages = {page for first, end in runs for page in range(first, end)}
    read, written = (5 << 20) // PAGE, (13 << 20) // PAGE
    assert {read, written, written + 1} <= pages
    # the page cache may bring its 64 KiB along, and nothing more
    assert pages <= {*range(read // 16 * 16, read // 16 * 16 + 16), *range(written // 16 * 16, written // 16 * 16 + 16)}


def test_prefetched_pages_are_no_fault_any_more(memory):
    from resource import RUSAGE_THREAD, getrusage

    runs = [(1024, 1100), (1110, 1300), (2000, 2001)]
    read_ahead(memory.fd, runs)
    populate(memory, runs)
    pages = {page for first, end in touched(memory) for page in range(first, end)}
    assert pages >= {*range(1024, 1300), 2000}          # what lies between too: it is one piece
    before = getrusage(RUSAGE_THREAD)
    for page in (*range(1024, 1300), 2000):
        memory.read(page * PAGE, 1)
    after = getrusage(RUSAGE_THREAD)
    assert after.ru_majflt == before.ru_majflt and after.ru_minflt - before.ru_minflt < 50


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40)), max_size=12))
def test_joined_runs_cover_theirs_with_small_gaps(pairs):
    runs, at = [], 0
    for gap, length in pairs:
        runs.append((at + gap + 1, at + gap + 1 + length))
        at = runs[-1][1]
    wide = joined(runs)
    covered = {page for first, end in wide for page in range(first, end)}
    wanted = {page for first, end in runs for page in range(first, end)}
    assert wanted <= covered and len(wide) <= len(runs)
    assert all(second[0] - first[1] > 16 for first, second in pairwise(wide))


def taken(folder: Path, name: str = "abc") -> Snapshot:
    return Snapshot(str(folder), {"id": name})


def test_a_note_is_read_back(tmp_path):
    runs = [(0, 3), (7, 8), (100, 4096)]
    write(taken(tmp_path), SIZE, runs)
    write(taken(tmp_path), SIZE, runs)          # again: the new one counts
    assert load(taken(tmp_path), SIZE) == runs
    assert os.listdir(tmp_path) == [WORKING_SET]


def sealed(body: bytes) -> bytes:
    return b"pyhv-working-set 1 " + checksum(body).encode() + b"\n" + body


@pytest.mark.parametrize(("content", "says"), [
    (b"", "does not begin"), (b"pyhv-working-set 2 x\n{}", "does not begin"), (b"x" * 300, "does not begin"),
    (b"pyhv-working-set 1 " + b"0" * 64 + b"\n{}", "checksum"), (sealed(b"[]"), "is no object"),
    (sealed(b"{}"), "is no object"), (sealed(b"\xff"), "is no object"), (sealed(b"{" * 5000), "is no object"),
    (sealed(b'{"id": "abc", "memory": 4096, "runs": []}'), "of another snapshot"),
    (sealed(b'{"id": "abd", "memory": 16777216, "runs": []}'), "of another snapshot"),
    (sealed(b'{"id": "abc", "memory": 16777216, "runs": 5}'), "is no object"),
    *((sealed(b'{"id": "abc", "memory": 16777216, "runs": [[1, 2], %s]}' % run), "is no run of pages") for run in (
        b"[1, 3]", b"[2, 4097]", b"[5, 5]", b"[6, 5]", b"[-1, 5]", b"[3, 1e3]", b"[3, true]", b"[3]", b"3", b'"34"',
        b"[4096, 4097]", b"[18446744073709551616, 18446744073709551617]")),
])
def test_a_bad_note_is_refused(tmp_path, content, says):
    (tmp_path / WORKING_SET).write_bytes(content)
    with pytest.raises(SnapshotError, match=rf"working-set: .*{says}") as caught:
        load(taken(tmp_path), SIZE)
    assert "--record-working-set" in caught.value.hint


def test_no_note(tmp_path):
    with pytest.raises(SnapshotError, match=r"working-set: .* has none"):
        load(taken(tmp_path), SIZE)
