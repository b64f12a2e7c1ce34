"""The client's side of control sockets: finding VMs, asking one (docs/control.md is the protocol).

Driven by tests/kvm/test_control.py.
"""

from __future__ import annotations

__all__ = ["Vm", "running_vms"]

import os
from _socket import AF_UNIX, SHUT_WR, SO_SNDTIMEO, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket, timeout
from struct import Struct
from time import time

from hv.errors import ConfigError, HvError, StateError
from hv.machine.control import SUFFIX, folder
from hv.machine.control_names import check_name, remove_dead
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_REPLY_MOST = 16 << 20      # bytes of one line: a VM of another user's is not believed
_CHUNK = 1 << 16
_TIMEVAL = Struct("qq")      # struct timeval: s, us
_HALF_MADE = 60.0           # s after which a socket that never got its name was left by a killed process


class Vm:
    """A connection to a VM by name, or by a path with a slash. A context manager."""

    def __init__(self, name: str, patience: float = 10.0) -> None:
        self.name = name
        self.path = name if "/" in name else f"{folder()}/{check_name(name)}{SUFFIX}"
        self._in = bytearray()
        self._patience = patience
        self.socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            # Waits where others stand in line; a socket that never waits, as settimeout() makes it, would be refused.
            self.socket.setsockopt(SOL_SOCKET, SO_SNDTIMEO, _TIMEVAL.pack(*divmod(int(patience * 1e6), 1_000_000)))
            self.socket.connect(self.path)
        except OSError as error:
            self.close()
            if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
                raise StateError(f"no VM {name} is running", "`pyhv vm ls` shows those that are") from None
            late = isinstance(error, (timeout, BlockingIOError))
            raise HvError(f"VM {name}: {'it does not answer' if late else error.strerror or error}",
                          "is its process stopped?" if late else "") from None

    def ask(self, command: str, *, patience: float | None = None,
            told: Callable[[dict[str, Any]], None] | None = None, **fields: object) -> dict[str, Any]:
        """The reply to `command`; told(line) sees lines of progress. HvError where the VM says no, or nothing."""
        self.socket.settimeout(self._patience if patience is None else patience)
        try:
            self.socket.sendall(dumps({"id": 1, "command": command} | fields).encode() + b"\n")
            while True:
                reply = self._line()
                if "ok" in reply:
                    break
                if told is not None:
                    told(reply)
        except timeout:
            raise HvError(f"VM {self.name} does not answer", "is its process stopped?") from None
        except OSError as error:
            raise HvError(f"VM {self.name}: {os.strerror(error.errno or 0)}") from None
        if reply["ok"] is not True:
            raise HvError(f"VM {self.name}: {reply.get('error')}", str(reply.get("hint", "")))
        return reply

    def rest(self) -> bytes:
        """What came behind the last reply: a console's first bytes."""
        data = bytes(self._in)
        self._in.clear()
        return data

    def shut(self) -> None:
        """Nothing more will be sent."""
        try:
            self.socket.shutdown(SHUT_WR)
        except OSError:
            pass

    def _line(self) -> dict[str, Any]:
        while (end := self._in.find(b"\n")) < 0:
            data = self.socket.recv(_CHUNK)
            if not data or len(self._in) > _REPLY_MOST:
                raise HvError(f"VM {self.name} {'hung up' if not data else 'sends no end of line'}")
            self._in += data
        try:
            reply = loads(self._in[:end].decode())
        except ValueError:
            reply = None
        del self._in[:end + 1]
        if not isinstance(reply, dict):
            raise HvError(f"VM {self.name} does not speak pyhv's protocol", "is that its control socket?")
        return reply

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def running_vms(patience: float = 2.0) -> list[dict[str, Any]]:
    """The status of every VM in the usual folder; one that does not answer has the state "silent".

    What killed processes have left there is removed.
    """
    place = folder()
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{place}: {os.strerror(error.errno or 0)}") from None
    found = []
    for leaf in names:
        path = f"{place}/{leaf}"
        if leaf.startswith("."):
            _sweep(path)
        elif leaf.endswith(SUFFIX):
            try:
                with Vm(path, patience) as vm:
                    found.append(vm.ask("status") | {"name": leaf.removesuffix(SUFFIX)})
            except StateError:
                remove_dead(path)
            except HvError:
                if os.path.exists(path):    # else it ended while we asked
                    found.append({"name": leaf.removesuffix(SUFFIX), "state": "silent"})
    for row in found:
        row.pop("ok", None)
        row.pop("id", None)
    return found


def _sweep(path: str) -> None:
    try:
        if time() - os.lstat(path).st_mtime > _HALF_MADE:
            remove_dead(path)
    except OSError:
        pass
