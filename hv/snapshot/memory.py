"""Guest RAM into the memory file of a snapshot, and from it.

The file is as long as guest RAM, its ranges one behind the other. Pages that hold only zeros are holes. What of RAM was
ever touched the kernel knows (proc(5), /proc/PID/pagemap), so that untouched pages are neither read nor made:

    anonymous RAM      pages present or swapped out
    memfd              its data, by SEEK_DATA
    restored RAM       the snapshot's file, and over it the pages present that are not the file's: the private copies

Driven by tests/unit/test_snapshot_memory.py.
"""

from __future__ import annotations

__all__ = [
    "BLOCK", "check_memory", "copy_data", "data_runs", "memory_stamp", "touched_runs", "used_runs", "write_memory",
    "write_pages", "write_sums",
]

import os

from hv.errors import SnapshotError
from hv.machine.ramslots import GRANULE
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.format import MEMORY, SUMS, checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator
    from typing import Any

    from hv.machine.machine import Machine
    from hv.memory.dirty import PageSet
    from hv.memory.guest import GuestMemory
    from hv.memory.region import Region

BLOCK = 1 << 20                 # bytes that one line of memory.sums covers
# Documentation/admin-guide/mm/pagemap.rst
PRESENT, SWAPPED, FILE, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 55
_ZEROS = bytes(PAGE_SIZE)
_SUMS_MOST = 1 << 30


def write_memory(memory: GuestMemory, fd: int) -> int:
    """Write all RAM into the empty file `fd`; returns the bytes that are no hole. The machine stands still."""
    os.ftruncate(fd, memory.size)
    written = start = 0
    for region in memory.regions:
        if region.file >= 0:
            written += copy_data(region.file, fd, region.file_offset, region.size, start)
        for first, end in touched_runs(region):
            written += _write_run(region, fd, start, first, end)
        start += region.size
    return written


def write_pages(memory: GuestMemory, pages: PageSet, fd: int) -> int:
    """Write those pages of RAM, each where it stands in a full memory file, into the empty file `fd`."""
    os.ftruncate(fd, memory.size)
    written = start = 0
    runs = [(first * PAGE_SIZE, end * PAGE_SIZE) for first, end in pages.runs()]
    for region in memory.regions:
        for first, end in runs:
            low, high = max(first, start), min(end, start + region.size)
            while low < high:
                done = os.pwrite(fd, region.view[low - start:high - start], low)
                written += done
                low += done
        start += region.size
    return written


