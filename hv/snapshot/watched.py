"""What becomes of the memory file under a running machine.

It needs the file as it is until its end. Deleted, it goes on: the file is there as long as it is open. Changed in
place, pages that were not touched yet are others'; cut, touching them ends pyhv (SIGBUS). Snapshots are written
read-only to keep people from it, and whenever somebody looks at the machine, this looks at the file.
Driven by tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["Watched"]

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.memory.guest import GuestMemory


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
            self._tell("size", f"is {now.st_size} bytes, it was {before.st_size}: touching what was cut off ends pyhv "
                       "(SIGBUS)")
        elif now.st_mtime_ns != before.st_mtime_ns:
            self._tell("content", "was written to: what the guest had not touched before is not what was saved")
        if before.st_nlink and not now.st_nlink:
            self._tell("name", "was deleted: the machine goes on with it, and its room is free when that ends")

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._machine.warnings.append(f"the memory file under this machine {text}")
