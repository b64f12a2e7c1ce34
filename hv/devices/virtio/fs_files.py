"""Open files of a shared folder: read, write, holes, copies, sync. Data goes between the file and guest RAM, uncopied.

Only regular files are ever opened, through an O_PATH descriptor whose type is known: devices, FIFOs and sockets of a
shared folder are the guest's own business. Driven by tests/unit/test_virtio_fs.py.
"""

from __future__ import annotations

__all__ = ["HANDLERS", "host_flags", "opened"]

import os
import stat
from errno import EINVAL, EISDIR, ENXIO, EOPNOTSUPP, EROFS

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_locks import drop_owner, unlock_flock
from hv.devices.virtio.fs_request import MOST_OFFSET, Request
from hv.linux.files import fallocate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_host import FileServer
    from hv.devices.virtio.fs_inodes import Node
    from hv.devices.virtio.fs_request import Handler

# Of the guest's open flags these reach the host. O_APPEND does not: dirty pages of a mapping are written back through
# any descriptor, at their own offset; appending is asked for with each WRITE.
_FLAGS_PASSED = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
_VECTORS = 1024             # IOV_MAX
_COPY_MOST = 64 << 20       # of one COPY_FILE_RANGE: the guest asks again, others get a turn
# include/uapi/linux/falloc.h: KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
_FALLOCATE_MODES = 0x01 | 0x02 | 0x10
_SUID_SGID = stat.S_ISUID | stat.S_ISGID


def host_flags(server: FileServer, flags: int) -> int:
    """Open flags for the host. EROFS where they mean to write to a read-only share."""
    access = flags & os.O_ACCMODE
    if access == os.O_ACCMODE:
        raise OSError(EINVAL, "no such access mode")
    if server.readonly and (access != os.O_RDONLY or flags & os.O_TRUNC):
        raise OSError(EROFS, "a read-only share")
    return flags & _FLAGS_PASSED | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def opened(server: FileServer, node: Node, flags: int, open_flags: int) -> bytes:
    """Open `node`: a fuse_open_out. The guest keeps its cached pages where the file is what it was at the last time."""
    if not stat.S_ISREG(node.kind):
        raise OSError(EISDIR if stat.S_ISDIR(node.kind) else ENXIO, "not a regular file")
    server.handles.check()
    fd = server.nodes.reopen(node, host_flags(server, flags))
    if open_flags & fuse.OPEN_KILL_SUIDGID and flags & os.O_TRUNC:
        kill_suid(fd)
    status = os.stat(fd)
    stamp = status.st_mtime_ns, status.st_ctime_ns, status.st_size
    keep = fuse.FOPEN_KEEP_CACHE if node.stamp == stamp else 0
    node.stamp = stamp
    return fuse.OPEN_OUT.pack(server.handles.add(node, fd, flags), keep, 0)


def kill_suid(fd: int) -> None:
    """What writing by somebody without privileges does to a file's set-user-ID and set-group-ID bits."""
    mode = os.stat(fd).st_mode
    if mode & _SUID_SGID:
        # set-group-ID without group execution means mandatory locking and stays (man 2 write)
        killed = _SUID_SGID if mode & stat.S_IXGRP else stat.S_ISUID
        os.fchmod(fd, mode & 0o7777 & ~killed)


def _open(server: FileServer, request: Request) -> bytes:
    flags, open_flags = fuse.OPEN_IN.unpack_from(request.body)
    return opened(server, server.nodes.get(request.nodeid), flags, open_flags)


def _release(server: FileServer, request: Request) -> bytes:
    number, _, release_flags, _ = fuse.RELEASE_IN.unpack_from(request.body)
    handle = server.handles.file(number)
    if release_flags & fuse.RELEASE_FLOCK_UNLOCK:
        unlock_flock(server, handle)
    server.handles.release(number)
    return b""


