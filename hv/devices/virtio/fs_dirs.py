"""Directories of a shared folder, read as the host's file system gives them.

Offsets are the host's own (getdents64), so they stay right while entries come and go, and a directory of any length
costs one buffer. READDIRPLUS looks every name up on the way: each entry counts as a lookup. Driven by
tests/unit/test_virtio_fs.py.
"""

from __future__ import annotations

__all__ = ["HANDLERS"]

import os
from ctypes import create_string_buffer
from errno import EINVAL, ENOTDIR
from stat import S_ISDIR
from struct import Struct

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_names import resolve
from hv.devices.virtio.fs_request import MOST_OFFSET, Request
from hv.linux.files import read_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_handles import Handle
    from hv.devices.virtio.fs_host import FileServer
    from hv.devices.virtio.fs_request import Handler

_LINUX_DIRENT64 = Struct("<QqHB")       # d_ino, d_off, d_reclen, d_type; d_name behind it (man 2 getdents64)
_BUFFER = 32 << 10
_U64 = (1 << 64) - 1
_DOTS = (b".", b"..")
_NO_ENTRY = bytes(fuse.ENTRY_BYTES)     # node 0: nothing is looked up


def _opendir(server: FileServer, request: Request) -> bytes:
    node = server.nodes.get(request.nodeid)
    if not S_ISDIR(node.kind):
        raise OSError(ENOTDIR, "not a directory")
    server.handles.check()
    fd = server.nodes.reopen(node, os.O_RDONLY | os.O_DIRECTORY)
    return fuse.OPEN_OUT.pack(server.handles.add(node, fd, os.O_RDONLY, True), 0, 0)


def _releasedir(server: FileServer, request: Request) -> bytes:
    number, _, _, _ = fuse.RELEASE_IN.unpack_from(request.body)
    server.handles.directory(number)
    server.handles.release(number)
    return b""


def _fsyncdir(server: FileServer, request: Request) -> bytes:
    number, _, _ = fuse.FSYNC_IN.unpack_from(request.body)
    os.fsync(server.handles.directory(number).fd)
    return b""


def _readdir(server: FileServer, request: Request) -> bytearray:
    return _list(server, request, plus=False)


def _readdirplus(server: FileServer, request: Request) -> bytearray:
    return _list(server, request, plus=True)


def _list(server: FileServer, request: Request, plus: bool) -> bytearray:
    number, offset, size, _, _, _, _ = fuse.READ_IN.unpack_from(request.body)
    handle = server.handles.directory(number)
    room = min(size, request.room)
    if offset != handle.position:
        if offset > MOST_OFFSET:
            raise OSError(EINVAL, "no such offset")
        handle.entries, handle.next = [], 0
        os.lseek(handle.fd, offset, os.SEEK_SET)
        handle.position = offset
    if plus:
        server.nodes.inside(handle.fd)
    head = fuse.ENTRY_BYTES if plus else 0
    reply = bytearray()
    while True:
        if handle.next == len(handle.entries) and not _refill(handle):
            return reply
        ino, following, kind, name = handle.entries[handle.next]
        length = fuse.DIRENT.size + len(name)
        padding = -length & 7
        if len(reply) + head + length + padding > room:
            return reply
        if name == b".." and handle.node is server.nodes.root:
            ino = handle.node.ino       # there is nothing above the share
        if plus:
            reply += _looked_up(server, handle, name)
        reply += fuse.DIRENT.pack(ino, following & _U64, len(name), kind)
        reply += name
        reply += bytes(padding)
        handle.next += 1
        handle.position = following & _U64


def _looked_up(server: FileServer, handle: Handle, name: bytes) -> bytes:
    if name in _DOTS:
        return _NO_ENTRY
    try:
        return resolve(server, handle.node, handle.fd, name)
    except OSError:             # gone, or a mount point: the guest will ask for it by itself
        return _NO_ENTRY


def _refill(handle: Handle) -> bool:
    """Read the next entries from the host. False at the end."""
    buffer = create_string_buffer(_BUFFER)
    end = read_directory(handle.fd, buffer)
    data = buffer.raw[:end]
    entries = []
    at = 0
    while at < end:
        ino, following, length, kind = _LINUX_DIRENT64.unpack_from(data, at)
        start = at + _LINUX_DIRENT64.size
        entries.append((ino, following, kind, data[start:data.index(b"\0", start)]))
        at += length
    handle.entries, handle.next = entries, 0
    return bool(entries)


HANDLERS: dict[int, Handler] = {
    fuse.OPENDIR: _opendir, fuse.RELEASEDIR: _releasedir, fuse.FSYNCDIR: _fsyncdir, fuse.READDIR: _readdir,
    fuse.READDIRPLUS: _readdirplus,
}
