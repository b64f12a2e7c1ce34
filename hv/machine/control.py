"""The control socket of a machine: a Unix socket by which other programs look after it (docs/control.md).

Only this file is loaded with a machine that has one: it makes the socket, 0.1 ms, and waits. What serves clients comes
with the first of them (hv/machine/control_server.py). The socket functions are libc's own: loading Python's socket
module would cost more than all the rest.

A socket appears under its name complete, by rename, so that whoever finds a socket there to which he can't connect
knows that its process was killed. Such a one is replaced here and removed by `pyhv vm ls`, both with the folder locked.

Driven by tests/unit/test_control.py and tests/kvm/test_control.py.
"""

from __future__ import annotations

__all__ = ["Control", "check_name", "folder", "is_alive", "open_control", "remove_dead"]

import os

from hv.errors import ConfigError, HvError
from hv.linux.libc import LIBC, get_errno
from hv.machine.loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.machine.control_server import Server
    from hv.machine.machine import Machine

_AF_UNIX, _STREAM_CLOEXEC_NONBLOCK = 1, 1 | 0o2000000 | 0o4000      # include/linux/socket.h, linux/net.h
_RENAME_NOREPLACE, _AT_FDCWD = 1, -100                              # include/uapi/linux/fs.h, fcntl.h
_EEXIST, _ENOENT, _ECONNREFUSED = 17, 2, 111                        # asm-generic/errno-base.h, errno.h
_PATH_MOST = 107            # bytes: sun_path with its NUL (man 7 unix)
_BACKLOG = 64
_NAME_MOST = 64
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
SUFFIX, _FRESH = ".sock", ".new"
_ELSEWHERE = "--control PATH elsewhere, or --no-control"
_TRIES = 8


def folder() -> str:
    """Where the sockets are: /run/pyhv-vm for root, else a folder of the user's own."""
    if os.geteuid() == 0:
        return "/run/pyhv-vm"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"{runtime}/pyhv-vm" if runtime else os.path.expanduser("~/.cache/pyhv-vm")


def check_name(name: str) -> str:
    """`name`, or ConfigError where a VM can't have it."""
    if not name or len(name) > _NAME_MOST or not _NAME_CHARACTERS.issuperset(name) or name[0] in ".-":
        raise ConfigError(f"VM name {name!r:.80}", f"up to {_NAME_MOST} letters, digits and . _ -, the first a letter, "
                          "digit or _")
    return name


class Control:
    """A listening socket at `path`, served by the machine's loop. ConfigError where a living process has that path."""

    def __init__(self, machine: Machine, path: str, commands: dict[str, str] | None = None) -> None:
        self.machine = machine
        self.commands = commands or {}      # beyond the built-in ones: name -> "module:function"
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

    def close(self) -> None:
        """Tell clients how the machine ended, let them go, and remove the socket. May be called twice."""
        if self._fd < 0:
            return
        try:
            os.unlink(self.path)        # before nobody listens: else it would look dead, and another's be removed
        except OSError:
            pass
        self.machine.loop.remove(self._fd)
        if self._server is not None:
            self._server.close()
        os.close(self._fd)
        self._fd = -1


def open_control(machine: Machine, values: dict[str, object], warn: Callable[[str], None],
                 commands: dict[str, str]) -> None:
    """What --name and --control ask for; `commands` are those beyond the built-in ones.

    A name of the user's own must be free before the guest starts. The usual one is made by the loop, while the guest
    is running already, and where it can't be, the guest runs without.
    """
    name, path = values.get("name"), values.get("control")
    if name is not None:
        check_name(str(name))
    if values.get("no_control"):
        raise ConfigError("--no-control and --control exclude each other", "give one of them")
    if path is not None:
        machine.serve_control(str(path), commands)
        if name is not None and machine.control is not None:
            machine.control.name = str(name)
    elif name is not None:
        machine.serve_control(f"{folder()}/{name}{SUFFIX}", commands)
    else:
        machine.loop.call(lambda: _by_pid(machine, warn, commands))


def _by_pid(machine: Machine, warn: Callable[[str], None], commands: dict[str, str]) -> None:
    path = f"{folder()}/vm-{os.getpid()}"
    try:
        try:
            machine.serve_control(path + SUFFIX, commands)
        except ConfigError:     # a process of that number in another PID namespace
            machine.serve_control(f"{path}-{os.urandom(4).hex()}{SUFFIX}", commands)
    except HvError as error:
        warn(f"pyhv: no control socket: {error}")


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
        if not remove_dead(path):
            break
    raise ConfigError(f"control socket {path}: a VM of that name is running, or another file is there",
                      "another --name; `pyhv vm ls` shows those in use")


def is_alive(path: str) -> bool:
    """Whether somebody listens at `path`, or it is no socket that could be asked."""
    from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket

    probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
    try:
        probe.connect(path)
    except OSError as error:
        # EAGAIN: its clients stand in line. Others: not for us to judge.
        return error.errno not in (_ECONNREFUSED, _ENOENT)
    finally:
        probe.close()
    return True


def remove_dead(path: str) -> bool:
    """Remove the socket that a killed process has left at `path`; False where it is not one."""
    import stat
    from fcntl import LOCK_EX, flock

    try:
        lock = os.open(path.rpartition("/")[0] or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        flock(lock, LOCK_EX)        # nobody else removes meanwhile, and a name that is taken is not replaced
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode) or is_alive(path):
                return False
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True
    finally:
        os.close(lock)
