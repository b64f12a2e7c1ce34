"""`pyhv cp`: files between the host and an instance, or a tar archive on a standard stream, as docker has it.

Each side is a root and a path below it. Paths are looked up by openat2(2) with that root (RESOLVE_IN_ROOT), what is
below them by descriptors, one name at a time and following no link: an instance that changes its files meanwhile leads
nowhere else. Left out on purpose: sockets (skipped, with a word), hard links (become files of their own).

Driven by tests/root/test_instance_cp.py.
"""

from __future__ import annotations

__all__ = ["Side", "copy"]

import os
import stat

from hv.errors import ConfigError, HvError, KernelError
from hv.linux.mount import open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PLACE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20
_DEPTH_MOST = 300               # two descriptors for each; most processes may have 1,024


class Side:
    """A path below a root; `label` is how it is told of."""

    def __init__(self, root: int, path: str, label: str) -> None:
        self.root, self.path, self.label = root, path, label

    def open(self, path: str, flags: int) -> int:
        """A descriptor; OSError."""
        try:
            return int(open_in(self.root, path, flags))
        except KernelError as error:
            raise OSError(error.errno, os.strerror(error.errno), path) from None

    def look(self, follow: bool = True) -> tuple[int, os.stat_result] | None:
        """A descriptor of what is at the path, and its status; None where there is nothing."""
        try:
            fd = self.open(self.path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HvError(f"{self.label}: {os.strerror(error.errno or 0)}") from None
        return fd, os.fstat(fd)

    def split(self) -> tuple[str, str]:
        """The folder that holds it, and its name there."""
        above, _, leaf = self.path.rstrip("/").rpartition("/")
        return above or "/", leaf

    def folder(self, path: str) -> int:
        """A descriptor of the folder at `path`."""
        try:
            return self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise HvError(f"{self.label}: {path}: {os.strerror(error.errno or 0)}",
                          "the folder that it goes to must be there") from None


class Copier:
    """Copies with the owner that files are to have: (uid, gid), None as the source has them."""

    def __init__(self, owner: tuple[int, int] | None, warn: Callable[[str], None]) -> None:
        self._owner, self._warn = owner, warn
        self.files = 0

    def item(self, source: int, name: str, target: int, leaf: str, depth: int = 0) -> None:
        """`name` in the folder `source` becomes `leaf` in the folder `target`."""
        place = os.open(name, _PLACE, dir_fd=source)
        try:
            status = os.fstat(place)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                self._folder(place, target, leaf, status, depth)
            elif kind == stat.S_IFREG:
                self._file(place, target, leaf, status)
            elif kind == stat.S_IFLNK:
                self._replace(target, leaf)
                os.symlink(os.readlink("", dir_fd=place), leaf, dir_fd=target)
                self._own(leaf, target, status)
            elif kind == stat.S_IFSOCK:
                self._warn(f"{name}: a socket, left out")
            else:
                self._replace(target, leaf)
                os.mknod(leaf, status.st_mode, status.st_rdev, dir_fd=target)
                self._own(leaf, target, status)
                os.chmod(leaf, stat.S_IMODE(status.st_mode), dir_fd=target)
        finally:
            os.close(place)
        self.files += 1

    def _own(self, leaf: str, target: int, status: os.stat_result) -> None:
        uid, gid = self._owner or (status.st_uid, status.st_gid)
        os.chown(leaf, uid, gid, dir_fd=target, follow_symlinks=False)

    @staticmethod
    def _replace(target: int, leaf: str) -> None:
        """Make room: a file may be replaced, a folder may not."""
        try:
            os.unlink(leaf, dir_fd=target)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            raise HvError(f"{leaf}: there is a folder in the place of a file") from None

    def _folder(self, place: int, target: int, leaf: str, status: os.stat_result, depth: int) -> None:
        if depth > _DEPTH_MOST:
            raise HvError(f"{leaf}: more than {_DEPTH_MOST} folders in each other", "copy a part of it")
        try:
            os.mkdir(leaf, 0o700, dir_fd=target)
        except FileExistsError:
            pass
        try:
            inner = os.open(leaf, _FOLDER, dir_fd=target)
        except NotADirectoryError:
            raise HvError(f"{leaf}: there is something else in the place of a folder") from None
        try:
            self.content(place, inner, depth)
            self._finish(inner, place, status)
        finally:
            os.close(inner)

    def content(self, place: int, target: int, depth: int = 0) -> None:
        """All that is in the folder `place` (an O_PATH descriptor) into the folder `target`."""
        source = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in sorted(os.listdir(source)):
                try:
                    self.item(source, name, target, name, depth + 1)
                except FileNotFoundError:
                    pass                # it has gone meanwhile
        finally:
            os.close(source)

    def _file(self, place: int, target: int, leaf: str, status: os.stat_result) -> None:
        self._replace(target, leaf)
        fresh = os.open(leaf, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            source = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _pour(source, fresh, status.st_size)
            finally:
                os.close(source)
            self._finish(fresh, place, status)
        finally:
            os.close(fresh)

    def _finish(self, fd: int, place: int, status: os.stat_result) -> None:
        """Owner, attributes, mode, times: in an order in which one does not undo another."""
        uid, gid = self._owner or (status.st_uid, status.st_gid)
        os.fchown(fd, uid, gid)
        path = f"/proc/self/fd/{place}"
        try:
            for name in os.listxattr(path):
                if name.startswith(("user.", "security.capability")):
                    os.setxattr(fd, name, os.getxattr(path, name))
        except OSError:
            pass                        # a file system without them
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def _pour(source: int, target: int, size: int) -> None:
    """The content; holes stay holes."""
    at = 0
    while True:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, at, os.SEEK_HOLE)
        except OSError:                 # ENXIO: nothing but a hole is left; or no such thing here
            break
        os.lseek(source, at, os.SEEK_SET)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            data = os.read(source, min(_CHUNK, end - at))
            if not data:
                break
            at += len(data)
            while data:
                data = data[os.write(target, data):]
        else:
            continue
        break
    os.ftruncate(target, max(size, at) if at else size)


def copy(source: Side, target: Side, *, follow: bool, owner: tuple[int, int] | None,
         warn: Callable[[str], None]) -> int:
    """Copy as docker-cp(1) has it; how many files and folders. HvError."""
    copier = Copier(owner, warn)
    inside = source.path.endswith("/.") or source.path == "."
    found = source.look(follow or inside or source.path.endswith("/"))
    if found is None:
        raise HvError(f"{source.label}: there is no such file or folder")
    place, status = found
    try:
        into = target.look()
        if into is not None:
            os.close(into[0])
        if stat.S_ISDIR(status.st_mode):
            _copy_folder(copier, place, source, target, into[1] if into else None, inside)
        else:
            if into is not None and stat.S_ISDIR(into[1].st_mode):
                folder, leaf = target.path, source.split()[1]
            elif target.path.endswith("/"):
                raise HvError(f"{target.label}: there is no such folder")
            else:
                folder, leaf = target.split()
            _copy_item(copier, place, source, follow, target.folder(folder), leaf)
    except OSError as error:
        raise HvError(f"{target.label}: {error.filename or ''}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(place)
    return copier.files


def _copy_item(copier: Copier, place: int, source: Side, follow: bool, folder: int, leaf: str) -> None:
    try:
        if follow:
            status = os.fstat(place)
            if stat.S_ISREG(status.st_mode):
                copier._file(place, folder, leaf, status)
                copier.files += 1
                return
        above, name = source.split()
        holder = source.folder(above)
        try:
            copier.item(holder, name, folder, leaf)
        finally:
            os.close(holder)
    finally:
        os.close(folder)


def _copy_folder(copier: Copier, place: int, source: Side, target: Side, into: os.stat_result | None,
                 inside: bool) -> None:
    if into is not None and not stat.S_ISDIR(into.st_mode):
        raise ConfigError(f"{target.label}: a folder can't be copied onto a file")
    if into is None:
        folder, leaf = target.split()
    elif inside:
        fd = target.folder(target.path)
        try:
            copier.content(place, fd)
        finally:
            os.close(fd)
        return
    else:
        folder, leaf = target.path, source.split()[1]
        if not leaf:                    # the root itself
            fd = target.folder(target.path)
            try:
                copier.content(place, fd)
            finally:
                os.close(fd)
            return
    fd = target.folder(folder)
    try:
        copier._folder(place, fd, leaf, os.fstat(place), 0)
    finally:
        os.close(fd)
