"""A folder's content copied into another one, with everything that a file system keeps of it: volumes' first content.

The source is what an image holds, so nothing is followed: each folder is opened by openat2(2) within its tree, and each
file without following links. Owners, modes, times, xattrs, holes, hard links are kept; sockets are left out; devices
too, without root's rights. Driven by tests/unit/test_image_volumes.py.
"""

from __future__ import annotations

__all__ = ["copy_tree", "open_folder"]

import os
import stat
from errno import EINVAL, ENOTSUP, EPERM
from functools import partial

from hv.errors import ImageError
from hv.linux.mount import open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def open_folder(root_fd: int, path: str) -> int:
    """A descriptor of the folder at `path` with `root_fd` as root; -1 where there is none."""
    return max(int(open_in(root_fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, may=range(1, 4096))), -1)


def copy_tree(source: int, target: int) -> None:
    """Copy what is in the folder open as `source`, and its own attributes, to the one open as `target`. OSError."""
    folders, waiting = [""], [""]
    links: dict[tuple[int, int], str] = {}
    while waiting:
        path = waiting.pop()
        found = _copy_folder(source, target, path, links)
        folders += found
        waiting += found
    for path in reversed(folders):          # inner ones first, as each change inside changes the time
        here, there = _inside(source, path), _inside(target, path)
        try:
            status = os.fstat(here)
            _own(status, there)
            _xattrs(f"/proc/self/fd/{here}", f"/proc/self/fd/{there}", True)
            os.fchmod(there, stat.S_IMODE(status.st_mode))
            os.utime(there, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(here)
            os.close(there)


def _inside(fd: int, path: str) -> int:
    found = int(open_in(fd, path or ".", _FOLDER, may=range(1, 4096)))
    if found < 0:
        raise OSError(-found, os.strerror(-found), path)
    return found


def _copy_folder(source: int, target: int, path: str, links: dict[tuple[int, int], str]) -> list[str]:
    """Copy what is in one folder; the folders in it are made, and given."""
    here, there = _inside(source, path), _inside(target, path)
    found = []
    try:
        with os.scandir(here) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                inner = f"{path}/{entry.name}" if path else entry.name
                if stat.S_ISDIR(status.st_mode):
                    os.mkdir(entry.name, 0o700, dir_fd=there)
                    found.append(inner)
                elif status.st_nlink > 1 and (first := links.get((status.st_dev, status.st_ino))):
                    head, _, base = first.rpartition("/")
                    folder = _inside(target, head)
                    try:
                        os.link(base, entry.name, src_dir_fd=folder, dst_dir_fd=there, follow_symlinks=False)
                    finally:
                        os.close(folder)
                elif _copy_one(here, there, entry.name, status) and status.st_nlink > 1:
                    links[(status.st_dev, status.st_ino)] = inner
    finally:
        os.close(here)
        os.close(there)
    return found


def _copy_one(here: int, there: int, name: str, status: os.stat_result) -> bool:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        _copy_file(here, there, name, status)
        return True
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=here), name, dir_fd=there)
    elif kind == stat.S_IFIFO or (kind in (stat.S_IFCHR, stat.S_IFBLK) and os.geteuid() == 0):
        try:
            os.mknod(name, kind | 0o600, status.st_rdev, dir_fd=there)
        except PermissionError:
            return False                    # root of a user namespace makes no devices
    else:
        return False
    if os.geteuid() == 0:
        _may(lambda: os.chown(name, status.st_uid, status.st_gid, dir_fd=there, follow_symlinks=False))
    if kind != stat.S_IFLNK:
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=there)
    _xattrs(f"/proc/self/fd/{here}/{name}", f"/proc/self/fd/{there}/{name}", False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=there, follow_symlinks=False)
    return True


def _copy_file(here: int, there: int, name: str, status: os.stat_result) -> None:
    from hv.linux.sparse import copy_sparse

    read = os.open(name, _READ, dir_fd=here)
    try:
        if not stat.S_ISREG(os.fstat(read).st_mode):
            raise ImageError(f"volume: {name} was replaced while it was copied")
        write = os.open(name, _CREATE, 0o600, dir_fd=there)
        try:
            os.ftruncate(write, status.st_size)
            copy_sparse(read, 0, write, 0, status.st_size)
            _own(status, write)
            _xattrs(f"/proc/self/fd/{read}", f"/proc/self/fd/{write}", True)
            os.fchmod(write, stat.S_IMODE(status.st_mode))
            os.utime(write, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(write)
    finally:
        os.close(read)


def _own(status: os.stat_result, fd: int) -> None:
    if os.geteuid() == 0:
        _may(lambda: os.fchown(fd, status.st_uid, status.st_gid))


def _may(call: Callable[[], None]) -> None:
    """An owner that this user namespace lacks, or an xattr that the file system lacks, is left out."""
    try:
        call()
    except OSError as error:
        if error.errno not in (EINVAL, EPERM, ENOTSUP):
            raise


def _xattrs(source: str, target: str, follow: bool) -> None:
    try:
        names = os.listxattr(source, follow_symlinks=follow)
    except OSError as error:
        if error.errno == ENOTSUP:
            return
        raise
    for name in names:
        if (name.startswith(("user.", "system.posix_acl_")) and not name.startswith("user.overlay.")) or (
                name == "security.capability"):
            value = os.getxattr(source, name, follow_symlinks=follow)
            _may(partial(os.setxattr, target, name, value, follow_symlinks=follow))
