"""Operations on names in a shared folder: lookup, create, make, link, remove, rename, symbolic links.

Each is one *at() call with a directory's descriptor and one name, so nothing leads out of that directory; the host
follows no symbolic link, the guest gets its text. With root's rights new files belong to the guest's user. Device nodes
can't be made: they would be doors to the host's devices for the host's other users.

Driven by tests/unit/test_virtio_fs.py and tests/unit/test_virtio_fs_escape.py.
"""

from __future__ import annotations

__all__ = ["HANDLERS", "entry", "resolve"]

import os
import stat
from errno import EINVAL, ENOENT, EPERM

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_files import host_flags, opened
from hv.devices.virtio.fs_request import Request, attributes, checked_name, names
from hv.linux.credentials import ActingAs
from hv.linux.files import RENAME_EXCHANGE, RENAME_NOREPLACE, open_beneath, rename

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.fs_host import FileServer
    from hv.devices.virtio.fs_inodes import Node
    from hv.devices.virtio.fs_request import Handler

_MAKEABLE = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)
_LINK_MOST = 4095           # PATH_MAX without its zero
_PERMISSIONS = 0o7777


def resolve(server: FileServer, parent: Node, directory: int, name: bytes) -> bytes:
    """Look `name` up in `parent`, open as `directory`: a fuse_entry_out, counted as a lookup."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if status.st_dev != parent.dev and server.nodes.crossings is None:
        os.close(open_beneath(name, directory))     # EXDEV where something is mounted there
    return entry(server, server.nodes.enter(parent, name, status), status)


def entry(server: FileServer, node: Node, status: os.stat_result) -> bytes:
    """A fuse_entry_out for `node`."""
    seconds, nanoseconds = server.valid
    return fuse.ENTRY_OUT.pack(node.nodeid, 0, seconds, seconds, nanoseconds, nanoseconds) + attributes(status)


def _lookup(server: FileServer, request: Request) -> bytes:
    name = checked_name(names(request.body, 0, 1)[0])
    parent = server.nodes.get(request.nodeid)
    try:
        return resolve(server, parent, server.nodes.fd(parent), name)
    except FileNotFoundError:
        if not server.timeout:
            raise
        seconds, nanoseconds = server.valid         # node 0: that there is none is remembered as long
        return fuse.ENTRY_OUT.pack(0, 0, seconds, 0, nanoseconds, 0) + bytes(fuse.ATTR.size)


def _make(server: FileServer, request: Request, name: bytes, mode: int | None,
          call: Callable[[int], int | None]) -> tuple[Node, os.stat_result]:
    """Have `call(directory)` make `name`, with exactly `mode`; what was made. It may return a descriptor of it."""
    checked_name(name)
    parent = server.nodes.get(request.nodeid)
    directory = server.nodes.fd(parent)
    if server.own is None or mode is None or (request.uid, request.gid) == server.own:
        fd = call(directory)
    else:
        with ActingAs(request.uid, request.gid):
            fd = call(directory)
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False) if fd is None else os.stat(fd)
        node = server.nodes.enter(parent, name, status)
        if mode is not None and not stat.S_ISLNK(status.st_mode):
            # The guest has applied its umask; undo what ours took away. Directories hand S_ISGID down.
            wanted = mode & _PERMISSIONS | status.st_mode & stat.S_ISGID
            if status.st_mode & _PERMISSIONS != wanted:
                os.chmod(server.nodes.path(node) if fd is None else fd, wanted)
                status = server.nodes.stat(node) if fd is None else os.stat(fd)
    except OSError:
        if fd is not None:
            os.close(fd)
        raise
    return node, status


def _mknod(server: FileServer, request: Request) -> bytes:
    mode, _, _, _ = fuse.MKNOD_IN.unpack_from(request.body)
    (name,) = names(request.body, fuse.MKNOD_IN.size, 1)
    kind = stat.S_IFMT(mode) or stat.S_IFREG
    if kind not in _MAKEABLE:
        raise OSError(EPERM, "no device nodes")
    return entry(server, *_make(server, request, name, mode, lambda directory: os.mknod(
        name, kind | mode & _PERMISSIONS, dir_fd=directory)))


def _mkdir(server: FileServer, request: Request) -> bytes:
    mode, _ = fuse.MKDIR_IN.unpack_from(request.body)
    (name,) = names(request.body, fuse.MKDIR_IN.size, 1)
    return entry(server, *_make(server, request, name, mode, lambda directory: os.mkdir(
        name, mode & _PERMISSIONS, dir_fd=directory)))


def _symlink(server: FileServer, request: Request) -> bytes:
    name, target = names(request.body, 0, 2)
    if not 0 < len(target) <= _LINK_MOST:
        raise OSError(ENOENT, "an empty or too long symbolic link")
    return entry(server, *_make(server, request, name, 0, lambda directory: os.symlink(
        target, name, dir_fd=directory)))


def _create(server: FileServer, request: Request) -> bytes:
    flags, mode, _, open_flags = fuse.CREATE_IN.unpack_from(request.body)
    (name,) = names(request.body, fuse.CREATE_IN.size, 1)
    server.handles.check()
    made: list[int] = []

    def create(directory: int) -> int:
        # Always O_EXCL: what is there already is looked at before it is opened, it may be a FIFO or a device.
        made.append(os.open(name, host_flags(server, flags) & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW,
                            mode & _PERMISSIONS, dir_fd=directory))
        return made[0]

    try:
        node, status = _make(server, request, name, mode, create)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        parent = server.nodes.get(request.nodeid)
        status = os.stat(name, dir_fd=server.nodes.fd(parent), follow_symlinks=False)
        node = server.nodes.enter(parent, name, status)
        try:
            found = opened(server, node, flags, open_flags)
            return entry(server, node, server.nodes.stat(node)) + found
        except OSError:
            server.nodes.forget(node.nodeid, 1)
            raise
    return entry(server, node, status) + fuse.OPEN_OUT.pack(server.handles.add(node, made[0], flags), 0, 0)


def _link(server: FileServer, request: Request) -> bytes:
    (old,) = fuse.LINK_IN.unpack_from(request.body)
    (name,) = names(request.body, fuse.LINK_IN.size, 1)
    source = server.nodes.path(server.nodes.get(old))
    return entry(server, *_make(server, request, name, None, lambda directory: os.link(
        source, name, dst_dir_fd=directory)))


def _readlink(server: FileServer, request: Request) -> bytes:
    node = server.nodes.get(request.nodeid)
    if not stat.S_ISLNK(node.kind):
        raise OSError(EINVAL, "no symbolic link")
    return os.readlink(b"", dir_fd=server.nodes.fd(node))


def _remove(server: FileServer, request: Request, call: Callable[..., None]) -> bytes:
    name = checked_name(names(request.body, 0, 1)[0])
    parent = server.nodes.get(request.nodeid)
    directory = server.nodes.fd(parent)
    node = _known(server, parent, directory, name)
    if node is not None:
        server.nodes.keep(node)
    try:
        call(name, dir_fd=directory)
    except OSError:
        if node is not None:
            server.nodes.place(node, parent, name)
        raise
    if node is not None:
        server.nodes.lost(node, parent, name)
    return b""


def _known(server: FileServer, parent: Node, directory: int, name: bytes) -> Node | None:
    """The node of what has that name now, if the guest knows it."""
    try:
        return server.nodes.find(parent, name, os.stat(name, dir_fd=directory, follow_symlinks=False))
    except OSError:
        return None


def _unlink(server: FileServer, request: Request) -> bytes:
    return _remove(server, request, os.unlink)


def _rmdir(server: FileServer, request: Request) -> bytes:
    return _remove(server, request, os.rmdir)


def _rename(server: FileServer, request: Request) -> bytes:
    (new_parent,) = fuse.RENAME_IN.unpack_from(request.body)
    return _move(server, request, new_parent, fuse.RENAME_IN.size, 0)


def _rename2(server: FileServer, request: Request) -> bytes:
    new_parent, flags, _ = fuse.RENAME2_IN.unpack_from(request.body)
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
        raise OSError(EINVAL, "no such way to rename")      # RENAME_WHITEOUT makes a device node
    return _move(server, request, new_parent, fuse.RENAME2_IN.size, flags)


def _move(server: FileServer, request: Request, new_parent: int, at: int, flags: int) -> bytes:
    nodes = server.nodes
    old, new = map(checked_name, names(request.body, at, 2))
    source, target = nodes.get(request.nodeid), nodes.get(new_parent)
    source_fd, target_fd = nodes.fd(source), nodes.fd(target)
    moved, replaced = _known(server, source, source_fd, old), _known(server, target, target_fd, new)
    if replaced is not None and replaced is not moved:
        nodes.keep(replaced)
    try:
        rename(source_fd, old, target_fd, new, flags)
    except OSError:
        if replaced is not None:
            nodes.place(replaced, target, new)
        raise
    if replaced is not None and replaced is not moved:
        nodes.lost(replaced, target, new)
        if flags & RENAME_EXCHANGE:
            nodes.place(replaced, source, old)
    if moved is not None and moved is not replaced:
        nodes.place(moved, target, new)
    return b""


HANDLERS: dict[int, Handler] = {
    fuse.LOOKUP: _lookup, fuse.MKNOD: _mknod, fuse.MKDIR: _mkdir, fuse.SYMLINK: _symlink, fuse.CREATE: _create,
    fuse.LINK: _link, fuse.READLINK: _readlink, fuse.UNLINK: _unlink, fuse.RMDIR: _rmdir, fuse.RENAME: _rename,
    fuse.RENAME2: _rename2,
}
