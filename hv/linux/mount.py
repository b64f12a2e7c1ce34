"""Mounting by descriptors, so that no path is looked up twice (man 2 fsopen, open_tree, move_mount, mount_setattr).

Linux 5.12 or newer. A mount is made first, detached, and then put onto an open directory or file: whatever the
container's image does to the path meanwhile changes nothing. `do` makes the calls: this process at once, or that of a
Hands.do (hands.py), whose results are handles.

Driven by tests/root/test_container_mounts.py.
"""

from __future__ import annotations

__all__ = ["ATTR", "PROPAGATION", "clone_tree", "filesystem_kind", "mount_id", "move", "new_filesystem", "open_in",
           "pivot_root", "read_file_in", "set_attributes", "set_propagation", "umount",
           "unescape"]

import os
import stat
from _struct import Struct

from hv.linux.syscall import buffer, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_CLOSE, _SYS_PIVOT_ROOT, _SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 3, 155, 428, 429
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_SYS_FSTATFS, _SYS_UMOUNT2, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 138, 166, 437, 442
_STATFS_SIZE = 120                      # struct statfs; its first word is the magic number

# include/uapi/linux/mount.h
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_F_EMPTY_PATH, _MOVE_T_EMPTY_PATH = 0x4, 0x40
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE, _AT_NO_AUTOMOUNT = -100, 0x1000, 0x8000, 0x800
ATTR = {"rdonly": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "relatime": 0, "noatime": 0x10,
        "strictatime": 0x20, "atime": 0x70, "nodiratime": 0x80, "idmap": 0x100000, "nosymfollow": 0x200000}
_ATIME = 0x70                           # MOUNT_ATTR__ATIME
PROPAGATION = {"shared": 1 << 20, "slave": 1 << 19, "private": 1 << 18, "unbindable": 1 << 17}  # linux/mount.h, MS_*
MNT_DETACH = 2
# include/uapi/linux/openat2.h
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10
_WORDS_3, _WORDS_4 = Struct("<3Q").pack, Struct("<4Q").pack

def open_in(root_fd: Any, path: str, flags: int, mode: int = 0, do: Any = syscall,
            may: Container[int] = ()) -> Any:
    """openat2(2): `path` as it would be found with `root_fd` as root; symbolic links can't lead out of it."""
    # struct open_how: flags, mode, resolve
    how = _WORDS_3(flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    return do(f"openat2({path})", _SYS_OPENAT2, root_fd, os.fsencode(path), how, 24, may=may)


def read_file_in(root_fd: int, path: str, most: int) -> bytes:
    """The first `most` bytes of a regular file found as by open_in; none where there is no such file. What else an
    image or a container has there is never opened: a device would be the host's, and some act on being opened.
    """
    place = open_in(root_fd, path, os.O_PATH, may=range(1, 4096))
    if place < 0:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return b""
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, most)
        finally:
            os.close(fd)
    except OSError:
        return b""
    finally:
        os.close(place)


def new_filesystem(kind: str, source: str, options: list[str], attributes: int = 0, do: Any = syscall) -> Any:
    """A new, detached mount of file system `kind`; `options` are its own, as `name` or `name=value`."""
    fs = do(f"fsopen({kind})", _SYS_FSOPEN, os.fsencode(kind), _FSOPEN_CLOEXEC,
                 hint="the host's kernel may lack this file system")
    try:
        if source:
            _config(fs, _FSCONFIG_SET_STRING, "source", source, kind, do)
        for option in options:
            name, equals, value = option.partition("=")
            _config(fs, _FSCONFIG_SET_STRING if equals else _FSCONFIG_SET_FLAG, name, value if equals else None, kind,
                    do)
        do(f"mount of {kind}", _SYS_FSCONFIG, fs, _FSCONFIG_CMD_CREATE, None, None, 0)
        return do(f"fsmount({kind})", _SYS_FSMOUNT, fs, _FSMOUNT_CLOEXEC, attributes)
    finally:
        do("close", _SYS_CLOSE, fs)


