"""The file server behind a shared folder: one FUSE session, from INIT to DESTROY, and the table of its operations.

    fs.py        the virtio device: queues, headers
    fs_host.py   this: sessions, dispatch, forgetting
    fs_names.py  operations on names: lookup, create, link, unlink, rename
    fs_attrs.py  attributes and extended attributes
    fs_files.py  open files: read, write, holes, copies
    fs_dirs.py   directories
    fs_locks.py  record locks and flock
    fs_inodes.py, fs_handles.py   what node ids and file handles stand for

A handler takes the server and a request and returns the reply's payload, or how many bytes it put into the guest's
buffers itself, or LATER; a failure is an OSError, whose number the guest gets. Unknown operations are ENOSYS, which
makes Linux do without. Left out on purpose: write-back cache, DAX, POSIX ACLs, ioctl, poll, O_TMPFILE, security
contexts. Driven by tests/unit/test_virtio_fs.py.
"""

from __future__ import annotations

__all__ = ["LATER", "NO_REPLY", "FileServer", "Request"]

import os
from errno import EINVAL, EIO, EMFILE, ENFILE, ENOSYS, EPROTO, EROFS
from struct import error as StructError

from hv.devices.virtio import fs_attrs, fs_dirs, fs_files, fs_locks, fs_names, fuse
from hv.devices.virtio.fs_handles import Handles
from hv.devices.virtio.fs_inodes import Nodes
from hv.devices.virtio.fs_request import LATER, Request
from hv.linux.files import sync_filesystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_mounts import Crossings
    from hv.devices.virtio.fs_request import Handler, Reply

MAX_WRITE = 1 << 20             # bytes in one WRITE or READ
MAX_PAGES = MAX_WRITE >> 12     # Linux takes no more (FUSE_MAX_MAX_PAGES)
BACKGROUND = 64                 # requests of read-ahead and the like in flight; Linux slows down from 3/4 on
WANTED = (fuse.ASYNC_READ | fuse.POSIX_LOCKS | fuse.FLOCK_LOCKS | fuse.ATOMIC_O_TRUNC | fuse.BIG_WRITES
          | fuse.AUTO_INVAL_DATA | fuse.DO_READDIRPLUS | fuse.READDIRPLUS_AUTO | fuse.ASYNC_DIO
          | fuse.PARALLEL_DIROPS | fuse.MAX_PAGES | fuse.CACHE_SYMLINKS | fuse.HANDLE_KILLPRIV_V2)

NO_REPLY = frozenset((fuse.FORGET, fuse.BATCH_FORGET, fuse.INTERRUPT))
# What a read-only share refuses; OPEN looks at its flags.
CHANGING = frozenset((fuse.SETATTR, fuse.SYMLINK, fuse.MKNOD, fuse.MKDIR, fuse.UNLINK, fuse.RMDIR, fuse.RENAME,
                      fuse.RENAME2, fuse.LINK, fuse.WRITE, fuse.SETXATTR, fuse.REMOVEXATTR, fuse.CREATE,
                      fuse.FALLOCATE, fuse.COPY_FILE_RANGE))


