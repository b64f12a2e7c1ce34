"""Numbered places beside a file, each held by one process (or machine) at a time: open file description locks.

The kernel gives a place back when its holder ends, whatever way (man 2 fcntl, F_OFD_SETLK). The file that carries the
locks goes with the last holder that leaves in order. Driven by tests/unit/test_virtio_net_pair.py.
"""

from __future__ import annotations

__all__ = ["leave_slot", "take_slot"]

import os
from fcntl import F_OFD_SETLK, F_WRLCK, fcntl
from struct import pack


def _lock(fd: int, number: int) -> bool:
    try:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for this kind of lock)
        fcntl(fd, F_OFD_SETLK, pack("hhqqi4x", F_WRLCK, os.SEEK_SET, number, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def take_slot(path: str, count: int) -> tuple[int, int]:
    """(descriptor, number) of the first free one of `count` places; (-1, -1) where none is. OSError: no such folder."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        number = next((number for number in range(count) if _lock(fd, number)), -1)
        if number >= 0 and _is(fd, path):
            return fd, number
        os.close(fd)
        if number < 0:
            return -1, -1
        # else the last holder has just left and taken the file with it


def _is(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def leave_slot(fd: int, path: str, count: int, mine: int) -> None:
    """Give the place back; the last one to leave removes the file."""
    if all(_lock(fd, number) for number in range(count) if number != mine):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
    os.close(fd)
