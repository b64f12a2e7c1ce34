"""Where a shared folder has mounts inside it, for a share that crosses them (`submounts`).

A mount point is a name in a directory of one mount that leads to the root of another (man 5 proc_pid_mountinfo). The
table is made once, when the share is: what is mounted later is reached too where its device is another than that of
the directory; a directory that is bound in a second time then, is one with itself. Driven by
tests/unit/test_virtio_fs_mounts.py.
"""

from __future__ import annotations

__all__ = ["Crossings", "crossings_below"]

import os

from hv.linux.mount import unescape

# (mount, device and inode of a directory, a name in it) -> the mount that begins there; 0 is the folder's own
Crossings = dict[tuple[int, int, int, bytes], int]

_POINT = 4                  # the field of mountinfo with the mount point


def crossings_below(root_fd: int) -> Crossings:
    """Those inside the directory `root_fd`, in this process's mount namespace."""
    root = os.readlink(f"/proc/self/fd/{root_fd}")
    inside = root.rstrip("/") + "/"
    with open("/proc/thread-self/mountinfo", "rb", 0) as table:
        points = {unescape(line.split()[_POINT]) for line in table.read().splitlines()}
    numbers: dict[str, int] = {root: 0}         # a mount's point -> its number
    found: Crossings = {}
    for point in sorted(point for point in points if point.startswith(inside)):
        parent, _, name = point.rpartition("/")
        parent = parent or "/"
        try:
            status = os.stat(parent)
        except OSError:
            continue            # covered by another mount
        numbers[point] = len(numbers)
        found[_mount_of(parent, numbers), status.st_dev, status.st_ino, os.fsencode(name)] = numbers[point]
    return found


def _mount_of(path: str, numbers: dict[str, int]) -> int:
    while path not in numbers:
        path = path.rpartition("/")[0] or "/"
    return numbers[path]