class FileServer:
    """Serves the folder `root_fd`, an O_PATH descriptor that it takes over.

    `timeout` is for how many seconds the guest may trust names and attributes without asking; `own` is our (user,
    group), which new files have by themselves, or None where they can't have others, because pyhv is not root;
    `nodes` and `handles` bound the descriptors in use; `crossings` is for Nodes.
    """

    def __init__(self, root_fd: int, *, readonly: bool, timeout: float, own: tuple[int, int] | None, nodes: int,
                 handles: int, crossings: Crossings | None = None) -> None:
        self.nodes = Nodes(root_fd, nodes, crossings)
        self.handles = Handles(handles)
        self.locks = fs_locks.Locks()
        self.readonly = readonly
        self.own = own
        self.set_timeout(timeout)
        self.started = False            # whether there was an INIT
        self.faults: list[str] = []     # what the guest did that no guest should; the device counts it

    def set_timeout(self, timeout: float) -> None:
        """Change for how long the guest may trust what it is told from now on."""
        self.timeout = timeout
        self.valid = int(timeout), int(timeout * 1e9) % 10**9

    def answer(self, request: Request) -> tuple[int, Reply]:
        """(error number or 0, payload) for one request; it may be LATER, for a lock that others hold."""
        handler = HANDLERS.get(request.opcode)
        if handler is None:
            return ENOSYS, b""
        if not self.started and request.opcode != fuse.INIT:
            return EIO, b""
        if self.readonly and request.opcode in CHANGING:
            return EROFS, b""
        if self.nodes.crowded():
            self.nodes.trim()
        try:
            return 0, handler(self, request)
        except OSError as error:
            if error.errno not in (EMFILE, ENFILE):
                return error.errno or EIO, b""
        except (StructError, ValueError, OverflowError):
            return EINVAL, b""
        # The host has no descriptor left; nothing was done yet. Those that are only kept for speed go.
        self.nodes.trim(0)
        try:
            return 0, handler(self, request)
        except OSError as error:
            return ENFILE if error.errno == EMFILE else error.errno or EIO, b""

    def end(self) -> None:
        """The session is over: close all files, forget all nodes."""
        self.locks.clear()
        self.handles.clear()
        self.nodes.clear()
        self.started = False

    def close(self) -> None:
        """Give everything back."""
        self.end()
        self.nodes.close()


def _init(server: FileServer, request: Request) -> bytes:
    major, minor, readahead, flags = fuse.INIT_IN.unpack_from(request.body)
    if major > fuse.MAJOR:      # say which we speak; the guest asks again
        return fuse.INIT_OUT.pack(fuse.MAJOR, fuse.MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    if major < fuse.MAJOR or minor < fuse.OLDEST_MINOR:
        raise OSError(EPROTO, f"FUSE {major}.{minor}")
    server.end()
    server.started = True
    return fuse.INIT_OUT.pack(fuse.MAJOR, fuse.MINOR, readahead, flags & WANTED, BACKGROUND, BACKGROUND * 3 // 4,
                              MAX_WRITE, 1, MAX_PAGES, 0, 0)


def _destroy(server: FileServer, request: Request) -> bytes:
    server.end()
    return b""


def _forget(server: FileServer, request: Request) -> bytes:
    (count,) = fuse.FORGET_IN.unpack_from(request.body)
    if not server.nodes.forget(request.nodeid, count):
        server.faults.append(f"node {request.nodeid} forgotten {count} times")
    return b""


def _batch_forget(server: FileServer, request: Request) -> bytes:
    count, _ = fuse.BATCH_FORGET_IN.unpack_from(request.body)
    records = memoryview(request.body)[fuse.BATCH_FORGET_IN.size:]
    for nodeid, times in fuse.FORGET_ONE.iter_unpack(records[:len(records) // 16 * 16][:16 * count]):
        if not server.nodes.forget(nodeid, times):
            server.faults.append(f"node {nodeid} forgotten {times} times")
    return b""


def _statfs(server: FileServer, request: Request) -> bytes:
    nodes = server.nodes
    of = os.fstatvfs(nodes.root.fd if nodes.crossings is None else nodes.fd(nodes.get(request.nodeid)))
    return fuse.STATFS_OUT.pack(of.f_blocks, of.f_bfree, of.f_bavail, of.f_files, of.f_ffree, of.f_bsize & 0xFFFFFFFF,
                                of.f_namemax, of.f_frsize & 0xFFFFFFFF)


def _syncfs(server: FileServer, request: Request) -> bytes:
    fd = server.nodes.reopen(server.nodes.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_filesystem(fd)
    finally:
        os.close(fd)
    return b""


HANDLERS: dict[int, Handler] = {
    fuse.INIT: _init, fuse.DESTROY: _destroy, fuse.FORGET: _forget, fuse.BATCH_FORGET: _batch_forget,
    fuse.STATFS: _statfs, fuse.SYNCFS: _syncfs,
    **fs_names.HANDLERS, **fs_attrs.HANDLERS, **fs_files.HANDLERS, **fs_dirs.HANDLERS, **fs_locks.HANDLERS,
}