def _flush(server: FileServer, request: Request) -> bytes:
    """A descriptor of the file was closed: its process loses its record locks, and learns of late write errors."""
    number, _, _, owner = fuse.FLUSH_IN.unpack_from(request.body)
    handle = server.handles.file(number)
    drop_owner(server, handle.node, owner)
    if handle.flags & os.O_ACCMODE != os.O_RDONLY:
        os.close(os.dup(handle.fd))     # network file systems tell of failed writes here
    return b""


def _offset(offset: int, length: int) -> int:
    if offset + length > MOST_OFFSET:
        raise OSError(EINVAL, "beyond any file")
    return offset


def _read(server: FileServer, request: Request) -> int:
    number, offset, size, _, _, _, _ = fuse.READ_IN.unpack_from(request.body)
    views = fitted(request.views, min(size, request.room))
    if not views:
        return 0
    return os.preadv(server.handles.file(number).fd, views, _offset(offset, size))


def fitted(views: list[memoryview], size: int) -> list[memoryview]:
    """As many of `views` as `size` bytes need, the last one cut."""
    taken = []
    for view in views[:_VECTORS]:
        if len(view) >= size:
            if size:
                taken.append(view[:size])
            break
        size -= len(view)
        taken.append(view)
    return taken


def _write(server: FileServer, request: Request) -> bytes:
    number, offset, size, write_flags, _, flags, _ = fuse.WRITE_IN.unpack_from(request.body)
    handle = server.handles.file(number)
    _offset(offset, size)
    views = fitted(request.data, size)
    if sum(map(len, views)) < size:
        raise OSError(EINVAL, "less data than announced")
    if not views:
        return fuse.WRITE_OUT.pack(0, 0)
    if write_flags & fuse.WRITE_KILL_SUIDGID:
        kill_suid(handle.fd)
    append = flags & os.O_APPEND and not write_flags & fuse.WRITE_CACHE
    return fuse.WRITE_OUT.pack(os.pwritev(handle.fd, views, offset, os.RWF_APPEND if append else 0), 0)


def _fsync(server: FileServer, request: Request) -> bytes:
    number, flags, _ = fuse.FSYNC_IN.unpack_from(request.body)
    fd = server.handles.file(number).fd
    if flags & fuse.FSYNC_FDATASYNC:
        os.fdatasync(fd)
    else:
        os.fsync(fd)
    return b""


def _lseek(server: FileServer, request: Request) -> bytes:
    number, offset, whence, _ = fuse.LSEEK_IN.unpack_from(request.body)
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):      # the guest does the others
        raise OSError(EINVAL, "no such whence")
    return fuse.LSEEK_OUT.pack(os.lseek(server.handles.file(number).fd, _offset(offset, 0), whence))


def _fallocate(server: FileServer, request: Request) -> bytes:
    number, offset, length, mode, _ = fuse.FALLOCATE_IN.unpack_from(request.body)
    if mode & ~_FALLOCATE_MODES:
        raise OSError(EOPNOTSUPP, "no such mode")
    fallocate(server.handles.file(number).fd, mode, _offset(offset, length), length)
    return b""


def _copy_file_range(server: FileServer, request: Request) -> bytes:
    source, offset_in, _, target, offset_out, length, flags = fuse.COPY_FILE_RANGE_IN.unpack_from(request.body)
    if flags:
        raise OSError(EINVAL, "no such flags")
    length = min(length, _COPY_MOST)
    copied = os.copy_file_range(server.handles.file(source).fd, server.handles.file(target).fd, length,
                                _offset(offset_in, length), _offset(offset_out, length))
    return fuse.WRITE_OUT.pack(copied, 0)


HANDLERS: dict[int, Handler] = {
    fuse.OPEN: _open, fuse.RELEASE: _release, fuse.FLUSH: _flush, fuse.READ: _read, fuse.WRITE: _write,
    fuse.FSYNC: _fsync, fuse.LSEEK: _lseek, fuse.FALLOCATE: _fallocate, fuse.COPY_FILE_RANGE: _copy_file_range,
}