def _config(fs: Any, command: int, name: str, value: str | None, kind: str, do: Any) -> None:
    do(f"mount of {kind} with option {name}", _SYS_FSCONFIG, fs, command, os.fsencode(name),
       None if value is None else os.fsencode(value), 0)


def clone_tree(dir_fd: Any, path: str, recursive: bool, do: Any = syscall) -> Any:
    """open_tree(2): a detached copy of the mount at `path` (\"\": at dir_fd itself), a bind mount to be."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_NO_AUTOMOUNT | (_AT_RECURSIVE if recursive else 0)
    if not path:
        flags |= _AT_EMPTY_PATH
    return do(f"open_tree({path})", _SYS_OPEN_TREE, dir_fd, os.fsencode(path), flags)


def set_attributes(fd: Any, on: int, off: int = 0, *, recursive: bool = False, propagation: int = 0,
                   userns_fd: int = 0, do: Any = syscall) -> None:
    """mount_setattr(2) on a mount: ATTR bits to set and clear, its propagation, an idmapping."""
    if off & _ATIME or on & _ATIME:
        off |= _ATIME                       # the access time modes are one field, set only with all of it cleared
    if on & _ATIME == _ATIME:
        on &= ~_ATIME
    _setattr("mount_setattr", fd, b"", on, off, propagation, userns_fd, _AT_EMPTY_PATH, recursive, do)


def set_propagation(path: str, kind: int, *, recursive: bool, do: Any = syscall) -> None:
    """Propagation of the mount at `path` (man 7 mount_namespaces)."""
    _setattr(f"mount_setattr({path})", _AT_FDCWD, os.fsencode(path), 0, 0, kind, 0, 0, recursive, do)


def _setattr(what: str, fd: Any, path: bytes, on: int, off: int, propagation: int, userns_fd: int, flags: int,
             recursive: bool, do: Any) -> None:
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    do(what, _SYS_MOUNT_SETATTR, fd, path, flags | (_AT_RECURSIVE if recursive else 0),
       _WORDS_4(on, off, propagation, userns_fd), 32)


def move(fd: Any, target_fd: Any, do: Any = syscall) -> None:
    """move_mount(2): attach the mount `fd` onto the open directory or file `target_fd`."""
    do("move_mount", _SYS_MOVE_MOUNT, fd, b"", target_fd, b"", _MOVE_F_EMPTY_PATH | _MOVE_T_EMPTY_PATH)


def pivot_root(new: str, old: str, do: Any = syscall) -> None:
    """pivot_root(2)."""
    do("pivot_root", _SYS_PIVOT_ROOT, os.fsencode(new), os.fsencode(old))


def umount(path: str, flags: int = MNT_DETACH, do: Any = syscall) -> None:
    """umount2(2)."""
    do(f"umount2({path})", _SYS_UMOUNT2, os.fsencode(path), flags)


def mount_id(fd: int) -> int:
    """The number of the mount that `fd` lies on, as in /proc/PID/mountinfo (proc(5))."""
    with open(f"/proc/self/fdinfo/{fd}", "rb", 0) as info:
        for line in info.read().splitlines():
            if line.startswith(b"mnt_id:"):
                return int(line.split()[1])
    return -1


def unescape(word: bytes) -> str:
    """A path as it stands in mountinfo: blanks and backslashes are three octal digits behind a backslash."""
    first, *rest = word.split(b"\\")
    return os.fsdecode(first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest))


def filesystem_kind(fd: int) -> int:
    """The magic number of the file system that `fd` lies on (fstatfs(2), include/uapi/linux/magic.h)."""
    status = buffer(_STATFS_SIZE)
    syscall("fstatfs", _SYS_FSTATFS, fd, status)
    return int.from_bytes(status.raw[:8], "little")
