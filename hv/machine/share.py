"""One machine's part of a loop that serves many: what it watches, its timers, its calls.

It looks like the loop. What the machine's handlers raise ends that machine and not the loop; and once `close` has
returned, nothing of the machine runs any more: its descriptors are not watched, its timers are forgotten, calls under
way find that it is gone. So descriptors can be closed and guest RAM be unmapped while the others are served.
Driven by tests/unit/test_share.py and tests/kvm/test_fleet.py.
"""

from __future__ import annotations

__all__ = ["Share"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.machine.loop import Loop


class Share:
    """A part of `loop`; failed(error) is told of what no handler caught."""

    def __init__(self, loop: Loop, failed: Callable[[Exception], None]) -> None:
        self._loop = loop
        self._failed = failed
        self._fds: set[int] = set()
        self._timers: dict[object, object] = {}
        self.closed = False

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> bool:
        """Loop.add."""
        if self.closed:
            return False

        def ready(seen: int) -> None:
            self._run(lambda: handler(seen))

        added = self._loop.add(fd, events, ready)
        if added:
            self._fds.add(fd)
        return added

    def modify(self, fd: int, events: int) -> None:
        """Loop.modify."""
        if fd in self._fds:
            self._loop.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Loop.remove; one of another machine's can't be meant."""
        if fd in self._fds:
            self._fds.discard(fd)
            self._loop.remove(fd)

    def call(self, function: Callable[[], None]) -> None:
        """Loop.call."""
        self._loop.call(lambda: self._run(function))

    def call_later(self, seconds: float, function: Callable[[], None]) -> object:
        """Loop.call_later."""
        mine = object()

        def due() -> None:
            self._timers.pop(mine, None)
            self._run(function)

        if not self.closed:
            self._timers[mine] = None       # ahead of its end, which another thread may see
            timer = self._loop.call_later(seconds, due)
            if mine in self._timers:
                self._timers[mine] = timer
        return mine

    def cancel(self, timer: object) -> None:
        """Loop.cancel."""
        theirs = self._timers.pop(timer, None)
        if theirs is not None:
            self._loop.cancel(theirs)

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Loop.run_until: all machines are served, not this one alone."""
        return self._loop.run_until(done, timeout)

    def run_there(self, function: Callable[[], None]) -> None:
        """Loop.run_there."""
        self._loop.run_there(function)

    def close(self) -> None:
        """Leave the loop; waits for a handler of this machine that runs just now. May be called twice."""
        if not self.closed:
            self._loop.run_there(self._leave)

    def _leave(self) -> None:
        self.closed = True
        for fd in tuple(self._fds):
            self.remove(fd)
        for timer in tuple(self._timers):
            self.cancel(timer)

    def _run(self, function: Callable[[], None]) -> None:
        if self.closed:
            return
        try:
            function()
        except Exception as error:
            self._failed(error)
