"""A layer's entries made into files, in the form that overlayfs takes as a layer.

A whiteout `.wh.NAME` becomes a character device 0/0, an opaque folder gets trusted.overlay.opaque (user.overlay.opaque
without the rights of the host's root). Entries count in their order: a later one replaces what an earlier one made, but
for folders, which are merged; a folder that takes the place of something else hides what lower layers have there.
Times of folders, and modes that would hinder us, are set at the end.

Without root's rights, files belong to who unpacks, devices are left out, as are xattrs that the kernel refuses; root of
a user namespace keeps the owners that its map has. Only user.*, security.capability and POSIX ACLs are taken as
xattrs: trusted.* and *.overlay.* would speak to overlayfs. Sources: image-spec layer.md, overlayfs.rst.

The caller's thread reads, decompresses and hashes, another one (with its own umask) makes the files.

Driven by tests/unit/test_image_unpack.py and test_image_unpack_hostile.py.
"""

from __future__ import annotations

__all__ = ["Summary", "unpack"]

import os
import stat
from errno import EDQUOT, EINVAL, ENOSPC, ENOTSUP, EPERM

from hv.errors import ImageError
from hv.image.inflate import Limits
from hv.image.later import Later
from hv.image.overlay import in_user_namespace
from hv.image.pipe import Pipe
from hv.image.tarstream import Entry, TarStream
from hv.image.tree import Tree, plain_parts, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ODD = (b"", b".", b"..")
_SPECIAL = 0o7000               # setuid, setgid, sticky
_IMPLIED_MOST = 4 << 20         # bytes of the names that are kept
_MAJOR_MOST, _MINOR_MOST = 1 << 12, 1 << 20     # include/linux/kdev_t.h
_CAPABILITY = b"security.capability"
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_HARD, _SYMBOLIC, _CHARACTER, _BLOCK, _FOLDER, _FIFO = b"1", b"2", b"3", b"4", b"5", b"6"


class Summary:
    """What became of a layer. `implied`: folders that no entry names. `opaque`: nothing of lower layers is seen.
    `skipped`: devices and owners that could not be."""

    __slots__ = ("entries", "implied", "opaque", "size", "skipped")

    def __init__(self) -> None:
        self.entries = self.size = self.skipped = 0
        self.opaque = False
        self.implied: list[bytes] = []


def unpack(blob_fd: int, folder_fd: int, label: str, diff_id: str = "", limits: Limits | None = None,
           progress: Callable[[int], object] | None = None) -> Summary:
    """Unpack the layer open as `blob_fd` into the empty folder open as `folder_fd`. ImageError, beginning `label`.

    `diff_id` is what the plain archive must hash to. After an error the folder holds a part of the layer.
    """
    limits = limits or Limits()
    maker = _Maker(folder_fd, label, limits)
    pipe = Pipe(blob_fd, label, limits, progress)
    found = pipe.run(maker.run)
    if diff_id and found != diff_id:
        raise ImageError(f"{label}: its content has the digest {found}, the image's configuration says {diff_id}",
                         "the image is damaged or hostile; pull it again")
    return maker.summary


