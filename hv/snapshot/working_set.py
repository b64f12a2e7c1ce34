"""Which pages a restored guest touches first: noted once, read in few large pieces at later restores.

As in REAP (Ustiugov et al., ASPLOS 2021): a guest that goes on touches the same few MiB each time, page by page, and
from a cold disk each is a wait of its own. `working-set` in the snapshot's folder is a header line and JSON:

    pyhv-working-set 1 <blake2b of what follows>
    {"id": of the snapshot, "memory": bytes of RAM, "runs": [[first page, end], ...]}

What was touched is read from /proc/self/pagemap: the pages that are mapped in this process, read or written, of a
private mapping of a file those of the page cache and the copies. Of a file in the page cache the kernel maps the 15
around as well (mm/memory.c, do_fault_around); of memory served by userfaultfd it does not, so a note taken there is
exact. mincore(2) tells of the page cache, which others fill too.

Unlike REAP's, the note has no copy of the pages: they are the memory file's, which all clones share in the page cache.
Driven by tests/unit/test_working_set.py and tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["WORKING_SET", "load", "populate", "read_ahead", "record", "touched"]

import os
from array import array

from hv.errors import HvError, SnapshotError
from hv.linux.syscall import try_syscall
from hv.memory.layout import PAGE_SIZE
from hv.plainjson import dumps, loads
from hv.snapshot.format import checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from hv.machine.machine import Machine
    from hv.memory.guest import GuestMemory
    from hv.snapshot.format import Snapshot

    Runs = list[tuple[int, int]]

WORKING_SET = "working-set"
MAGIC, VERSION = b"pyhv-working-set", 1
_MOST = 64 << 20                # bytes of the file: runs of all pages of 16 GiB, each second one touched
_GAP = 16                       # pages: what lies between is read too, rather than ask twice
_SYS_MADVISE, _MADV_POPULATE_READ = 28, 22      # syscall_64.tbl; asm-generic/mman-common.h, since Linux 5.14
_STEP = 1 << 16                 # entries of pagemap read at once
_IDLE = bytes(8 * 64)
_PRESENT_OR_SWAPPED = 3 << 62   # Documentation/admin-guide/mm/pagemap.rst
_LOOK, _AFTER, _MOST_SECONDS = 0.02, 1.0, 10.0


def touched(memory: GuestMemory) -> Runs:
    """The pages that this process has of guest RAM, numbered across all ranges."""
    runs: Runs = []
    number = 0
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for region in memory.regions:
            pages = region.size // PAGE_SIZE
            for at in range(0, pages, _STEP):
                data = os.pread(fd, 8 * min(_STEP, pages - at), (region.host // PAGE_SIZE + at) * 8)
                _add(runs, data, number + at)
            number += pages
    finally:
        os.close(fd)
    return runs


def _add(runs: Runs, data: bytes, number: int) -> None:
    for start in range(0, len(data), len(_IDLE)):
        piece = data[start:start + len(_IDLE)]
        if piece == _IDLE:
            continue                # most of RAM
        for page, entry in enumerate(array("Q", piece), number + start // 8):
            if not entry & _PRESENT_OR_SWAPPED:
                continue
            if runs and runs[-1][1] == page:
                runs[-1] = runs[-1][0], page + 1
            else:
                runs.append((page, page + 1))


def write(snapshot: Snapshot, size: int, runs: Runs) -> None:
    """The note, in the snapshot's folder; one that was there is replaced."""
    body = dumps({"id": snapshot.part("id", kind=str), "memory": size, "runs": runs}).encode()
    path = f"{snapshot.folder}/{WORKING_SET}"
    fresh = f"{path}.{os.getpid()}"
    try:
        with open(fresh, "wb") as file:
            file.write(b"%s %d %s\n%s" % (MAGIC, VERSION, checksum(body).encode(), body))
        os.rename(fresh, path)
    except OSError as error:
        try:
            os.unlink(fresh)
        except OSError:
            pass
        raise HvError(f"{path}: {os.strerror(error.errno or 0)}", "the working set is not noted") from None


