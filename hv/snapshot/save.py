"""Taking a snapshot: the machine stands still while its state is read, and goes on while the files are finished.

    freeze | collect state, disks, write RAM into the page cache | thaw | checksums, fsync, rename

The folder has another name until it is whole. What a killed pyhv leaves of one is removed by the next snapshot or
`pyhv snapshot ls` in that place (sweep). Driven by tests/kvm/test_snapshot.py.
"""

from __future__ import annotations

__all__ = ["Saved", "save", "sweep"]

import os
from time import perf_counter_ns, time

from hv.errors import ConfigError, HvError, SnapshotError, StateError
from hv.machine.freeze import Still
from hv.machine.recipe import machine_recipe, why_not_snapshot
from hv.snapshot.cpu import settable_msrs
from hv.snapshot.disks import save_disks, sync_disks
from hv.snapshot.format import DISKS, MEMORY, VERSION, Snapshot, write_state
from hv.snapshot.host import host_facts
from hv.snapshot.machine import collect
from hv.snapshot.memory import memory_stamp, used_runs, write_memory, write_pages, write_sums
from hv.snapshot.track import changed_since_restore
from hv.snapshot.track import track as track_changes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine
    from hv.machine.machine import Tracker as AnyTracker
    from hv.memory.dirty import PageSet

NEW = ".new-"                   # .NAME.new-PID: a snapshot that is being written


class Saved:
    """What a snapshot took: `folder`, `id`, `paused_ms` that the guest stood still, `bytes` of memory written."""

    __slots__ = ("bytes", "folder", "id", "paused_ms", "total_ms")

    def __init__(self, folder: str, name: str, paused_ms: float, total_ms: float, size: int) -> None:
        self.folder, self.id, self.paused_ms, self.total_ms, self.bytes = folder, name, paused_ms, total_ms, size


def save(machine: Machine, folder: str, *, diff: bool = False, track: bool = False, copy_disks: bool = False,
         stop: bool = False, compress: bool = False) -> Saved:
    """Write a snapshot of `machine` to `folder`, which must not be there yet.

    `diff`: only the pages that changed since the snapshot before it (hv/snapshot/diff.py), which must stay. `track`:
    note what changes from now on, so that the next can be one. The machine goes on afterwards unless it was frozen or
    paused before, or is to `stop`, which it does when all is on disk. `compress`: its memory (hv/snapshot/pack.py).
    An error leaves no folder, and the machine as it was. Any thread but a vCPU's may call it; one waits for the other.
    """
    if (why := why_not_snapshot(machine.config)) is not None:
        raise ConfigError(f"no snapshot of this machine: {why}", "start it without")
    with machine.saving:
        if not machine.running():
            raise StateError("the machine does not run", "only a machine that was started can be saved")
        base = base_of(machine) if diff else None
        if base is None:
            machine.memory.fetch()
        return _save(machine, folder, base, track, copy_disks, stop, compress)


def _save(machine: Machine, folder: str, base: dict[str, str] | None, track: bool, copy_disks: bool,
          stop: bool, compress: bool) -> Saved:
    msrs = settable_msrs(machine.kvm, machine.vcpus[0].fd.cpuid)
    fresh = make_fresh(folder)
    tracker = machine.tracker
    changed = None
    started = perf_counter_ns()
    try:
        with Still(machine):
            if not machine.running():
                raise StateError("the machine ended before it could be saved")
            state = describe(machine) | collect(machine, msrs)
            if (used := used_runs(machine)) is not None:
                state["used"] = used
            state["disks"] = save_disks(machine, fresh, copy_disks)
            if tracker is not None:
                changed = tracker.take()            # from here on counts the next one
            elif track:
                machine.tracker = track_changes(machine)
            with open(f"{fresh}/{MEMORY}", "wb", 0) as file:
                if base is None:
                    size = write_memory(machine.memory, file.fileno())
                else:
                    pages = changed_since_restore(machine) if changed is None else changed
                    size = write_pages(machine.memory, pages, file.fileno())
                    state |= {"parent": base, "pages": list(pages.runs())}
            if stop:
                finish(fresh, folder, state, compress)      # before it: an error lets the guest go on
                machine.stop("quit", "saved")
            paused = perf_counter_ns() - started
        if not stop:
            finish(fresh, folder, state, compress)
    except BaseException as error:
        undo(machine, tracker, changed)
        discard(fresh)
        if isinstance(error, OSError):
            raise HvError(f"writing {folder}: {os.strerror(error.errno or 0)}",
                          "the guest goes on; make room, or name another place") from None
        raise
    if machine.tracker is not None:
        machine.tracker.base = folder, state["id"]
    return Saved(folder, state["id"], paused / 1e6, (perf_counter_ns() - started) / 1e6, size)


