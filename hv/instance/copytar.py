"""`pyhv cp` from and to a tar archive on a standard stream. Driven by tests/root/test_instance_cp.py."""

from __future__ import annotations

__all__ = ["from_tar", "to_tar"]

import os
import stat

from hv.errors import HvError
from hv.instance.copy import Side

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tarfile import TarFile, TarInfo
    from typing import IO

_PLACE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20


def to_tar(source: Side, out: IO[bytes], *, follow: bool) -> None:
    """Write what is at `source`, under its own name."""
    import tarfile

    found = source.look(follow)
    if found is None:
        raise HvError(f"{source.label}: there is no such file or folder")
    place, _ = found
    try:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, place, source.split()[1] or ".")
    except OSError as error:
        raise HvError(f"{source.label}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(place)


def _add(archive: TarFile, place: int, name: str) -> None:
    import tarfile

    status = os.fstat(place)
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    info.mtime = int(status.st_mtime)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        info.size = status.st_size
        with open(f"/proc/self/fd/{place}", "rb") as file:
            archive.addfile(info, file)
        return
    if kind == stat.S_IFLNK:
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=place)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        info.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    elif kind == stat.S_IFIFO:
        info.type = tarfile.FIFOTYPE
    elif kind == stat.S_IFDIR:
        info.type = tarfile.DIRTYPE
    else:
        return                          # a socket
    archive.addfile(info)
    if kind == stat.S_IFDIR:
        folder = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for leaf in sorted(os.listdir(folder)):
                try:
                    inner = os.open(leaf, _PLACE, dir_fd=folder)
                except FileNotFoundError:
                    continue
                try:
                    _add(archive, inner, f"{name}/{leaf}")
                finally:
                    os.close(inner)
        finally:
            os.close(folder)


def from_tar(stream: IO[bytes], target: Side, *, keep_owner: bool) -> None:
    """Unpack into the folder at `target`; names are below its root whatever they say."""
    import tarfile

    os.close(target.folder(target.path))
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                _extract(archive, member, target, keep_owner)
    except tarfile.TarError as error:
        raise HvError(f"-: this is no tar archive: {error}") from None
    except OSError as error:
        raise HvError(f"{target.label}: {os.strerror(error.errno or 0)}") from None


def _extract(archive: TarFile, member: TarInfo, target: Side, keep_owner: bool) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise HvError(f"-: {member.name!r:.100} leads out of the archive")
    if not parts:
        return
    above = _parents(target, parts[:-1])
    try:
        leaf = parts[-1]
        if member.isdir():
            try:
                os.mkdir(leaf, 0o755, dir_fd=above)
            except FileExistsError:
                pass
        else:
            try:
                os.unlink(leaf, dir_fd=above)
            except FileNotFoundError:
                pass
            if member.isreg():
                fd = os.open(leaf, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=above)
                with os.fdopen(fd, "wb") as out, archive.extractfile(member) as content:    # type: ignore[union-attr]
                    while data := content.read(_CHUNK):
                        out.write(data)
            elif member.issym():
                os.symlink(member.linkname, leaf, dir_fd=above)
            elif member.islnk():
                _link(target, member, above, leaf)
                return
            elif member.isfifo() or member.ischr() or member.isblk():
                kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK
                os.mknod(leaf, kind | (member.mode & 0o7777), os.makedev(member.devmajor, member.devminor),
                         dir_fd=above)
            else:
                return
        if keep_owner:
            os.chown(leaf, member.uid, member.gid, dir_fd=above, follow_symlinks=False)
        if not member.issym():
            os.chmod(leaf, member.mode & 0o7777, dir_fd=above)
            os.utime(leaf, (member.mtime, member.mtime), dir_fd=above, follow_symlinks=False)
    finally:
        os.close(above)


def _parents(target: Side, parts: list[str]) -> int:
    """The folder that a member goes to, made where it is missing."""
    here = target.path
    for part in parts:
        here = f"{here.rstrip('/')}/{part}"
        try:
            os.close(target.open(here, os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            above, _, leaf = here.rpartition("/")
            folder = target.folder(above or "/")
            try:
                os.mkdir(leaf, 0o755, dir_fd=folder)
            finally:
                os.close(folder)
    return target.folder(here)


def _link(target: Side, member: TarInfo, above: int, leaf: str) -> None:
    parts = [part for part in member.linkname.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise HvError(f"-: {member.name!r:.100}: its link leads out of the archive")
    folder = _parents(target, parts[:-1])
    try:
        os.link(parts[-1], leaf, src_dir_fd=folder, dst_dir_fd=above, follow_symlinks=False)
    finally:
        os.close(folder)
