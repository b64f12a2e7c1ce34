"""Two threads for one layer: the caller's reads, decompresses and hashes, another one takes the plain bytes.

Both mostly work without the interpreter's lock (read, inflate, SHA-256 here; file system calls there). The other thread
has a umask of its own (unshare(CLONE_FS)). An error on either side ends both, and is raised once.

Driven by tests/unit/test_image_unpack.py.
"""

from __future__ import annotations

__all__ = ["Pipe", "wait_for"]

import os

from hv.errors import ImageError
from hv.image.inflate import Limits, inflate
from hv.linux.ns import unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _queue import SimpleQueue
    from collections.abc import Callable, Iterator

_AHEAD = 8                      # pieces of up to 1 MiB that may wait
_CLONE_FS = 0x200               # include/uapi/linux/sched.h


def wait_for(over: SimpleQueue[None], count: int, stop: Callable[[], object] | None = None) -> None:
    """Wait until `count` threads have put something. An interrupt calls `stop`, and is raised once all have.

    Not Thread.join, which after an interrupt takes a thread that runs for one that has ended (CPython 3.11).
    """
    interrupt: KeyboardInterrupt | None = None
    while count:
        try:
            over.get()
            count -= 1
        except KeyboardInterrupt as error:
            interrupt = error
            if stop:
                stop()
    if interrupt:
        raise interrupt


class Pipe:
    """For one blob, open as `blob_fd`."""

    def __init__(self, blob_fd: int, label: str, limits: Limits, progress: Callable[[int], object] | None) -> None:
        self._fd, self._label, self._limits, self._progress = blob_fd, label, limits, progress
        self._error: BaseException | None = None
        self._ended = False         # the blob came to its end

    def run(self, take: Callable[[Iterator[bytes]], None]) -> str:
        """Call `take` in the other thread with the plain bytes; their digest, once it has returned."""
        import threading
        from _queue import SimpleQueue
        from hashlib import sha256

        pieces: SimpleQueue[bytes | None] = SimpleQueue()       # None: no more, for whatever reason
        room: SimpleQueue[bool] = SimpleQueue()                 # False: the taker has failed
        for _ in range(_AHEAD):
            room.put(True)
        hasher = sha256()
        over: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._taking, args=(take, pieces, room, over), name="unpack").start()
        try:
            for piece in inflate(self._fd, self._label, self._limits, self._progress):
                if not room.get():
                    break
                pieces.put(piece)
                hasher.update(piece)
            else:
                self._ended = True
        finally:
            pieces.put(None)
            wait_for(over, 1)
        if self._error is not None:
            raise self._error
        return "sha256:" + hasher.hexdigest()

    def _taking(self, take: Callable[[Iterator[bytes]], None], pieces: SimpleQueue[bytes | None],
                room: SimpleQueue[bool], over: SimpleQueue[None]) -> None:
        try:
            unshare(_CLONE_FS)
            os.umask(0)
            take(self._pieces(pieces, room))
        except BaseException as error:
            self._error = error
            room.put(False)
        finally:
            over.put(None)

    def _pieces(self, pieces: SimpleQueue[bytes | None], room: SimpleQueue[bool]) -> Iterator[bytes]:
        while (piece := pieces.get()) is not None:
            yield piece
            room.put(True)
        if not self._ended:
            raise ImageError(f"{self._label}: unpacking was ended")     # the caller's own error is what is raised
