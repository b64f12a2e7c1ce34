"""Opening what the user names: kernels, initrds, modules. Small files are read, large ones mapped."""

from __future__ import annotations

__all__ = ["open_file"]

import os
from stat import S_ISREG

from hv.errors import ImageError

_MAP_FROM = 1 << 20     # bytes: below, one read is cheaper than a mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap


def open_file(source: str | bytes, what: str) -> bytes | mmap.mmap:
    """The contents of the file at `source`, or `source` itself when it is bytes.

    ImageError where it is missing, unreadable, empty or not a regular file; `what` names its role.
    """
    if isinstance(source, bytes):
        return source
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)    # a FIFO must not hang us
    except OSError as error:
        raise ImageError(f"{what} {source}: {os.strerror(error.errno or 0)}", f"check the path of the {what}") from None
    try:
        status = os.fstat(fd)
        if not S_ISREG(status.st_mode):
            raise ImageError(f"{what} {source}: not a regular file", f"name a file that holds the {what}")
        if not status.st_size:
            raise ImageError(f"{what} {source}: the file is empty", "it may be a download that failed")
        if status.st_size < _MAP_FROM:
            return os.read(fd, status.st_size)
        import mmap

        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ImageError(f"{what} {source}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(fd)
