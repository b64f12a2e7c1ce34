"""Machines ready to go: restored from one snapshot ahead of time, handed out running in less than a millisecond.

    with Pool("snapshots/base", ready=8) as pool:
        machine = pool.take()

A ready machine is built in full but for its processors' threads: starting one takes 0.2 ms, and until then it costs no
thread. Whoever takes the last one waits for a restore, 10 ms. The pool is
filled again in the host's background thread once nobody has taken anything for a moment: restoring holds Python's lock,
and who takes would wait for it. Machines differ from each other as clones do (docs/clones.md).
Driven by tests/kvm/test_pool.py.
"""

from __future__ import annotations

__all__ = ["Pool", "clone_recipe"]

from _thread import allocate_lock
from time import monotonic

from hv.errors import ConfigError, HvError, StateError
from hv.machine.fleet import Host, raise_descriptor_limit
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine

READY_MOST = 10_000
QUIET = 0.05            # s without a take until the pool is filled again; at once where less than half is left


class Pool:
    """`ready` machines of `snapshot`. A context manager whose exit gives back those that nobody took.

    Without `host` it makes one of its own: what was taken ends with the pool then, too. `options` are restore's.
    """

    def __init__(self, snapshot: Snapshot | str, ready: int = 4, *, host: Host | None = None, name: str = "vm",
                 **options: Any) -> None:
        if not 1 <= ready <= READY_MOST:
            raise ConfigError(f"a pool of {ready} machines, possible are 1 to {READY_MOST}", "change its size")
        raise_descriptor_limit(ready)
        self.snapshot = Snapshot(snapshot) if isinstance(snapshot, str) else snapshot
        self.size = ready
        self.name = name
        self.taken = 0                      # so far
        self.waited = 0                     # of these, restored while somebody waited
        self.error: HvError | None = None   # why it could not be filled the last time
        self._options = {"clock_now": True} | options
        self._ready: list[Machine] = []
        self._made = 0
        self._filling = False
        self._last_take = 0.0
        self._closed = False
        self._lock = allocate_lock()
        self._own_host = host is None
        self.host = host or Host()
        try:
            for _ in range(ready):          # an error is the caller's
                self._ready.append(self._make())
        except BaseException:
            self.close()
            raise

    @property
    def ready(self) -> int:
        """How many machines could be taken at once now."""
        return len(self._ready)

    def take(self, name: str | None = None, *, control: str | None = None,
             commands: dict[str, str] | None = None) -> Machine:
        """A running machine, known to the host as `name`; the host closes it when it has ended.

        `control`: the path of a control socket for it. Safe from any thread.
        """
        with self._lock:
            if self._closed:
                raise StateError("the pool is closed")
            self.taken += 1
            number = self.taken
            self._last_take = monotonic()
            machine = self._ready.pop() if self._ready else None
            self.waited += machine is None
        if machine is None:
            machine = self._make()
        self.host.adopt(f"{self.name}.{number}" if name is None else name, machine, control=control, commands=commands)
        machine.start()
        self._fill_later()
        return machine

    def close(self) -> None:
        """Give back what is ready, and with a host of its own what was taken. May be called twice."""
        with self._lock:
            self._closed = True
            ready, self._ready = self._ready, []
        for machine in ready:
            machine.close()
        if self._own_host:
            self.host.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make(self) -> Machine:
        with self._lock:
            self._made += 1
            number = self._made
        return restore(self.snapshot, loop=self.host.loop, io=self.host.io, recipe=clone_recipe(self.snapshot, number),
                       **self._options)

    # filling -----------------------------------------------------------------------------------------

    def _fill_later(self) -> None:
        with self._lock:
            if self._filling or self._closed:
                return
            self._filling = True
        if len(self._ready) * 2 < self.size:
            self.host.later(self._fill)
        else:
            self.host.loop.call_later(QUIET, lambda: self.host.later(self._fill))

    def _fill(self) -> None:
        """One machine more, in the host's thread; and again until it is full."""
        rest = self._last_take + QUIET - monotonic()
        if rest > 0 and len(self._ready) * 2 >= self.size:
            self.host.loop.call_later(rest, lambda: self.host.later(self._fill))
            return
        machine = None
        try:
            if not self._closed and len(self._ready) < self.size:
                machine = self._make()
                self.error = None
        except HvError as error:        # told to who takes next: it may be over then
            self.error = error
        with self._lock:
            if machine is not None and not self._closed:
                self._ready.insert(0, machine)
                machine = None
            again = self._filling = not self._closed and self.error is None and len(self._ready) < self.size
        if machine is not None:
            machine.close()             # the pool was closed meanwhile
        if again:
            self.host.later(self._fill)


def clone_recipe(snapshot: Snapshot, number: int) -> dict[str, Any]:
    """The configuration of clone `number`: what two machines can't both have is another's."""
    from hv.snapshot.clone import CLONES_MOST, distinct

    return distinct(snapshot.part("config"), number % CLONES_MOST, snapshot.part("id", kind=str))