class _Maker:
    """Makes files of entries; lives in one thread."""

    def __init__(self, fd: int, label: str, limits: Limits) -> None:
        self.fd, self.label, self.limits, self.summary = fd, label, limits, Summary()
        self.user, self.group = os.geteuid(), os.getegid()
        self.root = self.user == 0                  # of some user namespace
        self.lesser = in_user_namespace()           # no devices, no trusted.*
        self.tree = Tree(fd, label, "user" if self.lesser else "trusted", self._imply)
        self.later = Later(fd)
        self._implied = 0
        self._topped = False            # an entry names the layer's root

    def run(self, pieces: Iterator[bytes]) -> None:
        """Everything, from the bytes of the archive to the last time stamp."""
        entry: Entry | None = None
        stream = TarStream(pieces, self.label)
        try:
            os.fchmod(self.fd, 0o755)
            if self.root:
                os.fchown(self.fd, 0, 0)
            while (entry := stream.next()) is not None:
                self._make(entry, stream)
            if not self._topped:
                self._imply(b"")
            self._finish()
            stream.drain()
        except OSError as error:
            full = error.errno in (ENOSPC, EDQUOT)
            where = f"entry {shown(entry.name)}: " if entry is not None and not full else ""
            raise ImageError(f"{self.label}: {where}{os.strerror(error.errno or 0)}",
                             "free space or move the store ($PYHV_DATA); nothing of the layer is kept" if full else
                             "") from None
        finally:
            self.tree.close()
            self.later.close()

    def _imply(self, path: bytes) -> None:
        self._count()
        self._implied += len(path)
        if self._implied < _IMPLIED_MOST:
            self.summary.implied.append(path)

    def _count(self) -> None:
        self.summary.entries += 1
        if self.summary.entries > self.limits.entries:
            raise ImageError(f"{self.label}: has more than {self.limits.entries} entries",
                             "if you trust it, raise PYHV_LAYER_ENTRIES")

    def _make(self, entry: Entry, stream: TarStream) -> None:
        self._count()
        tree = self.tree
        tree.trim()
        name = entry.name
        if name.endswith(b"/"):
            name = name.rstrip(b"/")
        head, _, base = name.rpartition(b"/")
        if base in _ODD:
            parts = plain_parts(name, self.label)
            if not parts:
                self._top(entry)
                return
            head, base = b"/".join(parts[:-1]), parts[-1]
        if base.startswith(b".wh."):
            self._white(head, base)
            return
        if name.startswith(b".wh..wh.") or b"/.wh..wh." in name:
            return          # aufs's own files, as docker skips them
        kind = entry.kind
        parent = tree.parent(head)
        if kind == b"0":
            self._file(entry, stream, parent, head, base)
        elif kind == _FOLDER:
            self._folder(entry, parent, head, base)
        elif kind == _HARD:
            self._link(entry, parent, head, base)
        else:
            self._node(entry, parent, head, base)

    # -- kinds of entries --------------------------------------------------------------------------------------

    def _top(self, entry: Entry) -> None:
        if entry.kind != _FOLDER:
            raise ImageError(f"{self.label}: entry {shown(entry.name)} is the layer's root, but no folder")
        self._topped = True
        self._own(entry, self.fd, b".")
        self._xattrs(entry, f"/proc/self/fd/{self.fd}")
        self.later.add(b"", entry.mtime, entry.mode)

    def _white(self, head: bytes, base: bytes) -> None:
        if base == b".wh..wh..opq":
            self.tree.opaque(self.tree.parent(head))
            if not plain_parts(head, self.label):
                self.summary.opaque = True
            return
        if base.startswith(b".wh..wh."):
            return
        target = base[4:]
        if target in _ODD:
            raise ImageError(f"{self.label}: entry {shown(base)} is a whiteout of no file")
        self.tree.whiteout(head, target)

    def _file(self, entry: Entry, stream: TarStream, parent: int, head: bytes, base: bytes) -> None:
        mode = entry.mode
        try:
            fd = os.open(base, _CREATE, mode & 0o777, dir_fd=parent)
        except FileExistsError:
            parent, _ = self.tree.replace(head, base)
            fd = os.open(base, _CREATE, mode & 0o777, dir_fd=parent)
        try:
            if entry.pieces is not None:
                self._sparse(fd, entry, stream)
            else:
                for piece in stream.data():
                    written = os.write(fd, piece)
                    while written < len(piece):
                        written += os.write(fd, piece[written:])
            self.summary.size += entry.size
            if self.root and (entry.uid != self.user or entry.gid != self.group):
                self._owned(os.fchown, fd, entry.uid, entry.gid)
            if entry.xattrs is not None:
                if self.user:
                    os.fchmod(fd, mode | 0o600)
                self._xattrs(entry, fd)
                os.fchmod(fd, mode)
            elif mode & _SPECIAL:
                os.fchmod(fd, mode)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def _sparse(self, fd: int, entry: Entry, stream: TarStream) -> None:
        if entry.real > self.limits.most:
            raise ImageError(f"{self.label}: entry {shown(entry.name)} is a sparse file of {entry.real} bytes",
                             "if you trust it, raise PYHV_LAYER_BYTES")
        os.ftruncate(fd, entry.real)
        pieces = iter(entry.pieces or ())
        at = left = 0
        for data in stream.data():
            while data:
                while not left:
                    at, left = next(pieces)     # the map covers the data exactly (TarStream)
                written = os.pwrite(fd, data[:left], at)
                data, at, left = data[written:], at + written, left - written

    def _folder(self, entry: Entry, parent: int, head: bytes, base: bytes) -> None:
        # setgid would be handed down to what is made in it; without root's rights, nothing could be made without rwx
        first = entry.mode & 0o1777 if self.root else entry.mode & 0o1777 | 0o700
        try:
            os.mkdir(base, first & 0o777, dir_fd=parent)
        except FileExistsError:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                parent, _ = self.tree.replace(head, base)
                os.mkdir(base, first & 0o777, dir_fd=parent)
                self.tree.opaque(self.tree.parent(head + b"/" + base))
            else:
                os.chmod(base, first, dir_fd=parent)
                if self.root:
                    self._owned(lambda: os.chown(base, entry.uid, entry.gid, dir_fd=parent))
        self._own(entry, parent, base)
        if first & _SPECIAL:
            os.chmod(base, first, dir_fd=parent)
        if entry.xattrs is not None:
            self._xattrs(entry, f"/proc/self/fd/{parent}/{os.fsdecode(base)}")
        self.later.add(head + b"/" + base, entry.mtime, entry.mode if entry.mode != first else -1)

    def _link(self, entry: Entry, parent: int, head: bytes, base: bytes) -> None:
        from_head, _, from_base = entry.link.rstrip(b"/").rpartition(b"/")
        if from_base in _ODD:
            parts = plain_parts(entry.link, self.label)
            from_head, from_base = b"/".join(parts[:-1]), parts[-1] if parts else b""
        source = self.tree.find(from_head)
        try:
            if source < 0 or not from_base:
                raise FileNotFoundError
            try:
                os.link(from_base, base, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                if os.path.sameopenfile(source, parent) and from_base == base:
                    return          # a link to itself
                parent, _ = self.tree.replace(head, base)
                os.link(from_base, base, src_dir_fd=self.tree.parent(from_head), dst_dir_fd=parent,
                        follow_symlinks=False)
        except FileNotFoundError:
            raise ImageError(f"{self.label}: entry {shown(entry.name)} is a link to {shown(entry.link)}, which is not "
                             "in the layer") from None

    def _node(self, entry: Entry, parent: int, head: bytes, base: bytes) -> None:
        """A symbolic link, device or FIFO."""
        if entry.kind in (_CHARACTER, _BLOCK):
            if not (0 <= entry.major < _MAJOR_MOST and 0 <= entry.minor < _MINOR_MOST):
                raise ImageError(f"{self.label}: entry {shown(entry.name)} is device {entry.major}:{entry.minor}")
            if self.lesser and (entry.kind == _BLOCK or entry.major or entry.minor):
                self.summary.skipped += 1
                return
        try:
            self._place(entry, parent, base)
        except FileExistsError:
            parent, _ = self.tree.replace(head, base)
            self._place(entry, parent, base)
        self._own(entry, parent, base)
        if entry.kind != _SYMBOLIC and entry.mode & _SPECIAL:
            os.chmod(base, entry.mode, dir_fd=parent)
        if entry.xattrs is not None:
            self._xattrs(entry, f"/proc/self/fd/{parent}/{os.fsdecode(base)}")
        os.utime(base, ns=(entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)

    def _place(self, entry: Entry, parent: int, base: bytes) -> None:
        if entry.kind == _SYMBOLIC:
            os.symlink(entry.link, base, dir_fd=parent)
        elif entry.kind == _FIFO:
            os.mkfifo(base, entry.mode & 0o777, dir_fd=parent)
        else:
            kind = stat.S_IFCHR if entry.kind == _CHARACTER else stat.S_IFBLK
            os.mknod(base, kind | entry.mode & 0o777, os.makedev(entry.major, entry.minor), dir_fd=parent)

    # -- owners, xattrs, times ---------------------------------------------------------------------------------

    def _own(self, entry: Entry, parent: int, base: bytes) -> None:
        if self.root and (entry.uid != self.user or entry.gid != self.group):
            self._owned(lambda: os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False))

    def _owned(self, call: Callable[..., None], *arguments: int) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if not self.lesser or error.errno not in (EINVAL, EPERM):
                raise
            self.summary.skipped += 1       # no such id in this user namespace

    def _xattrs(self, entry: Entry, where: int | str) -> None:
        for name, value in (entry.xattrs or {}).items():
            taken = name in _ACLS or (name == _CAPABILITY and self.root) or (
                name.startswith(b"user.") and not name.startswith(b"user.overlay."))
            if not taken or b"\0" in name:
                continue
            try:
                if isinstance(where, int):
                    os.setxattr(where, name, value)
                else:
                    os.setxattr(where, name, value, follow_symlinks=where.endswith(f"/fd/{self.fd}"))
            except OSError as error:
                if error.errno not in (ENOTSUP, EPERM):
                    raise           # EPERM: user.* on what is no file or folder

    def _finish(self) -> None:
        """Times of folders, which what was made in them has changed, and modes that had to wait."""
        late: list[tuple[int, bytes, int]] = []
        for path, mtime, mode in self.later:
            self.tree.trim()
            head, _, base = path.rpartition(b"/")
            parent = self.tree.find(head)
            if not base:
                os.utime(self.fd, ns=(mtime, mtime))
                late.append((0, b"", mode))
                continue
            try:
                if parent < 0 or not stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                    continue        # a later entry took its place
            except FileNotFoundError:
                continue
            os.utime(base, ns=(mtime, mtime), dir_fd=parent)
            if mode >= 0 and self.root:
                os.chmod(base, mode, dir_fd=parent)
            elif mode >= 0:
                late.append((path.count(b"/"), path, mode))
        for _, path, mode in sorted(late, reverse=True):
            head, _, base = path.rpartition(b"/")
            os.chmod(base, mode, dir_fd=self.tree.parent(head)) if base else os.fchmod(self.fd, mode)
