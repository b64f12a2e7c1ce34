"""A folder that an archive is unpacked to: its folders by descriptor, and nothing outside it, whatever names say.

Names are looked up by openat2(2) with RESOLVE_IN_ROOT: a symbolic link of the archive in the middle of a name is
followed as it would be in the container, with the folder as root; so do containerd (which resolves them itself) and
podman (which unpacks in a chroot). The last part of a name is never followed. `..` is refused, a leading `/` is none.
A folder's descriptor is kept for the entries that follow; all are dropped when a folder or link goes.

Driven by tests/unit/test_image_unpack.py and test_image_unpack_hostile.py.
"""

from __future__ import annotations

__all__ = ["Tree", "clear_folder", "is_whiteout", "plain_parts", "shown"]

import os
import stat
from errno import ELOOP, ENOENT, ENOTDIR

from hv.errors import ImageError
from hv.linux.mount import open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT = 200                     # descriptors; most processes may have 1,024, and several layers are unpacked at once
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def shown(name: bytes) -> str:
    """An archive's name in a message: no control characters, not too long."""
    text = name[:200].decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def plain_parts(name: bytes, label: str) -> list[bytes]:
    """The parts of a name, without empty ones and `.`; ImageError for `..`."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ImageError(f"{label}: entry {shown(name)} leads out of the layer", "the image is hostile or damaged")
    return parts


def is_whiteout(status: os.stat_result) -> bool:
    """overlayfs.rst, "whiteouts and opaque directories": a character device 0/0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class Tree:
    """The folder open as `fd`, which stays the caller's. `opaque` marks a folder so that it hides what is beneath."""

    def __init__(self, fd: int, label: str, mark: str, implied: Callable[[bytes], None]) -> None:
        self.fd, self.label, self._implied = fd, label, implied
        self._mark = mark + ".overlay.opaque"
        self._kept: dict[bytes, int] = {b"": fd}

    def close(self) -> None:
        """Close what is kept open."""
        kept, self._kept = self._kept, {b"": self.fd}
        for fd in kept.values():
            if fd != self.fd:
                os.close(fd)

    def trim(self) -> None:
        """Keep the number of descriptors in bounds; those given out are no longer valid."""
        if len(self._kept) > _KEPT:
            self.close()

    def parent(self, head: bytes) -> int:
        """A descriptor of the folder `head`, which is made where it is missing. Valid until trim() or replace()."""
        fd = self._kept.get(head)
        if fd is None:
            parts = plain_parts(head, self.label)
            fd = self._find(b"/".join(parts))
            if fd in (-ENOENT, -ENOTDIR):
                fd = self._make(parts)
            self._kept[head] = self._checked(fd, head)
        return self._kept[head]

    def find(self, head: bytes) -> int:
        """As parent(), but -1 where it is missing."""
        fd = self._kept.get(head)
        if fd is None:
            fd = self._find(b"/".join(plain_parts(head, self.label)))
            if fd < 0:
                return -1
            self._kept[head] = fd
        return fd

    def _find(self, path: bytes) -> int:
        return int(open_in(self.fd, os.fsdecode(path or b"."), _PLACE, may=range(1, 4096)))

    def _checked(self, fd: int, head: bytes) -> int:
        if fd < 0:
            raise ImageError(f"{self.label}: folder {shown(head)}: {os.strerror(-fd)}")
        return fd

    def _make(self, parts: list[bytes]) -> int:
        """Make the missing ones of a path's folders; a descriptor of the last."""
        fd = os.dup(self.fd)
        try:
            for number, part in enumerate(parts):
                path = b"/".join(parts[:number + 1])
                try:
                    inner = os.open(part, _PLACE | os.O_NOFOLLOW, dir_fd=fd)
                except OSError as error:
                    if error.errno not in (ENOENT, ENOTDIR, ELOOP):
                        raise
                    inner = self._missing(fd, part, path)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _missing(self, fd: int, part: bytes, path: bytes) -> int:
        """`part` of the folder `fd` is no folder: a descriptor of what it leads to, or of a new folder there."""
        try:
            status = os.stat(part, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            hidden = False
        else:
            if stat.S_ISLNK(status.st_mode):
                inner = self._find(path)
                if inner < 0:
                    raise ImageError(f"{self.label}: {shown(path)} is a symbolic link to no folder of the layer, yet a "
                                     "later entry is in it")
                return inner
            if not is_whiteout(status):
                raise ImageError(f"{self.label}: {shown(path)} is no folder, yet a later entry is in it")
            os.unlink(part, dir_fd=fd)
            hidden = True
        os.mkdir(part, 0o755, dir_fd=fd)
        inner = os.open(part, _PLACE | os.O_NOFOLLOW, dir_fd=fd)
        if hidden:
            self.opaque(inner)
        self._implied(path)
        return inner

    def replace(self, head: bytes, base: bytes) -> tuple[int, os.stat_result]:
        """Remove what an earlier entry made; a new descriptor of the folder `head`, and what was removed."""
        parent = self.parent(head)
        status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            fd = os.open(base, _FOLDER, dir_fd=parent)
            try:
                clear_folder(fd)
            finally:
                os.close(fd)
            os.rmdir(base, dir_fd=parent)
        else:
            os.unlink(base, dir_fd=parent)
            if not stat.S_ISLNK(status.st_mode):
                return parent, status
        self.close()
        return self.parent(head), status

    def opaque(self, fd: int) -> None:
        """Make what lower layers have in this folder invisible (overlayfs.rst)."""
        os.setxattr(f"/proc/self/fd/{fd}", self._mark, b"y")

    def whiteout(self, head: bytes, base: bytes) -> None:
        """Hide `base` of lower layers. What this layer has of that name stays (image-spec layer.md, "Whiteouts")."""
        parent = self.parent(head)
        try:
            os.mknod(base, stat.S_IFCHR, 0, dir_fd=parent)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                fd = os.open(base, _PLACE | os.O_NOFOLLOW, dir_fd=parent)
                try:
                    self.opaque(fd)
                finally:
                    os.close(fd)


def clear_folder(fd: int) -> None:
    """Remove everything in the open folder. Folders in folders are first moved up, so that no depth is too deep."""
    prefix, number, found = b".pyhv-" + os.urandom(6).hex().encode() + b"-", 0, True
    while found:
        found = False
        with os.scandir(fd) as entries:
            for entry in entries:
                found = True
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=fd)
                    continue
                child = _opened(fd, entry.name)
                try:
                    number = _hoist(child, fd, prefix, number)
                finally:
                    os.close(child)
                os.rmdir(entry.name, dir_fd=fd)


def _hoist(child: int, top: int, prefix: bytes, number: int) -> int:
    again = True
    while again:
        again = False
        with os.scandir(child) as entries:
            for entry in entries:
                again = True
                if entry.is_dir(follow_symlinks=False):
                    number += 1
                    os.rename(entry.name, prefix + b"%d" % number, src_dir_fd=child, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=child)
    return number


def _opened(fd: int, name: str) -> int:
    """A folder to be emptied; without root's rights it may have to be made accessible first."""
    if os.geteuid():
        os.chmod(name, 0o700, dir_fd=fd)
    return os.open(name, _FOLDER, dir_fd=fd)
