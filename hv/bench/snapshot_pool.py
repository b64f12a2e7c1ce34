"""Handing out running VMs: from a pool in this process, and from pools in others, by their sockets.

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["Door", "pool_groups", "served"]

import json
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager

from hv.bench.figures import Aim, Figure, Group, Run, measure
from hv.bench.harness import launcher, say
from hv.bench.snapshot_guest import Guests
from hv.bench.snapshot_replay import entry_of
from hv.errors import HvError
from hv.snapshot.pool import Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

READY = 8
_PATIENCE = 60.0


def pool_groups(guests: Guests, hand_outs: int) -> list[Group]:
    """Measured."""
    aims = Aim(2), Aim(10, "p99")
    taken = Figure("hv.Pool: take()", "ms", *aims)
    entered = Figure("hv.Pool: take() to the processor in the guest", "ms", *aims)
    one = Figure("pyhv pool serve, by its socket", "ms")
    each = Figure("pyhv pool serve --processes, by its socket", "ms")
    say(f"handing out {hand_outs} VMs from each pool")
    with ExitStack() as stack:
        pool = stack.enter_context(Pool(guests.alone, READY))
        doors = [stack.enter_context(served(guests, *options)) for options in ((), ("--processes",))]
        measure([Run(lambda: _take(pool), taken, entered), Run(lambda: [doors[0].take()], one),
                 Run(lambda: [doors[1].take()], each)], hand_outs, warm_up=3)
    text = (f"Pools that keep {READY} machines of the Linux guest ready; one is taken when it is full, and ended then. "
            " From the pool's own process by the library; by a socket from another process, with the VM's "
            "control socket there when the answer comes.")
    return [Group("pool", "A running VM from a pool", text, [taken, entered, one, each])]


def _take(pool: Pool) -> tuple[float, float]:
    _rest(lambda: pool.ready == READY)
    start = time.perf_counter_ns()
    machine = pool.take()
    taken = time.perf_counter_ns()
    entered = entry_of(machine)
    machine.stop()
    return (taken - start) / 1e6, (entered - start) / 1e6


def _rest(ready: Any) -> None:
    """Wait until the pool is full again."""
    end = time.monotonic() + _PATIENCE
    while not ready():
        if time.monotonic() > end:
            raise HvError("the pool does not fill")
        time.sleep(0.01)


class Door:
    """A pool server's socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_PATIENCE)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")

    def ask(self, command: str, **fields: object) -> dict[str, Any]:
        """The reply."""
        self._socket.sendall(json.dumps({"id": 1, "command": command} | fields).encode() + b"\n")
        reply: dict[str, Any] = json.loads(self._lines.readline() or b"{}")
        if reply.get("ok") is not True:
            raise HvError(f"the pool says {reply}")
        return reply

    def take(self) -> float:
        """ms until it had a VM for us; the VM is ended."""
        _rest(lambda: self.ask("status")["ready"] == READY)
        start = time.perf_counter_ns()
        reply = self.ask("take")
        spent = (time.perf_counter_ns() - start) / 1e6
        vm = Door(reply["socket"])
        vm.ask("stop", force=True)
        vm.close()
        return spent

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


@contextmanager
def served(guests: Guests, *options: str, size: int = READY, before: Sequence[str] = ()) -> Iterator[Door]:
    """A pool in a process of its own; its command stands behind the words `before`."""
    path = str(guests.place / f"pool{len(options)}")
    command = [*before, *launcher(), "pool", "serve", guests.alone, "--size", str(size), "--socket", path, "--name",
               f"bench-{guests.place.name[-6:]}-{len(options)}", *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as child:
        try:
            door = _connected(path, child)
            try:
                yield door
            finally:
                door.close()
        finally:
            child.terminate()
            child.wait(_PATIENCE)


def _connected(path: str, child: subprocess.Popen[bytes]) -> Door:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return Door(path)
        except OSError:
            if child.poll() is not None or time.monotonic() > end:
                raise HvError(f"pyhv pool serve did not come up ({child.poll()})") from None
            time.sleep(0.02)
