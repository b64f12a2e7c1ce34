"""Mounting by descriptors, so that no path is looked up twice (man 2 fsopen, open_tree, move_mount, mount_setattr).

Linux 5.12 or newer. A mount is made first, detached, and then put onto an open directory or file: whatever the
container's image does to the path meanwhile changes nothing.
"""

from __future__ import annotations

__all__ = ["ATTR", "PROPAGATION", "clone_tree", "move", "new_filesystem", "open_in", "pivot_root", "set_attributes",
           "set_propagation", "umount"]

import ctypes
import os

from hv.linux.libc import LIBC, check

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_PIVOT_ROOT, _SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 155, 428, 429, 430, 431, 432
_SYS_OPENAT2, _SYS_MOUNT_SETATTR = 437, 442

# include/uapi/linux/mount.h
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_F_EMPTY_PATH, _MOVE_T_EMPTY_PATH = 0x4, 0x40
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE, _AT_NO_AUTOMOUNT = -100, 0x1000, 0x8000, 0x800
ATTR = {"rdonly": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "relatime": 0, "noatime": 0x10,
        "strictatime": 0x20, "atime": 0x70, "nodiratime": 0x80, "idmap": 0x100000, "nosymfollow": 0x200000}
PROPAGATION = {"shared": 1 << 20, "slave": 1 << 19, "private": 1 << 18, "unbindable": 1 << 17}  # linux/mount.h, MS_*
MNT_DETACH = 2
# include/uapi/linux/openat2.h
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10

_syscall = LIBC["syscall"]
_syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = (("attr_set", ctypes.c_uint64), ("attr_clr", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns_fd", ctypes.c_uint64))


def open_in(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2(2): `path` as it would be found with `root_fd` as root; symbolic links can't lead out of it."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    fd: int = check(_syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)),
                    f"openat2({path})")
    return fd


def new_filesystem(kind: str, source: str, options: list[str], attributes: int = 0) -> int:
    """A new, detached mount of file system `kind`; `options` are its own, as `name` or `name=value`."""
    fs: int = check(_syscall(_SYS_FSOPEN, os.fsencode(kind), _FSOPEN_CLOEXEC), f"fsopen({kind})",
                    "the host's kernel may lack this file system")
    try:
        if source:
            _config(fs, _FSCONFIG_SET_STRING, "source", source, kind)
        for option in options:
            name, equals, value = option.partition("=")
            _config(fs, _FSCONFIG_SET_STRING if equals else _FSCONFIG_SET_FLAG, name, value if equals else None, kind)
        check(_syscall(_SYS_FSCONFIG, fs, _FSCONFIG_CMD_CREATE, None, None, 0), f"mount of {kind}")
        fd: int = check(_syscall(_SYS_FSMOUNT, fs, _FSMOUNT_CLOEXEC, attributes), f"fsmount({kind})")
        return fd
    finally:
        os.close(fs)


def _config(fs: int, command: int, name: str, value: str | None, kind: str) -> None:
    check(_syscall(_SYS_FSCONFIG, fs, command, os.fsencode(name), None if value is None else os.fsencode(value), 0),
          f"mount of {kind} with option {name}")


def clone_tree(dir_fd: int, path: str, recursive: bool) -> int:
    """open_tree(2): a detached copy of the mount at `path` (\"\": at dir_fd itself), a bind mount to be."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_NO_AUTOMOUNT | (_AT_RECURSIVE if recursive else 0)
    if not path:
        flags |= _AT_EMPTY_PATH
    fd: int = check(_syscall(_SYS_OPEN_TREE, dir_fd, os.fsencode(path), flags), f"open_tree({path})")
    return fd


def set_attributes(fd: int, on: int, off: int = 0, *, recursive: bool = False, propagation: int = 0,
                   userns_fd: int = 0) -> None:
    """mount_setattr(2) on a mount: ATTR bits to set and clear, its propagation, an idmapping."""
    if off & 0x70 or on & 0x70:
        off |= 0x70                         # the access time modes are one field (MOUNT_ATTR__ATIME)
    if on & 0x70 == 0x70:
        on &= ~0x70
    attr = _MountAttr(on, off, propagation, userns_fd)
    check(_syscall(_SYS_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0),
                   ctypes.byref(attr), ctypes.sizeof(attr)), "mount_setattr")


def set_propagation(path: str, kind: int, *, recursive: bool) -> None:
    """Propagation of the mount at `path` (man 7 mount_namespaces)."""
    attr = _MountAttr(0, 0, kind, 0)
    check(_syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE if recursive else 0,
                   ctypes.byref(attr), ctypes.sizeof(attr)), f"mount_setattr({path})")


def move(fd: int, target_fd: int) -> None:
    """move_mount(2): attach the mount `fd` onto the open directory or file `target_fd`."""
    check(_syscall(_SYS_MOVE_MOUNT, fd, b"", target_fd, b"", _MOVE_F_EMPTY_PATH | _MOVE_T_EMPTY_PATH), "move_mount")


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    check(_syscall(_SYS_PIVOT_ROOT, os.fsencode(new), os.fsencode(old)), "pivot_root")


def umount(path: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    check(LIBC.umount2(os.fsencode(path), flags), f"umount2({path})")
