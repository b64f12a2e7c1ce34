"""Copying a part of a file with its holes: blocks are shared where the file system can, else copied by the kernel.

FICLONERANGE (man 2 ioctl_ficlonerange; XFS, Btrfs, ...) takes no time, whatever the size. Without it, data is found by
SEEK_DATA (man 2 lseek) and moved by copy_file_range(2), and read and written where that can't be, between file systems
of an old kernel. Left out: holes that stand in the file as blocks of zeros. Driven by tests/unit/test_linux_sparse.py.
"""

from __future__ import annotations

__all__ = ["copy_sparse"]

import errno
import fcntl
import os
from struct import pack

from hv.linux.files import fallocate

_FICLONERANGE = 0x4020940D      # include/uapi/linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02        # include/uapi/linux/falloc.h
_BLOCK = 4096                   # what may be shared is whole blocks, on all file systems that can
_PIECE = 1 << 20                # bytes for one read and write
_MOST = 1 << 30                 # bytes for one copy_file_range, which takes no more than 2 GiB


def copy_sparse(source: int, source_at: int, target: int, target_at: int, length: int, *, over: bool = False) -> None:
    """`length` bytes of one descriptor into the other, which must be regular files or block devices. OSError.

    The target reads as zeros there before, or `over` what is there is replaced. What is not there of the source reads
    as zeros. Neither descriptor may be O_DIRECT; their positions move.
    """
    shared = length & -_BLOCK
    if shared and not _clone(source, source_at, target, target_at, shared):
        shared = 0
    end, done = source_at + length, source_at + shared
    while done < end:
        start, stop = _next_data(source, done, end)
        if over and start > done:
            _zero(target, target_at + done - source_at, start - done)
        if start < stop:
            _copy(source, start, target, target_at + start - source_at, stop - start, over)
        done = stop


def _clone(source: int, source_at: int, target: int, target_at: int, length: int) -> bool:
    """Share the blocks. Not where they don't begin at a block's start, or between file systems: then False."""
    try:
        fcntl.ioctl(target, _FICLONERANGE, pack("<qQQQ", source, source_at, length, target_at))
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def _next_data(fd: int, at: int, end: int) -> tuple[int, int]:
    """(start, end) of the next data from `at` on; both `end` where there is none."""
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
        return min(start, end), min(os.lseek(fd, start, os.SEEK_HOLE), end)
    except OSError as error:
        if error.errno == errno.ENXIO:      # nothing but a hole up to the file's end
            return end, end
        return at, end                      # a block device: all of it is data


def _zero(fd: int, at: int, length: int) -> None:
    try:
        fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, at, length)
    except OSError:
        for start in range(at, at + length, _PIECE):
            _write(fd, bytes(min(_PIECE, at + length - start)), start)


def _copy(source: int, source_at: int, target: int, target_at: int, length: int, over: bool) -> None:
    done = 0
    while done < length:
        try:
            moved = os.copy_file_range(source, target, min(_MOST, length - done), source_at + done, target_at + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            moved = 0
        done += moved or _by_hand(source, source_at + done, target, target_at + done, min(_PIECE, length - done), over)


def _by_hand(source: int, source_at: int, target: int, target_at: int, length: int, over: bool) -> int:
    data = os.pread(source, length, source_at)
    if not data:
        raise OSError(errno.EIO, "the file has become shorter")
    if over or data != bytes(len(data)):
        _write(target, data, target_at)
    return len(data)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        moved = os.pwrite(fd, view, at)
        view, at = view[moved:], at + moved
