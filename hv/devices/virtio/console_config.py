"""What the user asks of the console device: `--console virtio` and `--port NAME,socket=PATH|file=PATH`.

Opens what the ports name, so that a bad path is told before the guest starts. Driven by
tests/unit/test_virtio_console.py.
"""

from __future__ import annotations

__all__ = ["PORTS_MOST", "ConsoleConfig"]

import os
import stat

from hv.devices.virtio.console import PORTS_MOST, VirtioConsole
from hv.devices.virtio.console_port import FilePort, GuestPort, Port, SocketPort
from hv.errors import ConfigError

_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:-")
_NAME_MOST = 63
_FORM = "NAME,socket=PATH or NAME,file=PATH"


class ConsoleConfig:
    """`guest`: port 0 is the guest's console. `ports`: texts as of --port; they are ports 1, 2, ... in this order."""

    FIELDS = (("guest", "flag"), ("ports", "texts"))

    def __init__(self, guest: bool = True, ports: tuple[str, ...] = ()) -> None:
        self.guest = guest
        self.ports = tuple(_parse(text) for text in ports)
        names = [name for name, _, _ in self.ports]
        if len(set(names)) != len(names):
            raise ConfigError("--port: two ports have the same name", "the guest tells them apart by it")
        if len(names) > PORTS_MOST:
            raise ConfigError(f"--port: {len(names)} ports, the device has {PORTS_MOST}", "use fewer")
        if not guest and not ports:
            raise ConfigError("a console device without a port", "let one be the guest's console, or name ports")

    def create(self) -> VirtioConsole:
        """The device, its files and sockets open."""
        opened: list[Port] = []
        try:
            for name, kind, path in self.ports:
                opened.append(SocketPort(name, path, listen(path)) if kind == "socket" else FilePort(name, _open(path)))
        except BaseException:
            for port in opened:
                port.close()
            raise
        return VirtioConsole(GuestPort() if self.guest else None, tuple(opened))

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        return {"guest": self.guest,
                "ports": [f"{name},{kind}={os.path.abspath(path)}" for name, kind, path in self.ports]}


def _parse(text: str) -> tuple[str, str, str]:
    name, comma, rest = text.partition(",")
    kind, equals, path = rest.partition("=")
    if not comma or not equals or kind not in ("socket", "file") or not path:
        raise ConfigError(f"--port {text}: not of the form {_FORM}", "for example --port agent,socket=agent.sock")
    if not 0 < len(name) <= _NAME_MOST or not _NAME_LETTERS.issuperset(name) or name[0] in ".:-":
        raise ConfigError(f"--port {text}: {name!r} can't be a name", "up to 63 letters, digits and . _ : -")
    return name, kind, path


def _open(path: str) -> int:
    # Not blocking, for a FIFO or a terminal may stand there.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, flags, 0o644)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--port: {path}: {_reason(error)}", "name a file that can be written") from None


def listen(path: str) -> int:
    """A listening Unix socket at `path`; one that a dead process left there is replaced."""
    import socket

    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if _is_stale(path):
            os.unlink(path)
        made.bind(path)
        made.listen(1)
    except (OSError, ValueError) as error:
        made.close()
        raise ConfigError(f"--port: socket {path}: {_reason(error)}",
                          "name a path that is free, of at most 107 bytes, in a folder you may write to") from None
    return made.detach()


def _is_stale(path: str) -> bool:
    """Whether a socket is there that nobody listens to any more."""
    import socket

    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)
