"""What `events` prints: one JSON object a line, as runc's does and engines parse.

    {"type":"stats","id":"NAME","data":{...}}       every interval (hv/container/cgroups/stats.py)
    {"type":"oom","id":"NAME"}                      each time the kernel killed processes for want of memory

Driven by tests/root/test_cgroups_oom.py.
"""

from __future__ import annotations

__all__ = ["stats_line", "watch"]

from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hv.container.cgroups.manager import Cgroup

_TICK = 0.5         # seconds: at most so long after a container's end its last line is printed


def stats_line(group: Cgroup, name: str) -> str:
    """The figures of now."""
    return dumps({"type": "stats", "id": name, "data": group.stats()})


def watch(group: Cgroup, name: str, interval: float, alive: Callable[[], bool]) -> Iterator[str]:
    """Lines until the container has ended (alive() says so), one with figures each `interval` seconds."""
    from select import poll
    from time import monotonic

    from hv.container.cgroups.oom import OomWatch

    oom, poller = OomWatch(group), poll()
    if oom.fd >= 0:
        poller.register(oom.fd, oom.events)
    due = monotonic() + interval
    try:
        while True:
            goes_on = alive()
            if goes_on:
                poller.poll(max(0.0, min(_TICK, due - monotonic())) * 1000)
            for _ in range(min(oom.news(), 1)):
                yield dumps({"type": "oom", "id": name})
            if not goes_on:
                return
            if monotonic() >= due:
                due = monotonic() + interval
                yield stats_line(group, name)
    finally:
        oom.close()
