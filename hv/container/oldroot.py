"""`--no-pivot`: on a ramdisk pivot_root(2) is not allowed, so the old root stays, below the container's.

Whoever inside may mount could lay it open by unmounting the container's root. The host's mounts are therefore taken out
of it: above all /proc and /sys, as nothing in them is masked (runc does it to these). In a user namespace the kernel
keeps what came from outside in place; there a tmpfs covers every proc and sysfs. What stays is the ramdisk's own
content, and in a user namespace the other mounts.

Driven by tests/root/test_container_nopivot.py.
"""

from __future__ import annotations

__all__ = ["take_apart"]

import os

from hv.errors import HvError, KernelError
from hv.linux.mount import PROPAGATION, mount_id, move, new_filesystem, set_propagation, umount, unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NEVER_SEEN = (b"proc", b"sysfs")


class _Mount:
    """A line of mountinfo (proc(5))."""

    def __init__(self, line: bytes) -> None:
        words = line.split()
        end = words.index(b"-")
        self.number, self.parent = words[0], words[1]
        self.point = unescape(words[4])
        self.shared = any(word.startswith(b"shared:") for word in words[6:end])
        self.kind = words[end + 1]


def take_apart(root: int) -> None:
    """Unmount what is not below `root`, which lies on "/" now while our own root is still the old one."""
    mine = mount_id(root)
    with open("/proc/self/mountinfo", "rb", 0) as table:        # can be read on when /proc is gone
        for mount in _outside(table.read(), mine):
            _try(_make_slave, mount.point)
        table.seek(0)
        mounts = _outside(table.read(), mine)
        # what lies in a mount that is shared still, because yet another one covers it, would go on the host as well
        shared = {mount.number for mount in mounts if mount.shared}
        kept = ["/", *(mount.point for mount in mounts if mount.parent in shared)]
        for mount in reversed(mounts):
            if not any(f"{point}/".startswith(f"{mount.point.rstrip('/')}/") for point in kept):
                _try(umount, mount.point)
        table.seek(0)
        for mount in _outside(table.read(), mine):
            if mount.kind in _NEVER_SEEN:
                _cover(mount.point)


def _make_slave(point: str) -> None:
    set_propagation(point, PROPAGATION["slave"], recursive=False)


def _try(call: Callable[[str], None], point: str) -> None:
    try:
        call(point)
    except KernelError:
        pass        # covered by another mount, gone with the one it was in, or not ours to change: see _cover()


def _outside(table: bytes, mine: int) -> list[_Mount]:
    """All mounts but number `mine` and those in it."""
    mounts = [_Mount(line) for line in table.splitlines()]
    inside, before = {b"%d" % mine}, 0
    while len(inside) > before:     # a mount may be listed before the one it is in
        before = len(inside)
        inside |= {mount.number for mount in mounts if mount.parent in inside}
    return [mount for mount in mounts if mount.number not in inside]


def _cover(point: str) -> None:
    try:
        target = os.open(point, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return                      # what it was in is covered already
    try:
        empty = new_filesystem("tmpfs", "tmpfs", [])
        try:
            move(empty, target)
        finally:
            os.close(empty)
    except KernelError as error:
        raise HvError(f"--no-pivot: {point} of the host can't be hidden: {os.strerror(error.errno)}") from None
    finally:
        os.close(target)
