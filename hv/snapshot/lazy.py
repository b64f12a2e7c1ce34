"""Guest RAM that another process fills in as it is touched (docs/lazy-memory.md): the VM's side.

    "uffd"          a process of ours, hv/snapshot/pager.py, which has the memory file, plain or packed
    "uffd:SOCKET"   somebody else's, who listens there and gets the userfaultfd with a line of JSON

RAM is anonymous memory, registered before the first touch. The descriptor stays open here too: were the handler's the
last, its end would turn what is missing into zeros. So its end is noticed, and the machine stopped; where that can't
be, because a thread waits for a page with Python's lock held, hv/snapshot/page_guard.py ends this process.

Driven by tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["AROUND", "LazyMemory", "Served", "check_backend"]

import os
import sys
from _socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SHUT_RDWR,
    SOCK_CLOEXEC,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
    socketpair,
)
from _socket import timeout as SocketTimeout
from array import array
from select import EPOLLIN, POLLIN, poll

from hv.errors import ConfigError, HvError
from hv.linux.ns import pidfd_open
from hv.linux.syscall import try_syscall
from hv.linux.userfaultfd import Userfaultfd
from hv.memory.guest import GuestMemory
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine

VERSION = 1
WIRE_END = 5                    # hv/snapshot/wire.py, ROUND: all pages have come
AROUND = 16                     # pages that our process fills in where one is touched: 64 KiB
_CHILD = "import sys; sys.path[:] = {path!r}; from hv.snapshot.pager import main; main()"
_PATIENCE = 10.0                # s for a stranger's handler to say that it is ready
_END = 2000                     # ms for our own to end once its socket is closed
_LINE_MOST = 1 << 16
_FD = 3                         # hv/snapshot/pager.py, SOCKET
_SYS_MADVISE, _MADV_POPULATE_READ = 28, 22      # syscall_64.tbl; asm-generic/mman-common.h
_STEP = 4 << 20                 # bytes that are waited for at once
LOST_CODE = 74                  # EX_IOERR of sysexits.h: pyhv's exit code


class Served:
    """What our own process is to serve: `kind` file, packed or wire, its descriptor, the runs of pages to begin with.

    `around`: how many pages are filled in where one is touched. `later`: of a wire, the runs that are to come.
    """

    __slots__ = ("around", "fd", "first", "kind", "later")

    def __init__(self, kind: str, fd: int, first: list[tuple[int, int]] | None = None, around: int = AROUND,
                 later: list[tuple[int, int]] | None = None) -> None:
        self.kind, self.fd, self.first, self.around, self.later = kind, fd, first or [], around, later or []


class LazyMemory(GuestMemory):
    """RAM that is plain memory until serve()."""

    _pid = 0

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._machine: Machine | None = None
        self._uffd: Userfaultfd | None = None
        self._socket: socket | None = None      # to the handler
        self._alive: socket | None = None       # to the guard
        self._own = True
        self._who = "the memory handler"
        self._heard = bytearray()
        self.frames: list[int] = []     # post-copy: what the source has said
        self.complete = False       # all is here, and no handler any more
        self.lost = ""              # why there is none although there should be

    def serve(self, machine: Machine, source: Served | str, snapshot_id: str = "") -> None:
        """From here on what is missing is filled in by a process of ours, or by who listens at that path.

        ConfigError, HvError where that can't be; close() it then.
        """
        self._machine = machine
        self._own = not isinstance(source, str)
        self._uffd = uffd = Userfaultfd()
        for region in self.regions:
            uffd.register(region.host, region.size)
        self._alive, guards = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        process = pidfd_open(os.getpid())
        try:
            if isinstance(source, str):
                self._join(source, snapshot_id, guards, process)
            else:
                self._start(source, guards, process)
        finally:
            guards.close()
            os.close(process)
        assert self._socket is not None
        machine.loop.add(self._socket.fileno(), EPOLLIN, self._hear)

    # beginning --------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Start our own handler, which takes some 30 ms, and have it load what post-copy needs; serve() comes later."""
        _send(self._spawned(), {"load": True}, [])

    def _spawned(self) -> socket:
        self._socket, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            self._pid = _spawn(theirs)
        finally:
            theirs.close()
        return self._socket

    def _start(self, source: Served, guards: socket, process: int) -> None:
        """Our own handler, which makes the guard."""
        assert self._uffd is not None
        if self._socket is None:
            self._spawned()
        order = {"regions": self._places(), "size": self.size, "source": source.kind, "around": source.around,
                 "first": source.first, "later": source.later}
        self._order(order, [self._uffd.fd, source.fd, process, guards.fileno()])

    def _join(self, path: str, snapshot_id: str, guards: socket, process: int) -> None:
        """A stranger's handler, and a guard of ours."""
        assert self._uffd is not None
        self._socket = sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            sock.settimeout(_PATIENCE)
            sock.connect(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--memory-backend uffd:{path}: {getattr(error, 'strerror', None) or error}",
                              "is a memory handler listening there?") from None
        mine, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            self._pid = _spawn(theirs)
            _send(mine, {"guard": True}, [guards.fileno(), process, sock.fileno()])
        finally:
            mine.close()
            theirs.close()
        order = {"pyhv-memory": VERSION, "snapshot": snapshot_id, "page_size": 4096, "memory": self.size,
                 "pid": os.getpid(), "regions": self._places()}
        self._who = f"the memory handler at {path}"
        self._order(order, [self._uffd.fd])

    def _order(self, order: dict[str, Any], fds: list[int]) -> None:
        """Say what is to be served, and wait for the answer: from here on RAM may be touched."""
        assert self._socket is not None
        sock, who = self._socket, self._who
        sock.settimeout(_PATIENCE)
        try:
            _send(sock, order, fds)
            while b"\n" not in self._heard:
                data = sock.recv(_LINE_MOST)
                if not data:
                    raise HvError(f"{who} {self._how_it_ended()}", "see what it printed")
                self._heard += data
                if len(self._heard) > _LINE_MOST:
                    raise HvError(f"{who} sent a line that does not end")
        except SocketTimeout:
            raise HvError(f"{who} does not say that it is ready",
                          "docs/lazy-memory.md has what it must send") from None
        except OSError as error:
            raise HvError(f"{who}: {error.strerror}", "see what it printed") from None
        sock.settimeout(None)
        if failed := self._lines():
            raise HvError(f"{who} {failed}")

    def _places(self) -> list[dict[str, int]]:
        places, offset = [], 0
        for region in self.regions:
            places.append({"gpa": region.gpa, "host": region.host, "size": region.size, "offset": offset})
            offset += region.size
        return places

    # while the machine runs -------------------------------------------------------------------------

    def _hear(self, events: int) -> None:
        """The handler said something, or has gone."""
        sock = self._socket
        if sock is None or self.complete or self.lost:
            return
        try:
            data = sock.recv(_LINE_MOST, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._heard += data
        if failed := self._lines():
            self._lose(failed)
        elif self._own and WIRE_END in self.frames:
            self._finish()
        elif not data:
            self._lose(self._how_it_ended())
        elif len(self._heard) > _LINE_MOST:
            self._lose("sent a line that does not end")

    def _lines(self) -> str:
        """Look at whole lines; what is wrong, or ""."""
        while b"\n" in self._heard:
            line, _, rest = bytes(self._heard).partition(b"\n")
            self._heard[:] = rest
            try:
                said = loads(line.decode())
                failed, frame = said.get("failed"), said.get("heard")
            except (ValueError, AttributeError):
                return "sent a line that is no object"
            if failed is not None:
                text = str(failed)[:1000]
                return f"says: {text if text.isprintable() else ascii(text)}"
            if isinstance(frame, int):
                self.frames.append(frame)
        return ""

    def _how_it_ended(self) -> str:
        if not self._own:
            return "hung up"
        code = self._reap(_END)
        if code is None:
            return "hung up"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _lose(self, why: str) -> None:
        """No page will come any more."""
        self.lost = why
        if self._alive is not None:
            try:
                self._alive.send(b"n", MSG_DONTWAIT)        # page_guard.NOTICED
            except OSError:
                pass
        assert self._machine is not None
        if self._socket is not None:
            self._machine.loop.remove(self._socket.fileno())
        self._machine.stop("memory-lost", f"pages of the guest's memory are nowhere: {self._who} {why}", code=LOST_CODE)

    def say(self, frame: int) -> None:
        """Post-copy: have that said to the source."""
        if self._socket is None or self.lost:
            raise HvError(f"{self._who} {self.lost or 'is gone'}")
        try:
            _send(self._socket, {"say": frame}, [])
        except OSError as error:
            raise HvError(f"{self._who} is gone ({error.strerror})") from None

    def wait_for(self, frame: int, timeout: float) -> None:
        """Post-copy: wait until the source has said that. HvError where it does not."""
        assert self._machine is not None
        if not self._machine.loop.run_until(lambda: bool(self.lost) or frame in self.frames, timeout):
            raise HvError("the source of the machine is silent", "see what it printed")
        if self.lost:
            raise HvError(f"{self._who} {self.lost}")

    def fetch(self) -> None:
        """Wait until all of RAM is here; from then on it needs no handler. HvError where it does not come."""
        if self.complete or self._uffd is None or self._socket is None:
            return
        if self._own:
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            try:
                _send(self._socket, {"all": True}, [theirs])
                os.close(theirs)
                theirs = -1
                os.read(ours, 1)        # its end: all is done, or the handler has gone
            except OSError:
                pass
            finally:
                os.close(ours)
                if theirs >= 0:
                    os.close(theirs)
        for region in self.regions:
            for at in range(0, region.size, _STEP):
                if self.lost or (self._own and self._reap(0) is not None):
                    raise HvError(f"not all of the guest's memory is here: the memory handler {self.lost or 'is gone'}")
                try_syscall(_SYS_MADVISE, region.host + at, min(_STEP, region.size - at), _MADV_POPULATE_READ)
        assert self._machine is not None
        self._machine.loop.run_there(self._finish)

    def _finish(self) -> None:
        """All is here: what is missing still is zeros, and no handler is needed. In the loop's thread."""
        if self.complete or self._uffd is None:
            return
        for region in self.regions:
            self._uffd.unregister(region.host, region.size)
        self.complete = True
        self._let_go()

    # end --------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Of the handler and the guard."""
        if self._socket is not None:
            if self._machine is not None:
                self._machine.loop.remove(self._socket.fileno())
            try:
                self._socket.shutdown(SHUT_RDWR)
            except OSError:
                pass
            self._socket.close()
            self._socket = None
        if self._alive is not None:
            self._alive.close()
            self._alive = None
        if self._pid and self._reap(_END) is None:
            os.kill(self._pid, 9)
            self._reap(_END)

    def _reap(self, milliseconds: int) -> int | None:
        """The exit code of our process, minus the signal that ended it; None where it runs on after that time."""
        if not self._pid:
            return 0
        try:
            fd = pidfd_open(self._pid)
            try:
                waits = poll()
                waits.register(fd, POLLIN)
                if not waits.poll(milliseconds):
                    return None
            finally:
                os.close(fd)
            _, status = os.waitpid(self._pid, 0)
        except (HvError, ChildProcessError):
            status = 0          # somebody else has waited for it
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Unmap all RAM, end the process."""
        super().close()
        if hasattr(self, "_uffd"):
            self._let_go()
            if self._uffd is not None:
                self._uffd.close()


def check_backend(text: str) -> str | None:
    """What `--memory-backend TEXT` names: None for the file, "" for a process of ours, else the socket's path."""
    kind, colon, path = text.partition(":")
    if text == "file":
        return None
    if kind != "uffd" or (colon and not 0 < len(os.fsencode(path)) < 108):
        raise ConfigError(f"--memory-backend {text!r:.120}: there is no such", "file, uffd, or uffd:SOCKET")
    return path


def _send(sock: socket, order: dict[str, Any], fds: list[int]) -> None:
    data = dumps(order).encode() + b"\n"
    sent = sock.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, array("i", fds))] if fds else [])
    if sent < len(data):
        sock.sendall(data[sent:])


def _spawn(theirs: socket) -> int:
    """The process whose descriptor 3 is `theirs`, in a session of its own: Ctrl-C is not for it."""
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1),
               (os.POSIX_SPAWN_DUP2, theirs.fileno(), _FD)]
    code = _CHILD.format(path=sys.path)
    return os.posix_spawn(sys.executable, [sys.executable, "-ISE", "-c", code], {}, file_actions=actions, setsid=True)
