"""Locks that the guest's processes take on files of a shared folder, so that host and other guests honour them.

A record lock belongs to a process in the guest (`owner`); here each owner of locks on an inode has a descriptor of its
own, and its locks are that descriptor's (F_OFD_SETLK, man 2 fcntl), until the process closes any descriptor of the
file: FLUSH. A flock belongs to an open file, which has its own descriptor already. A lock that must wait is tried again
when one of this guest's is given up, and twenty times a second for those of others; the thread never waits. Left out:
the host can't see deadlocks between such locks. Driven by tests/unit/test_virtio_fs_locks.py.
"""

from __future__ import annotations

__all__ = ["HANDLERS", "Locks", "drop_owner", "unlock_flock"]

import os
from errno import EACCES, EAGAIN, EINTR, EINVAL, EIO, ENOLCK, EPERM, EROFS, ETXTBSY
from fcntl import F_RDLCK, F_UNLCK, F_WRLCK, LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, fcntl, flock
from struct import Struct

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_request import LATER, MOST_OFFSET, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_handles import Handle
    from hv.devices.virtio.fs_host import FileServer
    from hv.devices.virtio.fs_inodes import Node
    from hv.devices.virtio.fs_request import Handler

# include/uapi/asm-generic/fcntl.h; Python names them from 3.14 on
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = Struct("@hhxxxxqqixxxx")       # l_type, l_whence, l_start, l_len, l_pid
MOST_OWNERS = 1024
MOST_WAITING = 256              # the queue must have room left for the requests that end the wait
_READ_ONLY = (EACCES, EPERM, EROFS, ETXTBSY)     # EROFS: a read-only mount in the share; ETXTBSY: a program that runs
_HOW = {F_RDLCK: LOCK_SH, F_WRLCK: LOCK_EX, F_UNLCK: LOCK_UN}


class Locks:
    """Who holds record locks, and which requests wait for one."""

    def __init__(self) -> None:
        self.owners: dict[tuple[Node, int], tuple[int, int]] = {}      # -> descriptor, process
        self.waiting: list[Request] = []
        self.done: list[tuple[Request, int]] = []       # no longer waiting, with the error number for the reply
        self.released = False           # whether a lock was given up since the last retry

    def retry(self, server: FileServer) -> None:
        """Try again for those that wait."""
        self.released = False
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            try:
                _take(server, request)
            except OSError as error:
                if error.errno == EAGAIN:
                    self.waiting.append(request)
                else:
                    self.done.append((request, error.errno or EIO))
            else:
                self.done.append((request, 0))

    def interrupt(self, unique: int) -> None:
        """The guest no longer wants to wait."""
        for request in self.waiting:
            if request.unique == unique:
                self.waiting.remove(request)
                self.done.append((request, EINTR))
                return

    def clear(self) -> None:
        """All locks go; who waits gets an error."""
        for fd, _ in self.owners.values():
            os.close(fd)
        self.owners.clear()
        self.done += [(request, EIO) for request in self.waiting]
        self.waiting.clear()


def drop_owner(server: FileServer, node: Node, owner: int) -> None:
    """All record locks of `owner` on `node` go."""
    held = server.locks.owners.pop((node, owner), None)
    if held is not None:
        os.close(held[0])
        server.locks.released = True


def unlock_flock(server: FileServer, handle: Handle) -> None:
    """The flock of an open file goes."""
    flock(handle.fd, LOCK_UN)
    server.locks.released = True


def _range(start: int, end: int) -> tuple[int, int]:
    """l_start and l_len; a length of 0 is to the end of the file."""
    if start > end or start > MOST_OFFSET:
        raise OSError(EINVAL, "no such range")
    return start, 0 if end >= MOST_OFFSET else end - start + 1


def _take(server: FileServer, request: Request) -> None:
    """Take or give up the lock that `request` asks for. OSError EAGAIN where it is held."""
    number, owner, start, end, kind, pid, flags, _ = fuse.LK_IN.unpack_from(request.body)
    handle = server.handles.file(number)
    if kind not in _HOW:
        raise OSError(EINVAL, "no such lock")
    if flags & fuse.LK_FLOCK:
        flock(handle.fd, _HOW[kind] | LOCK_NB)
    else:
        where = _range(start, end)
        held = server.locks.owners.get((handle.node, owner))
        if held is None:
            if kind == F_UNLCK:
                return
            if len(server.locks.owners) >= MOST_OWNERS:
                raise OSError(ENOLCK, "too many owners of locks")
            held = _descriptor(server, handle.node), pid
            server.locks.owners[handle.node, owner] = held
        fcntl(held[0], _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, *where, 0))
    if kind != F_WRLCK:             # given up, or weakened
        server.locks.released = True


def _descriptor(server: FileServer, node: Node) -> int:
    """A descriptor of its own, for reading and writing if possible: each sort of lock needs one."""
    if not server.readonly:
        try:
            return server.nodes.reopen(node, os.O_RDWR)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
    return server.nodes.reopen(node, os.O_RDONLY)


def _setlk(server: FileServer, request: Request) -> bytes:
    _take(server, request)
    return b""


def _setlkw(server: FileServer, request: Request) -> bytes | None:
    try:
        _take(server, request)
    except OSError as error:
        if error.errno != EAGAIN:
            raise
        if len(server.locks.waiting) >= MOST_WAITING:
            raise OSError(ENOLCK, "too many processes wait") from None
        server.locks.waiting.append(request)
        return LATER
    return b""


def _getlk(server: FileServer, request: Request) -> bytes:
    number, owner, start, end, kind, _, _, _ = fuse.LK_IN.unpack_from(request.body)
    node = server.handles.file(number).node
    if kind not in (F_RDLCK, F_WRLCK):
        raise OSError(EINVAL, "no such lock")
    wanted = _FLOCK.pack(kind, os.SEEK_SET, *_range(start, end), 0)
    held = server.locks.owners.get((node, owner))
    fd = held[0] if held else _descriptor(server, node)
    try:
        kind, _, start, length, _ = _FLOCK.unpack(fcntl(fd, _F_OFD_GETLK, wanted))
    finally:
        if not held:
            os.close(fd)
    if kind == F_UNLCK:
        return fuse.LK_OUT.pack(0, 0, F_UNLCK, 0)
    # The host does not tell whose it is. Where one other process here has locks, it is that one's, or the host's.
    others = [pid for (other, who), (_, pid) in server.locks.owners.items() if other is node and who != owner]
    return fuse.LK_OUT.pack(start, start + length - 1 if length else MOST_OFFSET, kind,
                            others[0] if len(others) == 1 else 0)


def _interrupt(server: FileServer, request: Request) -> bytes:
    server.locks.interrupt(*fuse.INTERRUPT_IN.unpack_from(request.body))
    return b""


HANDLERS: dict[int, Handler] = {
    fuse.GETLK: _getlk, fuse.SETLK: _setlk, fuse.SETLKW: _setlkw, fuse.INTERRUPT: _interrupt,
}
