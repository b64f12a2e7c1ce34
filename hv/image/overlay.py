"""The root file system of an instance: an image's unpacked layers beneath, a writable folder on top, by overlayfs.

Each layer is an option of its own (lowerdir+, Linux 6.7), so that neither the number of layers nor a path with `:` or
`,` meets the page that mount(2) takes. Older kernels get that page, with /proc/self/fd names in it, which are short and
hold neither. Source: Documentation/filesystems/overlayfs.rst, fs/overlayfs/params.c.

`make` gives a detached mount, as descriptor, for whoever builds a tree of mounts (hv/linux/mount.py's `move`), in the
mount namespace of the caller; `mount_overlay` puts it at a path. Nothing here outlives that namespace. Without the
rights of the host's root, in a user namespace, overlayfs keeps its marks in user.overlay.* (`userxattr`), as
unpack.py does then.

Driven by tests/root/test_image_overlay.py.
"""

from __future__ import annotations

__all__ = ["MOST_LAYERS", "in_user_namespace", "make", "make_upper", "mount_overlay"]

import os
from errno import EINVAL

from hv.errors import ImageError, KernelError
from hv.linux.mount import ATTR, clone_tree, move, new_filesystem, set_attributes
from hv.linux.syscall import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_LAYERS = 500               # fs/overlayfs/params.h, OVL_MAX_STACK
_STRING_MOST = 255              # fs/fsopen.c: fsconfig(2) takes strings of less than 256 bytes
_SYS_MOUNT = 165                # arch/x86/entry/syscalls/syscall_64.tbl
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4     # include/uapi/linux/mount.h
_PAGE = 4096
_ALL_IDS = b"0 0 4294967295"    # man 7 user_namespaces: the first namespace's map


def in_user_namespace() -> bool:
    """Whether the marks of overlayfs must be user.overlay.*: trusted.* takes the host's root."""
    if os.geteuid():
        return True
    with open("/proc/self/uid_map", "rb", 0) as file:
        return b" ".join(file.read(64).split()) != _ALL_IDS


def make_upper(lowers: Sequence[str], upper: str, work: str) -> None:
    """Make the two folders, unless they are there. The upper one is what the instance sees as its root, so it looks
    as the image's root does."""
    for path in (work, upper):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue
        if path == upper and lowers:
            status = os.stat(lowers[0])
            if os.geteuid() == 0:
                os.chown(path, status.st_uid, status.st_gid)
            os.chmod(path, status.st_mode & 0o7777)


def make(lowers: Sequence[str], upper: str = "", work: str = "", *, read_only: bool = False,
         options: Sequence[str] = (), attributes: int = 0, userxattr: bool | None = None) -> int:
    """A detached overlay mount: `lowers` uppermost first; no `upper` means that nothing can be written.

    `options` are overlayfs's own (`volatile`, `index=off`, ...), `attributes` those of ATTR. The caller closes it.
    A single layer without an upper folder is a bind mount of it: overlayfs wants two folders.
    """
    if len(lowers) == 1 and not upper:
        return _bound(lowers[0], attributes | ATTR["rdonly"])
    if not 0 < len(lowers) <= MOST_LAYERS:
        raise ImageError(f"overlay: {len(lowers)} layers; overlayfs takes 1 to {MOST_LAYERS}")
    held: list[int] = []
    try:
        settings = [f"lowerdir+={_named(path, held)}" for path in lowers]
        settings += [f"{key}dir={_named(path, held)}" for key, path in (("upper", upper), ("work", work)) if path]
        if in_user_namespace() if userxattr is None else userxattr:
            settings.append("userxattr")
        return int(new_filesystem("overlay", "overlay", [*settings, *options],
                                  attributes | (ATTR["rdonly"] if read_only else 0)))
    except KernelError as error:
        missing = [path for path in (*lowers, upper, work) if path and not os.path.isdir(path)]
        if missing:
            raise ImageError(f"overlay: {missing[0]} is not a folder",
                             "a layer that was removed is unpacked again by the next run") from None
        if error.errno == EINVAL and not lowers[1:]:
            error.hint = "the upper and work folders must be in one file system, which is no overlayfs itself"
        raise
    finally:
        for fd in held:
            os.close(fd)


def _bound(path: str, attributes: int) -> int:
    held: list[int] = []
    try:
        _hold(path, held)
        fd = int(clone_tree(held[0], "", False))
        try:
            set_attributes(fd, attributes)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        for fd in held:
            os.close(fd)


def _named(path: str, held: list[int]) -> str:
    """`path`, or a short name of it where fsconfig(2) would not take it (length) or read it as it is (backslash)."""
    if len(os.fsencode(path)) <= _STRING_MOST and "\\" not in path:
        return path
    _hold(path, held)
    return f"/proc/self/fd/{held[-1]}"


def _hold(path: str, held: list[int]) -> None:
    try:
        held.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise ImageError(f"overlay: {path}: {error.strerror}") from None


def mount_overlay(lowers: Sequence[str], upper: str, work: str, target: str, *, read_only: bool = False,
                  options: Sequence[str] = (), attributes: int = 0, userxattr: bool | None = None) -> None:
    """Mount at the folder `target`, in the caller's mount namespace."""
    try:
        place = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"overlay: mount point {target}: {error.strerror}") from None
    try:
        try:
            fd = make(lowers, upper, work, read_only=read_only, options=options, attributes=attributes,
                      userxattr=userxattr)
        except KernelError as error:
            if error.errno != EINVAL or "lowerdir+" not in str(error):
                raise
            _mount_by_page(lowers, upper, work, place, read_only, options, attributes, userxattr)
            return
        try:
            move(fd, place)
        finally:
            os.close(fd)
    finally:
        os.close(place)


def _mount_by_page(lowers: Sequence[str], upper: str, work: str, place: int, read_only: bool, options: Sequence[str],
                   attributes: int, userxattr: bool | None) -> None:
    """mount(2), for a kernel without lowerdir+."""
    held: list[int] = []
    try:
        for path in (*lowers, upper, work):
            held.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if path else -1)
        names = [f"/proc/self/fd/{fd}" for fd in held]
        data = "lowerdir=" + ":".join(names[:-2])
        data += f",upperdir={names[-2]},workdir={names[-1]}" if upper else ""
        data += ",userxattr" if (in_user_namespace() if userxattr is None else userxattr) else ""
        page = ",".join([data, *options]).encode()
        if len(page) >= _PAGE:
            raise ImageError(f"overlay: {len(lowers)} layers are too many for this host's kernel",
                             "Linux 6.7 or newer takes 500; or squash the image")
        flags = (_MS_RDONLY if read_only or attributes & ATTR["rdonly"] else 0) | attributes & (_MS_NOSUID | _MS_NODEV)
        syscall("mount of overlay", _SYS_MOUNT, b"overlay", f"/proc/self/fd/{place}".encode(), b"overlay", flags, page)
    except OSError as error:
        raise ImageError(f"overlay: {error.filename}: {error.strerror}") from None
    finally:
        for fd in held:
            if fd >= 0:
                os.close(fd)
