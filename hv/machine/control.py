"""The control socket of a machine: a Unix socket by which other programs look after it (docs/control.md).

Only this file is loaded with a machine that has one: it makes the socket, 0.1 ms, and waits. What serves clients comes
with the first of them (hv/machine/control_server.py). The socket functions are libc's own: loading Python's socket
module would cost more than all the rest.

A socket appears under its name complete, by rename, so that whoever finds a socket there to which he can't connect
knows that its process was killed. Such a one is replaced here, and removed by `pyhv vm ls` (control_names.py).

Driven by tests/unit/test_control.py and tests/kvm/test_control.py.
"""

from __future__ import annotations

__all__ = ["SUFFIX", "Control", "folder", "open_control", "open_usual"]

import os

from hv.errors import ConfigError, HvError
from hv.linux.libc import LIBC, get_errno
from hv.machine.loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.control_server import Server
    from hv.machine.machine import Machine

_AF_UNIX, _STREAM_CLOEXEC_NONBLOCK = 1, 1 | 0o2000000 | 0o4000      # include/linux/socket.h, linux/net.h
_RENAME_NOREPLACE, _AT_FDCWD = 1, -100                              # include/uapi/linux/fs.h, fcntl.h
_EEXIST, _ENOENT = 17, 2                                            # asm-generic/errno-base.h
_PATH_MOST = 107            # bytes: sun_path with its NUL (man 7 unix)
_BACKLOG = 64
SUFFIX, _FRESH = ".sock", ".new"
_ELSEWHERE = "--control PATH elsewhere, or --no-control"
_TRIES = 8


def folder() -> str:
    """Where the sockets are: /run/pyhv-vm for root, else a folder of the user's own."""
    if os.geteuid() == 0:
        return "/run/pyhv-vm"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"{runtime}/pyhv-vm" if runtime else os.path.expanduser("~/.cache/pyhv-vm")


class Control:
    """A listening socket at `path`, served by the machine's loop. ConfigError where a living process has that path."""

    def __init__(self, machine: Machine, path: str, commands: dict[str, str] | None = None, *,
                 only: bool = False) -> None:
        self.machine = machine
        self.commands = commands or {}      # beyond the built-in ones: name -> "module:function"
        self.only = only                    # nothing built in: no machine is served (hv/snapshot/pool_server.py)
        self.path = os.path.abspath(path)
        leaf = self.path.rpartition("/")[2]
        self.name = leaf.removesuffix(SUFFIX)
        self._server: Server | None = None
        self._fd = _listen(self.path)
        machine.loop.add(self._fd, EPOLLIN, self._first)

    def _first(self, events: int) -> None:
        """A client stands at the door: from now on there is a server."""
        from hv.machine.control_server import Server

        self._server = Server(self, self._fd)

    def end(self) -> None:
        """The machine has ended: remove the socket, tell who waits how it ended. May be called twice."""
        if self._fd < 0:
            return
        try:
            os.unlink(self.path)        # before nobody listens: else it would look dead, and another's be removed
        except OSError:
            pass
        self.machine.loop.remove(self._fd)
        if self._server is not None:
            self._server.end()
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Hang up: what the machine had is given back, its disks are free."""
        self.end()
        if self._server is not None:
            self._server.close()


def open_control(machine: Machine, name: str | None, path: str | None, commands: dict[str, str]) -> None:
    """What --name and --control ask for: before the guest starts, so that it does not start where they can't be had."""
    if name is not None:
        from hv.machine.control_names import check_name

        check_name(name)
    machine.serve_control(f"{folder()}/{name}{SUFFIX}" if path is None else path, commands)
    if name is not None and machine.control is not None:
        machine.control.name = name


def open_usual(machine: Machine, commands: dict[str, str]) -> str:
    """The socket vm-PID, while the guest runs already. Why there is none, or ""."""
    path = f"{folder()}/vm-{os.getpid()}"
    try:
        try:
            machine.serve_control(path + SUFFIX, commands)
        except ConfigError:     # a process of that number in another PID namespace
            machine.serve_control(f"{path}-{os.urandom(4).hex()}{SUFFIX}", commands)
    except HvError as error:
        return str(error)
    return ""


def _listen(path: str) -> int:
    """A listening descriptor whose socket is at `path`."""
    place = path.rpartition("/")[0]
    wanted, fresh = os.fsencode(path), os.fsencode(f"{place}/.{os.urandom(6).hex()}{_FRESH}")
    if max(len(wanted), len(fresh)) > _PATH_MOST:
        raise ConfigError(f"control socket {path}: {len(wanted)} bytes, possible are {_PATH_MOST}",
                          "a shorter --name, or --control PATH")
    fd = LIBC["socket"](_AF_UNIX, _STREAM_CLOEXEC_NONBLOCK, 0)
    _check(fd, path)
    try:
        os.fchmod(fd, 0o600)        # the mode that its file will have (net/unix/af_unix.c, unix_bind_bsd)
        result = _bind(fd, fresh)
        if result < 0 and get_errno() == _ENOENT and place == folder():
            os.makedirs(place, 0o700, exist_ok=True)
            result = _bind(fd, fresh)
        _check(result, path)
        try:
            _check(LIBC["listen"](fd, _BACKLOG), path)
            _move(fresh, wanted, path)
        except BaseException:
            os.unlink(fresh)
            raise
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise ConfigError(f"control socket {path}: {os.strerror(error.errno or 0)}", _ELSEWHERE) from None
        raise
    return int(fd)


def _bind(fd: int, fresh: bytes) -> int:
    address = b"\x01\0" + fresh + b"\0"        # struct sockaddr_un
    return int(LIBC["bind"](fd, address, len(address)))


def _check(result: int, path: str) -> None:
    if result < 0:
        raise ConfigError(f"control socket {path}: {os.strerror(get_errno())}", _ELSEWHERE)


def _move(fresh: bytes, wanted: bytes, path: str) -> None:
    """Give the socket its name, unless a living process has it."""
    rename = LIBC["renameat2"]
    for _ in range(_TRIES):
        if rename(_AT_FDCWD, fresh, _AT_FDCWD, wanted, _RENAME_NOREPLACE) == 0:
            return
        if get_errno() != _EEXIST:
            _check(-1, path)
        from hv.machine.control_names import remove_dead

        if not remove_dead(path):
            break
    raise ConfigError(f"control socket {path}: a VM of that name is running, or another file is there",
                      "another --name; `pyhv vm ls` shows those in use")
