"""Attributes and extended attributes of a shared folder's files.

Descriptors here are O_PATH ones, which fchmod(2) and its like refuse; /proc/self/fd/N leads such calls to the inode
itself, a symbolic link included. Of extended attributes the guest has `user.*`, and `security.capability`, without
which programs lose their capabilities; `trusted.*` and other `security.*` mean something to the host, `system.*` are
ACLs, which are not served. Driven by tests/unit/test_virtio_fs_attrs.py.
"""

from __future__ import annotations

__all__ = ["HANDLERS"]

import os
import stat
from errno import EINVAL, EISDIR, ENODATA, EOPNOTSUPP, ERANGE

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_files import kill_suid
from hv.devices.virtio.fs_request import MOST_OFFSET, Request, attributes, names
from hv.linux.files import OMIT, set_times

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_host import FileServer
    from hv.devices.virtio.fs_inodes import Node
    from hv.devices.virtio.fs_request import Handler

_UNCHANGED = -1             # chown(2)
_NOW = (1 << 30) - 1        # UTIME_NOW (man 2 utimensat)
_VALUE_MOST = 64 << 10      # XATTR_SIZE_MAX, XATTR_LIST_MAX (include/uapi/linux/limits.h)
_TIMES = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW


def _reply(server: FileServer, status: os.stat_result) -> bytes:
    return fuse.ATTR_OUT.pack(*server.valid, 0) + attributes(status)


def _getattr(server: FileServer, request: Request) -> bytes:
    flags, _, number = fuse.GETATTR_IN.unpack_from(request.body)
    node = server.nodes.get(request.nodeid)
    handle = server.handles.by_number.get(number) if flags & fuse.GETATTR_FH else None
    if handle is not None and handle.node is node:
        return _reply(server, os.stat(handle.fd))
    return _reply(server, server.nodes.stat(node))


def _setattr(server: FileServer, request: Request) -> bytes:
    (valid, _, number, size, _, accessed, modified, _, accessed_ns, modified_ns, _, mode, _, uid, gid,
     _) = fuse.SETATTR_IN.unpack_from(request.body)
    node = server.nodes.get(request.nodeid)
    path = server.nodes.path(node)
    if valid & fuse.FATTR_MODE:
        if stat.S_ISLNK(node.kind):
            raise OSError(EOPNOTSUPP, "symbolic links have no mode")
        os.chmod(path, mode & 0o7777)
    if valid & (fuse.FATTR_UID | fuse.FATTR_GID):
        os.chown(path, uid if valid & fuse.FATTR_UID else _UNCHANGED, gid if valid & fuse.FATTR_GID else _UNCHANGED)
    if valid & fuse.FATTR_SIZE:
        _truncate(server, node, path, size, number if valid & fuse.FATTR_FH else 0,
                  bool(valid & fuse.FATTR_KILL_SUIDGID))
    if valid & _TIMES:
        set_times(path, _time(valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, accessed, accessed_ns),
                  _time(valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, modified, modified_ns))
    return _reply(server, server.nodes.stat(node))


def _truncate(server: FileServer, node: Node, path: bytes, size: int, number: int, kill: bool) -> None:
    if not stat.S_ISREG(node.kind):
        raise OSError(EISDIR if stat.S_ISDIR(node.kind) else EINVAL, "not a regular file")
    if size > MOST_OFFSET:
        raise OSError(EINVAL, "larger than any file")
    handle = server.handles.by_number.get(number)
    if handle is not None and handle.node is node and handle.flags & os.O_ACCMODE != os.O_RDONLY:
        os.ftruncate(handle.fd, size)
        if kill:
            kill_suid(handle.fd)
        return
    fd = server.nodes.reopen(node, os.O_WRONLY)
    try:
        os.ftruncate(fd, size)
        if kill:
            kill_suid(fd)
    finally:
        os.close(fd)


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> tuple[int, int]:
    if valid & now:
        return 0, _NOW
    if not valid & given:
        return 0, OMIT
    if nanoseconds >= 10**9:
        raise OSError(EINVAL, "no such time")
    return seconds - (seconds >> 63 << 64), nanoseconds     # signed on the host


def _attribute(raw: bytes) -> bytes:
    """The attribute's name, if the guest may have it."""
    if raw.startswith(b"user.") or raw == b"security.capability":
        return raw
    raise OSError(EOPNOTSUPP, "not for guests")


def _setxattr(server: FileServer, request: Request) -> bytes:
    size, flags = fuse.SETXATTR_IN.unpack_from(request.body)
    (raw,) = names(request.body, fuse.SETXATTR_IN.size, 1)
    start = fuse.SETXATTR_IN.size + len(raw) + 1
    value = request.body[start:start + size]
    if len(value) < size or size > _VALUE_MOST or flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
        raise OSError(EINVAL, "no such value")
    os.setxattr(server.nodes.path(server.nodes.get(request.nodeid)), _attribute(raw), value, flags)
    return b""


def _getxattr(server: FileServer, request: Request) -> bytes:
    size, _ = fuse.GETXATTR_IN.unpack_from(request.body)
    name = _attribute(names(request.body, fuse.GETXATTR_IN.size, 1)[0])
    node = server.nodes.get(request.nodeid)
    if name.startswith(b"user.") and not (stat.S_ISREG(node.kind) or stat.S_ISDIR(node.kind)):
        raise OSError(ENODATA, "no such attribute")     # man 7 xattr: only files and directories have them
    return _sized(os.getxattr(server.nodes.path(node), name), size)


def _listxattr(server: FileServer, request: Request) -> bytes:
    size, _ = fuse.GETXATTR_IN.unpack_from(request.body)
    found = map(os.fsencode, os.listxattr(server.nodes.path(server.nodes.get(request.nodeid))))
    return _sized(b"".join(name + b"\0" for name in found
                           if name.startswith(b"user.") or name == b"security.capability"), size)


def _sized(value: bytes, size: int) -> bytes:
    """The value, or its length where the guest asked with a size of 0."""
    if not size:
        return fuse.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(ERANGE, "longer than asked for")
    return value


def _removexattr(server: FileServer, request: Request) -> bytes:
    name = _attribute(names(request.body, 0, 1)[0])
    os.removexattr(server.nodes.path(server.nodes.get(request.nodeid)), name)
    return b""


HANDLERS: dict[int, Handler] = {
    fuse.GETATTR: _getattr, fuse.SETATTR: _setattr, fuse.SETXATTR: _setxattr, fuse.GETXATTR: _getxattr,
    fuse.LISTXATTR: _listxattr, fuse.REMOVEXATTR: _removexattr,
}