def used_runs(machine: Machine) -> list[tuple[int, int]] | None:
    """Runs of pages outside of which nobody has ever touched the machine's RAM, for hv/machine/ramslots.py.

    In the granules of that. None where it is not known, of no use as the KVM keeps nothing for each page, or the guest
    may be one that does not write to a page before it has the processor do so (ramslots.py).
    """
    if machine.softkvm is None or not machine.softkvm.told_linux():
        return None
    if machine.slots is not None:
        spans = sorted((first, first + size // PAGE_SIZE) for _, first, _, size, _ in machine.slots.rows)
    elif machine.booted:
        spans = []
        start = 0
        for region in machine.memory.regions:
            spans += [(start + first // PAGE_SIZE, start + end // PAGE_SIZE) for first, end in _granules(region)]
            start += region.size // PAGE_SIZE
    else:
        return None
    runs: list[tuple[int, int]] = []
    for first, end in spans:
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((first, end))
    return runs


def _granules(region: Region) -> Iterator[tuple[int, int]]:
    """Those of a range's granules in which a page was ever touched, as (first, end) in bytes of the range."""
    if region.fd >= 0:
        yield from data_runs(region.fd, 0, region.size)
        return
    step = GRANULE // PAGE_SIZE * 8
    # A page that was never there may have the bit of one that was changed (fs/proc/task_mmu.c, pagemap_pte_hole).
    empty, fresh = bytes(step), SOFT_DIRTY.to_bytes(8, "little") * (step // 8)
    with open("/proc/self/pagemap", "rb", 0) as file:
        for at in range(0, region.size, GRANULE):
            size = min(GRANULE, region.size - at) // PAGE_SIZE * 8
            entries = os.pread(file.fileno(), size, (region.host + at) // PAGE_SIZE * 8)
            if entries not in (empty[:size], fresh[:size]):
                yield at, min(at + GRANULE, region.size)


def touched_runs(region: Region) -> Iterator[tuple[int, int]]:
    """Runs of pages, as (first, end) in bytes of the range, that may hold something the file behind it does not."""
    if region.fd >= 0:
        yield from data_runs(region.fd, 0, region.size)
        return
    from array import array  # brings the collections package, 3 ms

    with open("/proc/self/pagemap", "rb", 0) as file:
        step = 1 << 16          # entries of 8 bytes: 256 MiB of RAM
        for at in range(0, region.size // PAGE_SIZE, step):
            count = min(step, region.size // PAGE_SIZE - at)
            entries = array("Q", os.pread(file.fileno(), 8 * count, (region.host // PAGE_SIZE + at) * 8))
            yield from _runs(entries, at, private=region.file >= 0)


def _runs(entries: array[int], at: int, *, private: bool) -> Iterator[tuple[int, int]]:
    first = -1
    present_or_swapped = PRESENT | SWAPPED
    for index, entry in enumerate(entries):
        if entry and entry & present_or_swapped and not (private and entry & FILE):
            if first < 0:
                first = index
        elif first >= 0:
            yield (at + first) * PAGE_SIZE, (at + index) * PAGE_SIZE
            first = -1
    if first >= 0:
        yield (at + first) * PAGE_SIZE, (at + len(entries)) * PAGE_SIZE


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) of a file that are no holes."""
    at = start
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return              # ENXIO: a hole up to the end
        if first >= end:
            return
        at = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        yield first, at


def copy_data(source: int, target: int, offset: int, size: int, to: int) -> int:
    """What is no hole in `size` bytes of a file, from `offset`, to `to` in another; how much that was."""
    from hv.linux.sparse import copy_sparse

    if os.fstat(source).st_size < offset + size:
        raise SnapshotError(MEMORY, "has become shorter since it was opened", "the file was cut, or swapped")
    copy_sparse(source, offset, target, to, size)
    return sum(end - first for first, end in data_runs(source, offset, offset + size))


def _write_run(region: Region, fd: int, start: int, first: int, end: int) -> int:
    """The pages of a run that hold something; those of a restored range also where they have become zeros."""
    view, written = region.view, 0
    keep_zeros = region.file >= 0
    at = first
    while at < end:
        if not keep_zeros and bytes(view[at:at + PAGE_SIZE]) == _ZEROS:
            at += PAGE_SIZE
            continue
        stop = at + PAGE_SIZE
        while stop < end and (keep_zeros or bytes(view[stop:stop + PAGE_SIZE]) != _ZEROS):
            stop += PAGE_SIZE
        while at < stop:
            done = os.pwrite(fd, view[at:stop], start + at)
            written += done
            at += done
    return written


# checking --------------------------------------------------------------------------------------------


def write_sums(folder: str) -> str:
    """memory.sums: a checksum for each BLOCK of the memory file, `-` where it is a hole. Its own checksum."""
    with open(f"{folder}/{MEMORY}", "rb", 0) as file, open(f"{folder}/{SUMS}", "wb", 0) as out:
        text = "".join(line + "\n" for _, line in _sums(file.fileno())).encode()
        out.write(text)
        os.fsync(out.fileno())
    return checksum(text)


def _sums(fd: int) -> Iterator[tuple[int, str]]:
    size = os.fstat(fd).st_size
    holes = bytes(BLOCK)
    data = {at // BLOCK for first, end in data_runs(fd, 0, size) for at in range(first // BLOCK * BLOCK, end, BLOCK)}
    for block in range(-(-size // BLOCK)):
        content = os.pread(fd, BLOCK, block * BLOCK) if block in data else b""
        yield block, "-" if not content or content == holes[:len(content)] else checksum(content)


def check_memory(folder: str, sums: str, found: Iterable[tuple[int, str]] | None = None) -> None:
    """Read the whole memory file and compare it to its checksums, whose own is `sums`. SnapshotError says where not.

    `found`: the number and checksum of each block, of a memory that is in no such file.
    """
    try:
        with open(f"{folder}/{SUMS}", "rb", 0) as file:
            text = file.read(_SUMS_MOST)
        if checksum(text) != sums:
            raise SnapshotError(SUMS, "is not what was saved", "the file is damaged, or of another snapshot")
        lines = text.decode("ascii", "replace").split()
        if found is None:
            with open(f"{folder}/{MEMORY}", "rb", 0) as memory:
                found = list(_sums(memory.fileno()))
        found = list(found)
    except OSError as error:
        raise SnapshotError(MEMORY, f"{error.filename}: {os.strerror(error.errno or 0)}",
                            "the snapshot is incomplete") from None
    if len(lines) != len(found):
        raise SnapshotError(MEMORY, f"{len(found)} MiB, with checksums of {len(lines)}", "the file was cut, or swapped")
    for (block, line), expected in zip(found, lines, strict=True):
        if line != expected:
            raise SnapshotError(MEMORY, f"the MiB at {block * BLOCK:#x} is not what was saved",
                                "the file is damaged: take the snapshot again")


def memory_stamp(fd: int) -> dict[str, Any]:
    """What tells, without reading it, that a memory file is still the one that was written."""
    status = os.fstat(fd)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
