"""A token bucket: how long a device must wait so that it stays below a rate.

Driven by tests/unit/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["TokenBucket"]

from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BURST_SECONDS = 0.1         # what was not used lately may be used at once, up to that much of it


class TokenBucket:
    """`rate` units a second. What is bigger than the bucket goes through whole, and is paid for afterwards."""

    __slots__ = ("_clock", "_last", "_most", "_tokens", "rate")

    def __init__(self, rate: float, clock: Callable[[], float] = monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._most = self._tokens = rate * BURST_SECONDS
        self._last = clock()

    def delay(self) -> float:
        """Seconds until something may go through; 0 where it may now."""
        now = self._clock()
        self._tokens = min(self._most, self._tokens + (now - self._last) * self.rate)
        self._last = now
        return -self._tokens / self.rate if self._tokens < 0 else 0.0

    def spend(self, amount: float) -> None:
        """`amount` went through."""
        self._tokens -= amount
