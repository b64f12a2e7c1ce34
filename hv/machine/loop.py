"""The I/O loop: one epoll set that serves every machine in the process.

vCPU threads and signal handlers reach it through `call`, which is safe from any thread. One thread serves it at a time:
who calls `run_until` meanwhile looks on, and is woken after each step to ask again. A machine that shares a loop with
others has a part of it (hv/machine/share.py). Driven by tests/unit/test_loop.py.
"""

from __future__ import annotations

__all__ = ["Loop"]

import os
import select
from _thread import allocate_lock, get_ident
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT
_NEVER = float("inf")
_LOOK_AGAIN = 0.1           # s until run_there looks whether the thread that it waits for has gone


class Loop:
    """Descriptors, timers and calls from other threads, run by whoever calls `run_until`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._calls: list[Callable[[], None]] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._soonest = _NEVER              # of the timers, unless they have changed
        self._timers_changed = False
        self._serving = allocate_lock()     # held while a thread serves
        self._thread = 0                    # that one
        self._onlookers: list[LockType] = []
        self._epoll.register(self._wake, EPOLLIN)

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> bool:
        """Call handler(events) when `fd` is ready. False where the descriptor can't be polled (a regular file)."""
        before = self._handlers.get(fd)
        self._handlers[fd] = handler        # ahead of its first event, which may be the last
        try:
            self._epoll.register(fd, events)
        except OSError as error:
            if before is None:
                del self._handlers[fd]
            else:
                self._handlers[fd] = before
            if isinstance(error, PermissionError):
                return False
            raise
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
        self._timers_changed = True
        if self._thread != get_ident():
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
        end = _NEVER if timeout is None else monotonic() + timeout
        me = get_ident()
        while not done():
            if monotonic() >= end:
                return False
            if self._thread == me:          # called by a handler
                self._step(end)
            elif self._serving.acquire(False):
                self._thread = me
                try:
                    while not done() and monotonic() < end:
                        self._step(end)
                        if self._onlookers:
                            self._wake_onlookers()
                finally:
                    self._thread = 0
                    self._serving.release()
                    self._wake_onlookers()
            else:
                self._look_on(end)
        return True

    def run_there(self, function: Callable[[], None]) -> None:
        """Run `function` in the thread that serves the loop, and wait for it; here where none does."""
        if self._thread == get_ident():
            function()
            return
        finished = allocate_lock()
        finished.acquire()
        errors: list[BaseException] = []

        def run() -> None:
            if finished.locked():       # else it was run here meanwhile
                try:
                    function()
                except BaseException as error:
                    errors.append(error)
                finally:
                    finished.release()

        asked = False
        while True:
            if self._serving.acquire(False):
                self._thread = get_ident()
                try:
                    run()
                finally:
                    self._thread = 0
                    self._serving.release()
                    self._wake_onlookers()
                break
            if not asked:
                asked = True
                self.call(run)
            if finished.acquire(True, _LOOK_AGAIN):
                finished.release()
                break
        if errors:
            raise errors[0]

    def _look_on(self, end: float) -> None:
        """Another thread serves: wait until it has done something."""
        turn = allocate_lock()
        turn.acquire()
        self._onlookers.append(turn)
        try:
            if self._serving.locked():      # it wakes those it finds when it stops
                turn.acquire(True, -1 if end == _NEVER else max(0.0, end - monotonic()))
        finally:
            self._onlookers.remove(turn)

    def _wake_onlookers(self) -> None:
        for turn in list(self._onlookers):
            try:
                turn.release()
            except RuntimeError:
                pass        # it was woken before and has not looked yet

    def _step(self, end: float) -> None:
        if self._timers_changed:
            self._timers_changed = False    # first: another thread may be adding
            self._soonest = min([timer[0] for timer in self._timers], default=_NEVER)
        until = min(self._soonest, end)
        wait = None if until == _NEVER else max(0.0, until - monotonic())
        for fd, events in self._epoll.poll(wait):
            if fd == self._wake:
                os.eventfd_read(fd)
                for _ in range(len(self._calls)):
                    self._calls.pop(0)()        # one by one: swapping the list could lose what a thread appends
            elif (handler := self._handlers.get(fd)) is not None:
                handler(events)
        if self._soonest <= (now := monotonic()):
            self._timers_changed = True
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
