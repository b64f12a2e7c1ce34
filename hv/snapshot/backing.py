"""Where a restored machine's RAM comes from, beyond the plain case (hv/snapshot/restore.py): prefetch, userfaultfd.

Driven by tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["make_memory"]

from hv.errors import ConfigError
from hv.memory.guest import GuestMemory
from hv.snapshot.lazy import AROUND, LazyMemory, Served, check_backend
from hv.snapshot.restore import open_memory
from hv.snapshot.watched import Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.snapshot.format import Snapshot


def make_memory(machine: Machine, snapshot: Snapshot, size: int, backend: str, *, verify: bool, prefetch: bool,
                exact: bool = False) -> GuestMemory:
    """RAM of `machine`, which is restored from `snapshot`. `exact`: only what is touched, for a record of that."""
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
        return served(machine, size, handler, snapshot.part("id", kind=str))
    kind, fd = open_served(snapshot, size, verify)
    machine.own_fd(fd)
    lazy = served(machine, size, Served(kind, fd, runs, 1 if exact else AROUND))
    Watched(machine, lazy, fd)
    return lazy


def served(machine: Machine, size: int, source: Served | str, snapshot_id: str = "") -> LazyMemory:
    """RAM that `source` fills in."""
    memory = LazyMemory(size)
    try:
        memory.serve(machine, source, snapshot_id)
    except BaseException:
        memory.close()
        raise
    return memory


def open_served(snapshot: Snapshot, size: int, verify: bool) -> tuple[str, int]:
    """The kind and a descriptor of what the handler reads: a packed file is not unpacked for it."""
    from hv.snapshot.pack import is_packed, open_checked_packed

    if snapshot.state.get("parent") is None and is_packed(snapshot):
        return "packed", open_checked_packed(snapshot, size, verify)
    return "file", open_memory(snapshot, size, verify=verify)