def load(snapshot: Snapshot, size: int) -> Runs:
    """The pages noted for it, as runs (first, end) in order. SnapshotError where there is no note, or a bad one."""
    hint = "record it again: --record-working-set"
    try:
        with open(f"{snapshot.folder}/{WORKING_SET}", "rb") as file:
            header, body = file.readline(256).split(), file.read(_MOST + 1)
    except FileNotFoundError:
        raise SnapshotError(WORKING_SET, f"{snapshot.folder} has none",
                            "restore with --record-working-set once") from None
    except OSError as error:
        raise SnapshotError(WORKING_SET, os.strerror(error.errno or 0), hint) from None
    if header[:2] != [MAGIC, b"%d" % VERSION] or len(header) != 3:
        raise SnapshotError(WORKING_SET, f"does not begin with {MAGIC.decode()} {VERSION}", hint)
    if len(body) > _MOST or checksum(body).encode() != header[2]:
        raise SnapshotError(WORKING_SET, "its checksum is wrong", hint)
    try:
        note = loads(body.decode())
        mine = note["id"] == snapshot.part("id", kind=str) and note["memory"] == size
        pages, runs = size // PAGE_SIZE, note["runs"]
        if not isinstance(runs, list):
            raise ValueError("runs")
    except (ValueError, LookupError, TypeError):
        raise SnapshotError(WORKING_SET, "is no object with id, memory and runs", hint) from None
    if not mine:
        raise SnapshotError(WORKING_SET, "is that of another snapshot", hint)
    last = 0
    for run in runs:
        if not (isinstance(run, list) and len(run) == 2 and type(run[0]) is type(run[1]) is int
                and last <= run[0] < run[1] <= pages):
            raise SnapshotError(WORKING_SET, f"{run!r:.60} is no run of pages of {size} bytes, behind the last", hint)
        last = run[1]
    return [(run[0], run[1]) for run in runs]


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """Runs with little between them as one."""
    found: Runs = []
    for first, end in runs:
        if found and first - found[-1][1] <= _GAP:
            found[-1] = found[-1][0], end
        else:
            found.append((first, end))
    return found


def read_ahead(fd: int, runs: Runs) -> None:
    """Have the kernel read those pages of the memory file; it does so while others go on."""
    for first, end in joined(runs):
        os.posix_fadvise(fd, first * PAGE_SIZE, (end - first) * PAGE_SIZE, os.POSIX_FADV_WILLNEED)


def populate(memory: GuestMemory, runs: Runs) -> None:
    """Map those pages, so that touching them is no fault. What the kernel can't do, the faults will."""
    number = 0
    for region in memory.regions:
        pages = region.size // PAGE_SIZE
        for first, end in joined(runs):
            low, high = max(first, number), min(end, number + pages)
            if low < high:
                try_syscall(_SYS_MADVISE, region.host + (low - number) * PAGE_SIZE, (high - low) * PAGE_SIZE,
                            _MADV_POPULATE_READ)
        number += pages


def record(machine: Machine, snapshot: Snapshot, seconds: float | None) -> None:
    """Note what `machine`, not started yet, touches in the first `seconds`; without, until a second after it printed.

    Where it ends before that, what it had touched by then. A note that can't be written is a warning of the machine's.
    """
    size = machine.memory.size
    done = False

    def finish() -> None:
        nonlocal done
        if not done:
            done = True
            try:
                write(snapshot, size, touched(machine.memory))
            except (HvError, OSError) as error:
                machine.warnings.append(f"working set: {error}")

    def look(left: float) -> None:
        if done:
            return
        if machine.console.printed or left <= 0:
            machine.loop.call_later(_AFTER, finish)
        else:
            machine.loop.call_later(_LOOK, lambda: look(left - _LOOK))

    def begin() -> None:
        if seconds is None:
            look(_MOST_SECONDS)
        else:
            machine.loop.call_later(seconds, finish)

    machine.at_start.append(begin)
    machine.at_end.append(finish)
