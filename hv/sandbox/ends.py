"""A process's standard streams on the host: what is read for its input, what its output is written to.

The descriptors may be anything (pipes, sockets, terminals, files) and belong to others as well, whose view of them must
not change: O_NONBLOCK is a property of what is open, not of the descriptor. So a pipe or a terminal is opened anew by
/proc, a socket asked with MSG_DONTWAIT, and where neither can be, no more is written at a time than poll(2) promises.
The ends made here are own descriptors, the caller's stay the caller's. Driven by tests/unit/test_guest_process.py.
"""

from __future__ import annotations

__all__ = ["Sink", "Source"]

import os
import stat
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, dup, socket
from errno import EAGAIN, EINTR
from select import EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import Io

PIPE_BUF = 4096             # pipe(7): what a pipe that poll(2) calls writable takes without waiting
READ_MOST = 32 << 10
PTMX = os.makedev(5, 2)     # Documentation/admin-guide/devices.txt: opening it anew makes another terminal


class Watched:
    """A descriptor in an I/O loop: watched only while somebody wants to, since the loop is level-triggered."""

    def __init__(self, io: Io, fd: int, events: int, ready: Callable[[], None]) -> None:
        self._io, self._fd, self._events, self._ready = io, fd, events, ready
        self._watching = False
        self._pollable = True

    def want(self, wanted: bool) -> None:
        """Call ready() when it can be read, or written."""
        if wanted == self._watching:
            return
        self._watching = wanted
        if not wanted:
            if self._pollable:
                self._io.remove(self._fd)
        elif not self._pollable or not self._io.add(self._fd, self._events, self._on_event):
            self._pollable = False          # a regular file always is
            self._io.call(self._again)

    def _on_event(self, events: int) -> None:
        self._ready()

    def _again(self) -> None:
        if self._watching:
            self._ready()
            if self._watching:
                self._io.call(self._again)


class _End:
    """An own descriptor for the caller's `fd`."""

    EVENTS = 0
    ACCESS = 0

    def __init__(self, io: Io, fd: int, ready: Callable[[], None]) -> None:
        mode = os.fstat(fd)
        self.is_socket = stat.S_ISSOCK(mode.st_mode)
        self.waits = False          # whether a call may wait, so that only small ones are made
        self.fd = self._open(fd, mode)
        self.watched = Watched(io, self.fd, self.EVENTS, ready)

    def _open(self, fd: int, status: os.stat_result) -> int:
        if self.is_socket:
            return dup(fd)
        if stat.S_ISFIFO(status.st_mode) or (stat.S_ISCHR(status.st_mode) and status.st_rdev != PTMX and os.isatty(fd)):
            try:
                return os.open(f"/proc/self/fd/{fd}", self.ACCESS | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError:
                pass            # another user's, perhaps
        self.waits = True
        return dup(fd)

    def close(self) -> None:
        """Give it back."""
        if self.fd >= 0:
            self.watched.want(False)
            os.close(self.fd)
            self.fd = -1


class Source(_End):
    """Where input comes from."""

    EVENTS = EPOLLIN
    ACCESS = os.O_RDONLY

    def read(self, most: int) -> bytes | None:
        """Up to `most` bytes once it can be read; None where there is nothing yet, b"" at its end."""
        try:
            return os.read(self.fd, min(most, READ_MOST))
        except OSError as error:
            return None if error.errno in (EAGAIN, EINTR) else b""


class Sink(_End):
    """Where output goes. What it does not take is kept in `pending`."""

    EVENTS = EPOLLOUT
    ACCESS = os.O_WRONLY

    def __init__(self, io: Io, fd: int, ready: Callable[[], None]) -> None:
        super().__init__(io, fd, ready)
        self.pending = memoryview(b"")
        self._socket = socket(fileno=dup(fd)) if self.is_socket else None

    def write(self, data: bytes) -> bool:
        """Pass on `data`, nothing being pending. False where nobody reads it any more."""
        self.pending = memoryview(data)
        return self.flush() if not self.waits else self._settle()

    def flush(self) -> bool:
        """Pass on what is pending, now that it can be. False where nobody reads it any more."""
        try:
            while self.pending:
                if self._socket is not None:
                    count = self._socket.send(self.pending, MSG_DONTWAIT | MSG_NOSIGNAL)
                else:
                    count = os.write(self.fd, self.pending[:PIPE_BUF] if self.waits else self.pending)
                self.pending = self.pending[count:]
                if self.waits:
                    break           # until poll(2) promises again
        except OSError as error:
            if error.errno not in (EAGAIN, EINTR):
                self.pending = memoryview(b"")
                self._settle()
                return False
        return self._settle()

    def _settle(self) -> bool:
        self.watched.want(bool(self.pending))
        return True

    def close(self) -> None:
        """Give it back, with what is pending."""
        self.pending = memoryview(b"")
        super().close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
