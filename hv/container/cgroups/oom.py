"""To be told when the kernel is out of memory for a container.

Version 1: an eventfd, registered in cgroup.event_control (memory.rst, OOM Control). Version 2: memory.events changes,
which poll(2) reports as POLLPRI (cgroup-v2.rst, memory.events). Driven by tests/root/test_cgroups_oom.py.
"""

from __future__ import annotations

__all__ = ["OomWatch"]

import os
from select import POLLIN, POLLPRI

from hv.container.cgroups.folder import Folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.container.cgroups.manager import Cgroup


class OomWatch:
    """`fd` is to be polled for `events`; then `news()` says how many more processes were killed. -1: can't be had."""

    def __init__(self, group: Cgroup) -> None:
        self._group = group
        self._last = group.oom_kills()
        self.fd, self.events = -1, POLLIN
        self._control = -1
        try:
            if "memory" in group.paths:
                self._register(Folder(group.paths["memory"]))
            elif "" in group.paths:
                self.fd = os.open(f"{group.paths['']}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
                self.events = POLLPRI
                os.read(self.fd, 4096)          # what it is now; a change from here on is news
        except OSError:
            self.close()

    def _register(self, folder: Folder) -> None:
        self._control = os.open(f"{folder.path}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        folder.put("cgroup.event_control", f"{self.fd} {self._control}")

    def news(self) -> int:
        """How many processes were killed since the last call; also where no one polls."""
        if self.fd >= 0:
            try:
                if self.events == POLLIN:
                    os.read(self.fd, 8)
                else:
                    os.lseek(self.fd, 0, os.SEEK_SET)
                    os.read(self.fd, 4096)
            except BlockingIOError:
                pass
            except OSError:
                self.close()                    # ENODEV: the group is gone
        now = self._group.oom_kills()
        more, self._last = max(now - self._last, 0), max(now, self._last)
        return more

    def close(self) -> None:
        """Stop listening."""
        for fd in (self.fd, self._control):
            if fd >= 0:
                os.close(fd)
        self.fd = self._control = -1
