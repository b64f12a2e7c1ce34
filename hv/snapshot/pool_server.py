"""A pool at a socket: who connects gets a running VM by name (`pyhv pool serve`, docs/pool.md).

The socket speaks the protocol of control sockets (docs/control.md) with the commands take, status and stop. Behind it
is one of two stores of ready machines: this process's own (Pool), or processes forked from this one (zygote.py).
Driven by tests/kvm/test_pool.py.
"""

from __future__ import annotations

__all__ = ["Door", "InProcess", "serve_in_process", "status", "stop", "take"]

import os

from hv.machine.control import SUFFIX, Control, folder
from hv.snapshot.pool import Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from hv.machine.control_call import Call
    from hv.machine.loop import Loop
    from hv.machine.share import Share

    class Store(Protocol):
        """Where ready machines are."""

        def take(self, call: Call, name: str, path: str) -> dict[str, Any] | None:
            """Hand one out under that name with its control socket at `path`; None where call.answer() follows."""

        def status(self) -> dict[str, Any]:
            """For people."""

COMMANDS = {name: f"hv.snapshot.pool_server:{name}" for name in ("take", "status", "stop")} | {
    "help": "hv.machine.control_commands:help"}


class Door:
    """The pool's socket at `path`, served by `loop`; `stopping` turns true when somebody asked the pool to end."""

    def __init__(self, loop: Loop | Share, path: str, store: Store, name: str) -> None:
        self.loop = loop
        self.store = store
        self.name = name
        self.stopping = False
        self._number = 0
        # what a control socket wants of a machine is its loop
        self.control = Control(self, path, COMMANDS, only=True)     # type: ignore[arg-type]

    def next_name(self) -> tuple[str, str]:
        """A VM name that nobody has, and the path of its socket."""
        while True:
            self._number += 1
            name = f"{self.name}.{self._number}"
            path = f"{folder()}/{name}{SUFFIX}"
            if not os.path.lexists(path):
                return name, path

    def stop(self) -> None:
        """Ask the pool to end. Safe from any thread and from signal handlers."""
        self.stopping = True
        self.loop.call(_nothing)

    def close(self) -> None:
        """The pool has ended: answer who waits for that, hang up."""
        self.loop.run_there(self.control.end)
        self.loop.run_there(self.control.close)


def take(call: Call) -> dict[str, Any] | None:
    """A running VM: its name, the path of its control socket, the process it is in."""
    door: Any = call.machine
    name, path = door.next_name()
    reply: dict[str, Any] | None = door.store.take(call, name, path)
    return reply


def status(call: Call) -> dict[str, Any]:
    """What is ready, and what was taken."""
    door: Any = call.machine
    return {"pid": os.getpid(), **door.store.status()}


def stop(call: Call) -> None:
    """End the pool and all its VMs; the reply comes when that is done."""
    door: Any = call.machine
    call.on_end = lambda: {"stopped": True}
    door.stop()


class InProcess:
    """Ready machines of this process."""

    def __init__(self, pool: Pool, commands: dict[str, str]) -> None:
        self._pool = pool
        self._commands = commands

    def take(self, call: Call, name: str, path: str) -> dict[str, Any]:
        """At once, or after a restore where none is ready."""
        self._pool.take(name, control=path, commands=self._commands)
        return {"name": name, "socket": path, "pid": os.getpid()}

    def status(self) -> dict[str, Any]:
        """For people."""
        pool = self._pool
        return {"snapshot": pool.snapshot.folder, "size": pool.size, "ready": pool.ready, "taken": pool.taken,
                "running": len(pool.host.machines), "processes": False,
                "error": None if pool.error is None else str(pool.error)}


def serve_in_process(pool: Pool, path: str, commands: dict[str, str], begun: Callable[[Door], None]) -> None:
    """Serve `pool` at `path` until somebody asks it to stop; begun(door) is told when it can be connected to."""
    door = Door(pool.host.loop, path, InProcess(pool, commands), pool.name)
    try:
        begun(door)
        pool.host.loop.run_until(lambda: door.stopping)
        pool.host.stop_all("terminated", "the pool ends")
        pool.host.wait()
    finally:
        door.close()


def _nothing() -> None:
    pass
