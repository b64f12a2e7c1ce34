"""Files and directories that a guest has open: descriptors by the numbers it got.

Driven by tests/unit/test_virtio_fs.py.
"""

from __future__ import annotations

__all__ = ["Handle", "Handles"]

import os
from errno import EBADF, ENFILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_inodes import Node

    Entry = tuple[int, int, int, bytes]     # inode, offset of the next, type, name


class Handle:
    """One open file; or one open directory, with entries read from the host but not yet asked for."""

    __slots__ = ("directory", "entries", "fd", "flags", "next", "node", "position")

    def __init__(self, node: Node, fd: int, flags: int, directory: bool) -> None:
        self.node = node
        self.fd = fd
        self.flags = flags
        self.directory = directory
        self.entries: list[Entry] = []
        self.next = 0               # index of the first one not yet given
        self.position = 0           # its offset, as the guest knows it


class Handles:
    """All open files of one guest, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.by_number: dict[int, Handle] = {}
        self.next_number = 1

    def check(self) -> None:
        """ENFILE where no more can be opened."""
        if len(self.by_number) >= self.limit:
            raise OSError(ENFILE, "too many open files")

    def add(self, node: Node, fd: int, flags: int, directory: bool = False) -> int:
        """Take `fd` over; its number."""
        number = self.next_number
        self.next_number = number + 1
        self.put(number, Handle(node, fd, flags, directory))
        return number

    def put(self, number: int, handle: Handle) -> None:
        """A handle under a number that is known already."""
        self.by_number[number] = handle
        handle.node.handles.append(handle)

    def file(self, number: int) -> Handle:
        """The open file of that number, else EBADF."""
        handle = self.by_number.get(number)
        if handle is None or handle.directory:
            raise OSError(EBADF, "no such open file")
        return handle

    def directory(self, number: int) -> Handle:
        """The open directory of that number, else EBADF."""
        handle = self.by_number.get(number)
        if handle is None or not handle.directory:
            raise OSError(EBADF, "no such open directory")
        return handle

    def release(self, number: int) -> None:
        """Close it."""
        handle = self.by_number.pop(number)
        handle.node.handles.remove(handle)
        os.close(handle.fd)

    def clear(self) -> None:
        """Close all."""
        for number in [*self.by_number]:
            self.release(number)
