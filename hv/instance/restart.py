"""Whether an instance that has ended is started again, and when (docker's --restart).

no; on-failure[:times]: where its exit code is not 0; always and unless-stopped: however it ended. Whoever stops it
stops it for good, until it is started by hand. The wait doubles from 100 ms up to a minute, and begins anew once the
instance has run for ten seconds. Driven by tests/unit/test_instance_settings.py.
"""

from __future__ import annotations

__all__ = ["wait_before"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.instance.settings import Settings

_FIRST, _MOST, _LONG_RUN = 0.1, 60.0, 10.0


def wait_before(settings: Settings, code: int, restarts: int, ran: float, last: float) -> float | None:
    """Seconds to wait, None where it stays ended. `restarts`: how often it was; `ran`: seconds that it ran; `last`:
    the wait before this run."""
    policy = settings.restart
    if policy == "no" or (policy == "on-failure" and code == 0):
        return None
    if policy == "on-failure" and settings.restart_most and restarts >= settings.restart_most:
        return None
    return _FIRST if ran >= _LONG_RUN or not last else min(2 * last, _MOST)
