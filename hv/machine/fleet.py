"""Many machines in one process: one thread serves their control sockets and timers, one their devices.

    with Host() as host:
        host.adopt("a", host.build(config))
        host.adopt("b", restore("snapshots/base", loop=host.loop, io=host.io), control="/run/b.sock")
        host.start("a")
        host.wait()

Each machine adds its processors' threads and nothing else. One that ends, or that a bug of ours ends, is closed by the
host's third thread and forgotten; the others do not notice. What they share is the process: its memory, its Python
(exits of all machines are served one at a time), its end. Where that is too close, give each a process of its own
(docs/pool.md). Driven by tests/kvm/test_fleet.py.
"""

from __future__ import annotations

__all__ = ["Host", "raise_descriptor_limit"]

import _signal
from _queue import SimpleQueue
from _thread import allocate_lock, start_new_thread

from hv.errors import ConfigError, HvError, StateError
from hv.machine.iothread import IoThread
from hv.machine.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.machine.config import MachineConfig
    from hv.machine.machine import Outcome

DESCRIPTORS_EACH = 12       # a machine with a processor, a device, a control socket and a client


class Host:
    """Machines by name. A context manager whose exit ends and closes them all.

    `ended(name, outcome)` is called when one has ended and its resources are back, in the host's own thread.
    """

    def __init__(self, ended: Callable[[str, Outcome | None], None] | None = None) -> None:
        self.machines: dict[str, Machine] = {}
        self.errors: list[str] = []         # bugs of ours that concern no single machine
        self._ended = ended
        self._lock = allocate_lock()        # of `machines`
        self._main, self.io = IoThread(self._failed), IoThread(self._failed)
        self.loop = self._main.loop
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._keeper_ended = allocate_lock()
        self._closed = False
        raise_descriptor_limit()
        self._main.start()
        self.io.start()
        self._keeper_ended.acquire()
        start_new_thread(self._keep, ())

    def build(self, config: MachineConfig) -> Machine:
        """A machine of `config` that this host serves; not yet started, nor known by a name."""
        return Machine(config, self.loop, io=self.io)

    def adopt(self, name: str, machine: Machine, *, control: str | None = None,
              commands: dict[str, str] | None = None) -> Machine:
        """Know `machine`, made with this host's `loop` and `io`, by `name`; it is closed when it has ended.

        `control`: the path of a control socket for it, with `commands` beyond the usual. ConfigError for a name that is
        taken, StateError where the host is closed; the machine is closed then.
        """
        try:
            with self._lock:
                if self._closed:
                    raise StateError("the host of this machine is closed")
                if name in self.machines:
                    raise ConfigError(f"there is a machine {name} already", "another name")
                self.machines[name] = machine
            if control is not None:
                machine.serve_control(control, commands)
        except BaseException:
            with self._lock:
                if self.machines.get(name) is machine:
                    del self.machines[name]
            machine.close()
            raise
        machine.at_end.append(lambda: self.later(lambda: self._forget(name, machine)))
        return machine

    def start(self, name: str) -> Machine:
        """Start the machine `name`."""
        machine = self.machines[name]
        machine.start()
        return machine

    def close_one(self, name: str) -> None:
        """End the machine `name`, wait until all it had is given back. Nothing happens where there is none."""
        machine = self.machines.get(name)
        if machine is not None:
            self._forget(name, machine)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no machine is left; False when `timeout` seconds passed first."""
        return self.loop.run_until(lambda: not self.machines, timeout)

    def later(self, job: Callable[[], None]) -> None:
        """Run `job` in the host's third thread, one after the other. Safe from any thread."""
        self._work.put(job)

    def stop_all(self, reason: str = "quit", detail: str = "") -> None:
        """Ask all machines to end; one that was never started is closed. Safe from any thread."""
        for name, machine in list(self.machines.items()):
            if machine.running():
                machine.stop(reason, detail)
            else:
                self.later(lambda name=name, machine=machine: self._forget(name, machine))  # type: ignore[misc]

    def close(self) -> None:
        """End and close all machines, then the threads. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for machine in list(self.machines.values()):
            machine.stop()      # all at once, then one after the other is waited for
        for name in list(self.machines):
            self.close_one(name)
        self._work.put(None)
        with self._keeper_ended:
            pass
        self._main.stop()
        self.io.stop()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # the third thread ------------------------------------------------------------------------------

    def _keep(self) -> None:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
        try:
            while (job := self._work.get()) is not None:
                try:
                    job()
                except HvError as error:
                    self.errors.append(str(error))
                except Exception as error:      # a bug of ours; the machines go on
                    self._failed(error)
        finally:
            self._keeper_ended.release()

    def _forget(self, name: str, machine: Machine) -> None:
        try:
            machine.close()
        finally:
            with self._lock:
                known = self.machines.get(name) is machine
                if known:
                    del self.machines[name]
            if known and self._ended is not None:
                self._ended(name, machine.outcome)
            self.loop.call(_nothing)        # who waits looks again

    def _failed(self, error: Exception) -> None:
        self.errors.append(f"{type(error).__name__}: {error}")


def raise_descriptor_limit(machines: int = 0) -> None:
    """The soft limit of open files to the hard one: a machine takes about ten. ConfigError where that is too few."""
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

    soft, hard = getrlimit(RLIMIT_NOFILE)
    if soft != hard and soft != RLIM_INFINITY:
        try:
            setrlimit(RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass
    if machines and soft != RLIM_INFINITY and machines * DESCRIPTORS_EACH + 64 > soft:
        raise ConfigError(f"{machines} machines need about {machines * DESCRIPTORS_EACH + 64} open files, the limit is "
                          f"{soft}", "raise it (`ulimit -Hn`, LimitNOFILE= of systemd), or ask for fewer machines")


def _nothing() -> None:
    pass
