"""Reaching the keeper (keeper.py), which is started where there is none.

    connect()       a connection to it; it has looked after all that it found before it answers
    adopt(id)       have it take over an instance that runs
    wait(id)        the exit code once an instance has ended

Driven by tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["Connection", "KeeperGone", "adopt", "connect", "ensure", "request", "running", "wait"]

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket
from fcntl import LOCK_EX, LOCK_NB, flock
from time import monotonic, sleep

from hv.errors import HvError, StateError
from hv.instance.wire import Frames, frame
from hv.linux.ns import CLONE_NEWNS, setns
from hv.places import run_root
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE = 20.0            # seconds for an answer
_BACKLOG = 128
_CHUNK = 1 << 16
SOCKET, LOCK = "keeper.sock", "keeper.lock"


class Connection:
    """One request, and what comes back."""

    def __init__(self, sock: socket) -> None:
        self.socket = sock
        self.frames = Frames()
        self.waiting: list[tuple[bytes, bytes]] = []

    def fileno(self) -> int:
        """Readable once something has come."""
        return self.socket.fileno()

    def ask(self, request: dict[str, Any], patience: float | None = _PATIENCE) -> dict[str, Any]:
        """The answer. HvError where none comes; StateError where it is no."""
        self.socket.settimeout(patience)
        try:
            self.socket.sendall(frame(b"Q", dumps(request).encode()))
            while not self.waiting:
                self.read()
        except TimeoutError:
            raise HvError("the keeper of instances does not answer", f"see {run_root()}/keeper.log") from None
        except OSError as error:
            raise KeeperGone(os.strerror(error.errno or 0)) from None
        self.socket.settimeout(None)
        kind, payload = self.waiting.pop(0)
        answer = loads(payload.decode()) if kind == b"A" else None
        if not isinstance(answer, dict):
            raise HvError("the keeper of instances answers nonsense")
        if "error" in answer:
            raise StateError(str(answer["error"]), str(answer.get("hint", "")))
        return answer

    def read(self) -> None:
        """Read once; what was whole is in `waiting`. KeeperGone at the end."""
        data = self.socket.recv(_CHUNK)
        if not data:
            raise KeeperGone("it has ended")
        self.waiting += self.frames.feed(data)

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


class KeeperGone(HvError):
    """The keeper has ended, and not answered."""


def _reach() -> socket | None:
    """A connection, None where nobody listens."""
    try:
        folder = os.open(run_root(), os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        sock.settimeout(_PATIENCE)
        sock.connect(f"/proc/self/fd/{folder}/{SOCKET}")
        return sock
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise HvError(f"{run_root()}/{SOCKET}: {error}", "is the keeper of instances stopped?") from None
    finally:
        os.close(folder)


def running() -> bool:
    """Whether there is a keeper."""
    sock = _reach()
    if sock is not None:
        sock.close()
    return sock is not None


def connect(*, home: int = -1) -> Connection:
    """A connection to the keeper, which is started if need be. `home`: for a process that lives on, waits for nobody
    and is in a mount namespace of its own: the keeper is no child of it, and in the namespace `home`."""
    end = monotonic() + _PATIENCE
    while True:
        sock = _reach() or _start(home)
        if sock is not None:
            return Connection(sock)
        if monotonic() > end:
            raise HvError(f"{run_root()}/{SOCKET}: the keeper of instances does not come up",
                          f"see {run_root()}/keeper.log")
        sleep(0.002)


def _start(home: int) -> socket | None:
    """Start one, if nobody else does; a connection, None: try again."""
    place = run_root()
    try:
        os.makedirs(place, 0o700, exist_ok=True)
        lock = os.open(f"{place}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HvError(f"{place}: {os.strerror(error.errno or 0)}", "set PYHV_RUN to a folder to write in") from None
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    folder = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        try:
            flock(lock, LOCK_EX | LOCK_NB)      # held as long as the keeper lives
        except BlockingIOError:
            return None
        path = f"/proc/self/fd/{folder}/{SOCKET}"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        _fork(listener, lock, home)
        return _reach()
    except OSError as error:
        raise HvError(f"{place}/{SOCKET}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(folder)
        os.close(lock)
        listener.close()


def _fork(listener: socket, lock: int, home: int) -> None:
    pid = os.fork()
    if pid:
        if home >= 0:
            os.waitpid(pid, 0)
        return
    try:
        if home >= 0:
            if os.fork():
                os._exit(0)
            setns(home, CLONE_NEWNS)
        from hv.instance.keeper import keep

        keep(listener, lock)
    finally:
        os._exit(1)


def request(asked: dict[str, Any], *, home: int = -1) -> tuple[Connection, dict[str, Any]]:
    """A connection on which that was answered; asked again of the next keeper where one has just ended."""
    for _ in range(20):
        connection = connect(home=home)
        try:
            return connection, connection.ask(asked)
        except KeeperGone:
            connection.close()
            sleep(0.005)
        except BaseException:
            connection.close()
            raise
    raise HvError("the keeper of instances ends again and again", f"see {run_root()}/keeper.log")


def ensure() -> None:
    """There is a keeper, and it has looked after everything that runs."""
    request({"do": "ping"})[0].close()


def adopt(id: str, home: int) -> None:
    """Have the keeper take over the streams of an instance that keep.json tells of. `home` as in connect()."""
    request({"do": "adopt", "id": id}, home=home)[0].close()


def wait(id: str, patience: float | None = None) -> int | None:
    """The exit code once it has ended (now, where it has already: None, state.json tells). TimeoutError after
    `patience` seconds."""
    end = None if patience is None else monotonic() + patience
    while True:
        connection, answer = request({"do": "wait", "id": id})
        try:
            if answer.get("gone"):
                return None
            connection.socket.settimeout(None if end is None else max(end - monotonic(), 0.01))
            while not connection.waiting:
                connection.read()
            kind, payload = connection.waiting[0]
            if kind == b"X":
                return int.from_bytes(payload[:4], "little")
        except (KeeperGone, ConnectionError):
            sleep(0.005)            # another will know
        finally:
            connection.close()
