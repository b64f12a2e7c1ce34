"""System calls on files that the os module lacks. They raise OSError, as its functions do.

`open_beneath` is openat2(2): one name in one directory, no symbolic link followed, no mount point crossed unless the
caller wants that. It gives an O_PATH descriptor, which opens nothing: a device or a FIFO feels nothing of it.

Driven by tests/unit/test_linux_files.py.
"""

from __future__ import annotations

__all__ = ["OMIT", "RENAME_EXCHANGE", "RENAME_NOREPLACE", "fallocate", "open_beneath", "read_directory", "rename",
           "set_times", "sync_filesystem"]

import os
from ctypes import (
    Array,
    Structure,
    byref,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_long,
    c_size_t,
    c_uint,
    c_uint64,
    c_void_p,
)

from hv.linux.libc import LIBC, get_errno

OMIT = (1 << 30) - 2            # UTIME_OMIT: leave this time as it is (man 2 utimensat)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2        # include/uapi/linux/fs.h

_OPENAT2 = 437                  # the same on every architecture (include/uapi/asm-generic/unistd.h)
_AT_FDCWD = -100
# include/uapi/linux/openat2.h
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08


class _OpenHow(Structure):
    _fields_ = (("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64))


class _Timespec(Structure):
    _fields_ = (("seconds", c_int64), ("nanoseconds", c_long))


_FLAGS, _WAYS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, (_RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS
                                                           | _RESOLVE_BENEATH)
_HOW, _HOW_CROSSING = _OpenHow(_FLAGS, 0, _WAYS | _RESOLVE_NO_XDEV), _OpenHow(_FLAGS, 0, _WAYS)
_HOW_REF, _HOW_CROSSING_REF, _HOW_SIZE = byref(_HOW), byref(_HOW_CROSSING), 24

_openat2 = LIBC["syscall"]
_openat2.argtypes = (c_long, c_int, c_char_p, c_void_p, c_size_t)
_openat2.restype = c_long
_renameat2 = LIBC["renameat2"]
_renameat2.argtypes = (c_int, c_char_p, c_int, c_char_p, c_uint)
_utimensat = LIBC["utimensat"]
_utimensat.argtypes = (c_int, c_char_p, c_void_p, c_int)
_fallocate = LIBC["fallocate"]
_fallocate.argtypes = (c_int, c_int, c_int64, c_int64)
_getdents64 = LIBC["getdents64"]
_getdents64.argtypes = (c_int, c_void_p, c_size_t)
_getdents64.restype = c_long
_syncfs = LIBC["syncfs"]
_syncfs.argtypes = (c_int,)


def _checked(result: int) -> int:
    if result < 0:
        number = get_errno()
        raise OSError(number, os.strerror(number))
    return result


def open_beneath(name: bytes, dir_fd: int, crossing: bool = False) -> int:
    """An O_PATH descriptor of `name` in the directory `dir_fd`; of the link itself where it is a symbolic link.

    `crossing`: what is mounted there, rather than EXDEV.
    """
    return _checked(_openat2(_OPENAT2, dir_fd, name, _HOW_CROSSING_REF if crossing else _HOW_REF, _HOW_SIZE))


def rename(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2): `flags` may keep it from replacing a file, or exchange two."""
    _checked(_renameat2(old_fd, old, new_fd, new, flags))


def set_times(path: bytes, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    """utimensat(2), with (seconds, nanoseconds) of which the latter may be OMIT."""
    times = (_Timespec * 2)(_Timespec(*accessed), _Timespec(*modified))
    _checked(_utimensat(_AT_FDCWD, path, byref(times), 0))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode."""
    _checked(_fallocate(fd, mode, offset, length))


def read_directory(fd: int, buffer: Array[c_char]) -> int:
    """getdents64(2): entries into `buffer`, how many bytes they take; 0 at the end."""
    return _checked(_getdents64(fd, buffer, len(buffer)))


def sync_filesystem(fd: int) -> None:
    """syncfs(2): everything of the file system `fd` is in reaches the disk."""
    _checked(_syncfs(fd))
