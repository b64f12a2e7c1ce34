"""The I/O loop: one epoll set that serves every machine in the process.

vCPU threads and signal handlers reach it through `call`, which is safe from any thread.
"""

from __future__ import annotations

__all__ = ["Loop"]

import os
import select
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT


class Loop:
    """Descriptors, timers and calls from other threads, run by whoever calls `run_until`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._calls: list[Callable[[], None]] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._epoll.register(self._wake, EPOLLIN)

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> bool:
        """Call handler(events) when `fd` is ready. False where the descriptor can't be polled (a regular file)."""
        try:
            self._epoll.register(fd, events)
        except PermissionError:
            return False
        self._handlers[fd] = handler
        return True

    def modify(self, fd: int, events: int) -> None:
        """Change the events that `fd` is watched for."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; it may be called for one that was never added."""
        if self._handlers.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except (OSError, ValueError):
                pass    # the descriptor was closed behind our back, and epoll has dropped it; or the loop is closed

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop's thread run `function` soon. Safe from any thread and from signal handlers."""
        self._calls.append(function)
        try:
            os.eventfd_write(self._wake, 1)
        except (BlockingIOError, OSError):
            pass        # already awake, or closed: nobody runs it any more

    def call_later(self, seconds: float, function: Callable[[], None]) -> object:
        """Run `function` after `seconds`; the answer cancels it through `cancel`."""
        timer = (monotonic() + seconds, function)
        self._timers.append(timer)
        self.call(_nothing)     # the wait in progress may be longer
        return timer

    def cancel(self, timer: object) -> None:
        """Forget a timer; it may have run already."""
        try:
            self._timers.remove(timer)  # type: ignore[arg-type]
        except ValueError:
            pass

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Serve events until done() is true; False when `timeout` seconds passed first."""
        end = None if timeout is None else monotonic() + timeout
        while not done():
            if end is not None and monotonic() >= end:
                return False
            self._step(end)
        return True

    def _step(self, end: float | None) -> None:
        deadlines = [timer[0] for timer in self._timers]
        if end is not None:
            deadlines.append(end)
        wait = max(0.0, min(deadlines) - monotonic()) if deadlines else None
        for fd, events in self._epoll.poll(wait):
            if fd == self._wake:
                os.eventfd_read(fd)
                for _ in range(len(self._calls)):
                    self._calls.pop(0)()        # one by one: swapping the list could lose what a thread appends
            elif (handler := self._handlers.get(fd)) is not None:
                handler(events)
        if self._timers:
            now = monotonic()
            # Taken out one by one, as calls are: another thread may be adding.
            for timer in [timer for timer in self._timers if timer[0] <= now]:
                if timer in self._timers:       # unless one before it has cancelled it
                    self._timers.remove(timer)
                    timer[1]()

    def close(self) -> None:
        """Close the epoll set; watched descriptors stay open."""
        self._epoll.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1


def _nothing() -> None:
    pass
