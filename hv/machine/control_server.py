"""Who comes to a control socket: let in or turned away, and what commands there are.

Loaded with the first client. Driven by tests/unit/test_control.py and tests/kvm/test_control.py.
"""

from __future__ import annotations

__all__ = ["Server"]

import os
import sys
from _socket import SO_PEERCRED, SOL_SOCKET, socket

from hv.errors import ConfigError, HvError
from hv.machine.control_client import Client
from hv.machine.control_commands import COMMANDS
from hv.machine.loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Generator
    from typing import Any

    from hv.machine.control import Control
    from hv.machine.control_call import Call, Reply

CLIENTS_MOST = 64
_UCRED_SIZE = 12            # struct ucred: pid, uid, gid (man 7 unix, SO_PEERCRED)
_REST = 1.0                 # s until the door is opened again where the process has no descriptor left


class Server:
    """Takes clients in from the listening descriptor `fd`."""

    def __init__(self, control: Control, fd: int) -> None:
        self.control = control
        self.machine = control.machine
        self.commands: dict[str, str] = control.commands if control.only else COMMANDS | control.commands
        self.clients: set[Client] = set()
        self._workers: list[LockType] = []
        self._listener = socket(fileno=os.dup(fd))
        self._closed = False
        self.machine.loop.remove(fd)
        self._open_door()

    def _open_door(self) -> None:
        if not self._closed:
            self.machine.loop.add(self._listener.fileno(), EPOLLIN, self._accept)

    def _accept(self, events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:         # no descriptors left: don't ask again and again
            self.machine.loop.remove(self._listener.fileno())
            self.machine.loop.call_later(_REST, self._open_door)
            return
        connection = socket(fileno=fd)
        connection.setblocking(False)
        uid = int.from_bytes(connection.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED_SIZE)[4:8], "little")
        client = Client(self, connection)
        if uid not in (0, os.geteuid()):
            client.refuse(HvError("only the VM's user and root may control it"))
        elif len(self.clients) > CLIENTS_MOST:
            client.refuse(HvError(f"{CLIENTS_MOST} clients are connected already"))

    def command(self, name: object) -> Callable[..., Any]:
        """The function that serves command `name`, loaded if need be."""
        place = self.commands.get(name) if isinstance(name, str) else None
        if place is None:
            what = "no command" if name is None else f"unknown command {name!r:.80}"
            raise ConfigError(what, f"known are {', '.join(sorted(self.commands))}")
        module, _, function = place.partition(":")
        __import__(module)
        found: Callable[..., Any] = getattr(sys.modules[module], function)
        return found

    def work(self, call: Call, steps: Generator[Reply, None, Reply | None]) -> None:
        """A command that takes long: in a thread of its own."""
        self._workers = [lock for lock in self._workers if lock.locked()]
        self._workers.append(call.work(steps))

    def end(self) -> None:
        """Nobody comes in any more, and who waits is answered. Threads are waited for: they look into the machine."""
        self._closed = True
        for client in self.clients:
            if client.call is not None:
                client.call.cancelled = True
        for worker in self._workers:
            worker.acquire()
        for client in list(self.clients):
            client.end()
        self.machine.loop.remove(self._listener.fileno())
        self._listener.close()

    def close(self) -> None:
        """Hang up on all."""
        for client in list(self.clients):
            client.gone()
