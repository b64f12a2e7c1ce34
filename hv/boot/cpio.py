"""Initramfs archives: the "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

__all__ = ["Archive"]

import os
import stat

from hv.errors import ImageError

MAGIC = b"070701"
TRAILER = "TRAILER!!!"


class Archive:
    """Entries in the order they are added; parents are made as needed. Owners are root, times are 0."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()
        self._inode = 0

    def add_file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file; `mode` are its permission bits."""
        self._add(name, stat.S_IFREG | mode & 0o7777, data)

    def add_dir(self, name: str, mode: int = 0o755) -> None:
        """A directory, unless it is there already."""
        if name.strip("/") not in self._names:
            self._add(name, stat.S_IFDIR | mode & 0o7777)

    def add_symlink(self, name: str, target: str) -> None:
        """A symbolic link to `target`."""
        self._add(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def add_node(self, name: str, mode: int, major: int = 0, minor: int = 0) -> None:
        """A device or FIFO; `mode` holds type and permissions."""
        self._add(name, mode, device=(major, minor))

    def add_tree(self, root: str, inside: str = "") -> None:
        """Everything under the directory `root`, sorted by name, into the directory `inside`.

        ImageError for sockets and unreadable files.
        """
        try:
            self._walk(root, inside.strip("/"))
        except OSError as error:
            raise ImageError(f"initramfs {error.filename or root}: {os.strerror(error.errno or 0)}",
                             "name a directory whose files can be read") from None

    def finish(self) -> bytes:
        """The archive, padded to 512 bytes."""
        whole = b"".join(self._parts) + self._entry(TRAILER, 0, b"", (0, 0))
        return whole + bytes(-len(whole) % 512)

    def _walk(self, folder: str, inside: str) -> None:
        for entry in sorted(os.scandir(folder), key=lambda found: found.name):
            name = f"{inside}/{entry.name}" if inside else entry.name
            status = entry.stat(follow_symlinks=False)
            mode = status.st_mode
            if stat.S_ISDIR(mode):
                self._add(name, mode)
                self._walk(entry.path, name)
            elif stat.S_ISLNK(mode):
                self._add(name, mode, os.fsencode(os.readlink(entry.path)))
            elif stat.S_ISREG(mode):
                with open(entry.path, "rb") as file:
                    self._add(name, mode, file.read())
            elif stat.S_ISSOCK(mode):
                raise ImageError(f"initramfs {entry.path}: a socket can't be archived", "remove it")
            else:
                self._add(name, mode, device=(os.major(status.st_rdev), os.minor(status.st_rdev)))

    def _add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = name.strip("/")
        if not name or ".." in name.split("/") or name == TRAILER:
            raise ImageError(f"initramfs: {name!r} can't be an entry's name")
        if len(data) > 0xFFFFFFFF:
            raise ImageError(f"initramfs {name}: {len(data)} bytes do not fit the format", "at most 4 GiB per file")
        parent = name.rpartition("/")[0]
        if parent and parent not in self._names:
            self.add_dir(parent)
        self._names.add(name)
        self._parts.append(self._entry(name, mode, data, device))

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
        self._inode += 1
        encoded = os.fsencode(name) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
        return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