def base_of(machine: Machine) -> dict[str, str]:
    """What a differential snapshot counts from: the last one taken, or the one the machine was restored from."""
    base = machine.tracker.base if machine.tracker is not None else machine.restored_from
    if base is None:
        raise ConfigError("there is no snapshot to take the difference from",
                          "take a full one that tracks changes first (--track), then differences")
    folder, wanted = base
    try:
        found = Snapshot(folder).part("id", kind=str)
    except SnapshotError as error:
        raise ConfigError(f"the snapshot before, {folder}, can't be opened ({error})",
                          "take a full one that tracks changes (--track)") from None
    if found != wanted:
        raise ConfigError(f"{folder} is another snapshot by now than the one to take the difference from",
                          "take a full one that tracks changes (--track)")
    return {"folder": folder, "id": wanted}


def undo(machine: Machine, tracker: AnyTracker | None, changed: PageSet | None) -> None:
    """The snapshot failed: what was taken from the tracker is for the next one, and a new tracker has no use."""
    if changed is not None and tracker is not None:
        for first, end in changed.runs():
            tracker.changed_again(first, end)
    elif machine.tracker is not tracker:
        fresh, machine.tracker = machine.tracker, tracker
        if fresh is not None and machine.running():
            fresh.stop()


def describe(machine: Machine) -> dict[str, Any]:
    """What a reader of the snapshot learns of it, and how the machine is made again."""
    return {"version": VERSION, "id": os.urandom(16).hex(), "parent": None, "created": time(),
            "config": machine_recipe(machine), "host": host_facts(machine)}


def make_fresh(folder: str) -> str:
    """The folder under its first name. ConfigError where the snapshot is there already."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} is there already", "another name, or `pyhv snapshot rm` first")
    return fresh_folder(folder)


def fresh_folder(folder: str) -> str:
    """A folder beside it under the first name, made."""
    parent, name = os.path.split(folder)
    fresh = f"{parent}/.{name}{NEW}{os.getpid()}"
    try:
        os.makedirs(parent, 0o700, exist_ok=True)
        sweep(parent)
        os.mkdir(fresh, 0o700)
    except OSError as error:
        raise HvError(f"making {fresh}: {os.strerror(error.errno or 0)}", "name a folder that can be written") from None
    return fresh


def finish(fresh: str, folder: str, state: dict[str, Any], compress: bool = False) -> None:
    """All to disk, then the true name."""
    sums = write_sums(fresh)
    if compress:
        from hv.snapshot.pack import write_packed

        state["memory"] = write_packed(f"{fresh}/{MEMORY}", fresh) | {"sums": sums}
        os.unlink(f"{fresh}/{MEMORY}")
    else:
        with open(f"{fresh}/{MEMORY}", "rb", 0) as file:
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o400)     # nobody has a reason to change it; clones run on it
            state["memory"] = memory_stamp(file.fileno()) | {"sums": sums}
    sync_disks(fresh)
    write_state(fresh, state)
    sync_folder(fresh)
    os.rename(fresh, folder)
    sync_folder(os.path.dirname(folder))


def sync_folder(folder: str) -> None:
    """fsync of a folder's entries."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(folder: str) -> None:
    """Remove a snapshot's folder: its known files, and nothing that is not a snapshot's."""
    from shutil import rmtree

    for part in (DISKS, "images"):      # a VM's, a container's
        rmtree(f"{folder}/{part}", ignore_errors=True)
    try:
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
    except OSError:
        pass


def sweep(store: str) -> list[str]:
    """Remove what killed processes left half written in `store`; the names of what was removed."""
    gone = []
    try:
        names = os.listdir(store)
    except OSError:
        return []
    for name in names:
        head, mark, pid = name.rpartition(NEW)
        if mark and head.startswith(".") and pid.isdigit() and int(pid) != os.getpid() \
                and not os.path.exists(f"/proc/{pid}"):
            discard(f"{store}/{name}")
            gone.append(name)
    return gone
