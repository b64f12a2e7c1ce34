"""Files of the image store: locks, whole-or-nothing replacement, errors in one line.

Driven by tests/unit/test_image_store.py.
"""

from __future__ import annotations

__all__ = ["Lock", "make_folders", "reading", "replace", "said", "sync_folder"]

import errno
import fcntl
import os
import time

from hv.errors import HvError, ImageError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FOLDERS = ("blobs/sha256", "partial", "tmp", "users", "layers/sha256")
_POLL = 0.02


class Lock:
    """flock(2) on a file, as a context manager; the kernel releases it when the process ends, however it ends.

    Not inherited: a child that is forked while it is held shares it until either closes it, so fork before or after.
    """

    __slots__ = ("fd", "path", "shared", "wait")

    def __init__(self, path: str, shared: bool, wait: float | None = None) -> None:
        self.path, self.shared, self.wait, self.fd = path, shared, wait, -1

    def __enter__(self) -> Lock:
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if self.wait is None:
                fcntl.flock(self.fd, kind)
            else:
                self._within(kind, time.monotonic() + self.wait)
        except OSError as error:
            self.__exit__()
            raise said(error, f"locking {self.path}") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def _within(self, kind: int, end: float) -> None:
        while True:
            try:
                fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise StateError(f"{self.path}: another command is at work here",
                                     "try again when it has ended") from None
                time.sleep(_POLL)

    def __exit__(self, *_: Any) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def make_folders(root: str, files: dict[str, str]) -> None:
    """The store's folders and its fixed files, where they are missing."""
    if all(os.path.exists(f"{root}/{name}") for name in (*_FOLDERS, *files)):
        return
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        for name in _FOLDERS:
            os.makedirs(f"{root}/{name}", exist_ok=True)
        with Lock(f"{root}/lock", shared=True):         # so that nobody empties tmp/ meanwhile
            for name, content in files.items():
                if not os.path.exists(f"{root}/{name}"):
                    replace(f"{root}/{name}", content.encode(), f"{root}/tmp/{os.urandom(8).hex()}")
    except OSError as error:
        raise said(error, f"making {root}") from None


def replace(path: str, content: bytes, temporary: str, sync: bool = True) -> None:
    """`path` holds `content`, or what it held before, whenever the power fails."""
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fdatasync(file.fileno())
        os.rename(temporary, path)
        if sync:
            sync_folder(os.path.dirname(path))
    except OSError as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise said(error, f"writing {path}") from None


def sync_folder(path: str) -> None:
    """Names made and removed in the folder reach the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def reading(path: str, limit: int) -> bytes | None:
    """A small file whole; None if it is not there, ImageError if it is larger than `limit`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise said(error, f"reading {path}") from None
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ImageError(f"{path}: {size} bytes are more than {limit}")
        pieces = []
        while piece := os.read(fd, size + 1):
            pieces.append(piece)
        return b"".join(pieces)
    except OSError as error:
        raise said(error, f"reading {path}") from None
    finally:
        os.close(fd)


def said(error: OSError, doing: str) -> HvError:
    """One line for a failed call on the store's files."""
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "`pyhv image prune` frees what no image uses"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "the store is $PYHV_DATA/images; root's is /var/lib/pyhv/images"
    return ImageError(f"image store: {doing}: {os.strerror(error.errno) if error.errno else error}", hint)
