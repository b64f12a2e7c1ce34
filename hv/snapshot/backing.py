"""Where a restored machine's RAM comes from, beyond the plain case (hv/snapshot/restore.py): prefetch, userfaultfd; and
what becomes of the file behind it.

A machine that runs on a memory file needs it as it is until its end. Deleted, it goes on: the file is there as long as
it is open. Changed in place, pages that were not touched yet are others'; cut, touching them ends pyhv (SIGBUS).
Snapshots are written read-only to keep people from it, and Watched looks at the file whenever somebody looks at the
machine.

Driven by tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["Watched", "make_memory"]

import os

from hv.errors import ConfigError
from hv.memory.guest import GuestMemory
from hv.snapshot.restore import open_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.snapshot.format import Snapshot


def make_memory(machine: Machine, snapshot: Snapshot, size: int, backend: str, *, verify: bool, prefetch: bool,
                exact: bool = False) -> GuestMemory:
    """RAM of `machine`, which is restored from `snapshot`. `exact`: only what is touched, for a record of that."""
    from hv.snapshot.lazy import LazyMemory, Served, check_backend

    handler = check_backend(backend)
    runs = []
    if prefetch:
        from hv.snapshot.working_set import load

        runs = load(snapshot, size)
    if handler is None:
        from hv.snapshot.working_set import populate, read_ahead

        fd = machine.own_fd(open_memory(snapshot, size, verify=verify))
        read_ahead(fd, runs)
        memory = GuestMemory(size, file=fd)
        machine.at_start.append(lambda: populate(memory, runs))
        Watched(machine, memory, fd)
        return memory
    if any(getattr(device, "vhost_user", None) for device in machine.config.devices):
        raise ConfigError("--memory-backend uffd: a vhost-user back end would see only what the guest has touched",
                          "restore with --memory-backend file")
    if handler:
        if prefetch:
            raise ConfigError(f"--prefetch: what {handler} sends first is its own affair", "without --prefetch")
        return LazyMemory(machine, size, handler, snapshot.part("id", kind=str))
    kind, fd = open_served(snapshot, size, verify)
    machine.own_fd(fd)
    lazy = LazyMemory(machine, size, Served(kind, fd, runs, **({"around": 1} if exact else {})))
    Watched(machine, lazy, fd)
    return lazy


def open_served(snapshot: Snapshot, size: int, verify: bool) -> tuple[str, int]:
    """The kind and a descriptor of what the handler reads: a packed file is not unpacked for it."""
    from hv.snapshot.pack import is_packed, open_checked_packed

    if snapshot.state.get("parent") is None and is_packed(snapshot):
        return "packed", open_checked_packed(snapshot, size, verify)
    return "file", open_memory(snapshot, size, verify=verify)


class Watched:
    """Looks at the file `fd` of `machine`'s memory: what has become of it are warnings of the machine's, each once."""

    def __init__(self, machine: Machine, memory: GuestMemory, fd: int) -> None:
        self._machine, self._fd = machine, fd
        self._first = os.fstat(fd)
        self._told: set[str] = set()
        memory.look = self.look
        machine.at_end.append(self.look)

    def look(self) -> None:
        """Now. Safe from any thread, as long as the machine is not closed."""
        before, now = self._first, os.fstat(self._fd)
        if now.st_size != before.st_size:
            self._tell(f"is {now.st_size} bytes, it was {before.st_size}: touching what was cut off ends pyhv (SIGBUS)")
        elif now.st_mtime_ns != before.st_mtime_ns:
            self._tell("was written to: what the guest had not touched before is not what was saved")
        if now.st_nlink < before.st_nlink and not now.st_nlink:
            self._tell("was deleted: the machine goes on with it, and its room is free when that ends")

    def _tell(self, text: str) -> None:
        kind = text.partition(" ")[0] + text.partition(" ")[2][:4]
        if kind not in self._told:
            self._told.add(kind)
            self._machine.warnings.append(f"the memory file under this machine {text}")
