"""A sandbox's socket: what other processes ask of it, served in its own I/O loop.

    {"do": "kill", "signal": 15}                    {} or {"error": TEXT, "hint": TEXT}
    {"do": "exec", "process": {...}} + 0 to 3 fds   {"pid": N}, later {"exit": CODE}; meanwhile signal and resize
    {"do": "wait"}                                  {"exit": CODE} once the bundle's program has ended

One request at a time on a connection; only root and the sandbox's own user may connect. What has to ask the guest does
so in a thread: a guest that does not answer holds up nobody else. A program whose client hangs up is killed. Driven by
tests/kvm/test_sandbox.py.
"""

from __future__ import annotations

__all__ = ["Server"]

import os
from _signal import SIGKILL
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_STREAM, socket
from _thread import start_new_thread

from hv.errors import ConfigError, HvError, StateError
from hv.machine.loop import EPOLLIN, EPOLLOUT
from hv.sandbox.messages import FDS_MOST, Messages, pack, socket_at, take_descriptors, uid_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.sandbox.process import GuestProcess
    from hv.sandbox.sandbox import Sandbox

CLIENTS_MOST = 1024
OUTGOING_MOST = 8 << 20         # bytes that a client does not read
END_SECONDS = 1.0               # at the end, for clients to take the last message
_READ = 1 << 16
_LOOK_AGAIN = 0.001             # s between two looks whether a program runs


class Server:
    """Listens in the sandbox's folder from now on."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.clients: set[Client] = set()
        self._listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            self._listener.setblocking(False)
            socket_at(sandbox.folder, self._listener.bind)
            self._listener.listen(128)
        except OSError as error:
            self._listener.close()
            raise HvError(f"{sandbox.folder}/vm.sock: {os.strerror(error.errno or 0)}") from None
        sandbox.loop.add(self._listener.fileno(), EPOLLIN, self._accept)

    def _accept(self, events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        peer = socket(fileno=fd)
        if uid_of(peer) not in (0, os.geteuid()) or len(self.clients) >= CLIENTS_MOST:
            peer.close()
            return
        peer.setblocking(False)
        self.clients.add(Client(self, peer))

    def tell_end(self) -> None:
        """The bundle's program has ended, and the VM: tell who waits, and see that it is heard."""
        for client in list(self.clients):
            client.tell_end()
        self.sandbox.loop.run_until(lambda: not any(client.outgoing for client in self.clients), END_SECONDS)

    def close(self) -> None:
        """Hang up on all, remove the socket."""
        self.sandbox.loop.remove(self._listener.fileno())
        self._listener.close()
        for client in list(self.clients):
            client.close()
        try:
            socket_at(self.sandbox.folder, os.unlink)
        except OSError:
            pass                # the folder is gone already


class Client:
    """One connection."""

    def __init__(self, server: Server, peer: socket) -> None:
        self.outgoing = bytearray()
        self.waits = False                  # for the end of the bundle's program
        self._server, self._sandbox, self._peer = server, server.sandbox, peer
        self._incoming = Messages()
        self._fds: list[int] = []
        self._process: GuestProcess | None = None
        self._due: Callable[[], None] | None = None     # tells what became of a program that is being started
        self._exit_told = False
        self._sandbox.loop.add(peer.fileno(), EPOLLIN, self._ready)

    def _ready(self, events: int) -> None:
        if events & EPOLLOUT:
            self._send()
        if not events & ~EPOLLOUT or self._peer.fileno() < 0:
            return
        try:
            data, ancillary, _, _ = self._peer.recvmsg(_READ, CMSG_SPACE(4 * FDS_MOST), MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        self._fds += take_descriptors(ancillary)
        if not data or len(self._fds) > FDS_MOST:
            self.close()
            return
        self._incoming.feed(data)
        try:
            while (message := self._incoming.next()) is not None:
                self._serve(message)
        except HvError as error:
            self.fail(error)
            self.close()            # what follows can't be told apart

    def _serve(self, message: dict[str, Any]) -> None:
        fds, self._fds = self._fds, []
        try:
            handler = HANDLERS.get(str(message.get("do")))
            if handler is None:
                raise ConfigError(f"{message.get('do')!r:.60} is no request", f"known are {', '.join(HANDLERS)}")
            handler(self, message, fds)
        except HvError as error:
            self.fail(error)
        finally:
            for fd in fds:
                os.close(fd)

    # answers -----------------------------------------------------------------------------------------

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; nothing happens where it has hung up."""
        if self._peer.fileno() >= 0:
            self.outgoing += pack(message)
            self._send()

    def fail(self, error: HvError, **more: object) -> None:
        """Send what went wrong."""
        self.tell({"error": str(error), "hint": error.hint, "kind": type(error).__name__, **more})

    def _send(self) -> None:
        try:
            while self.outgoing:
                del self.outgoing[:self._peer.send(self.outgoing, MSG_DONTWAIT | MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if len(self.outgoing) > OUTGOING_MOST:
            self.close()
        else:
            self._sandbox.loop.modify(self._peer.fileno(), EPOLLIN | (EPOLLOUT if self.outgoing else 0))

    def tell_end(self) -> None:
        """The VM has ended."""
        if self._due is not None:
            self._due()
        process = self._process
        if process is not None and process.pid and not self._exit_told:
            self._ended(process)
        if self.waits:
            self.tell({"exit": self._sandbox.exit_code})

    def close(self) -> None:
        """Hang up. A program that it started is killed."""
        if self._peer.fileno() < 0:
            return
        self._sandbox.loop.remove(self._peer.fileno())
        self._peer.close()
        self._server.clients.discard(self)
        self.outgoing.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        process = self._process
        if process is not None and process.status is None and process.error is None:
            process.signal(SIGKILL)

    # requests ----------------------------------------------------------------------------------------

    def start(self, message: dict[str, Any], fds: list[int]) -> None:
        """Run the bundle's program."""
        begin = self._sandbox.on_start
        if begin is None or self._sandbox.process is not None:
            raise StateError(f"cannot start {self._sandbox.name}: it has been started", "only a created one can be")
        self._report(begin(), self._sandbox.spec.program.args[0])

    def exec(self, message: dict[str, Any], fds: list[int]) -> None:
        """Run one more program with the descriptors that came along."""
        raw = message.get("process")
        if self._process is not None or not isinstance(raw, dict):
            raise ConfigError("exec: no process, or one more on this connection", "a connection for each")
        self._sandbox.running()
        stdin, stdout, stderr, *_ = [*fds, None, None, None]
        self._process = self._sandbox.exec(raw, stdin, stdout, stderr, self._ended)
        self._report(self._process, str((raw.get("args") or [""])[0]))

    def _report(self, process: GuestProcess, program: str) -> None:
        """Tell its number once it runs, or why it does not."""
        from hv.sandbox.sandbox import explain, failure_code

        def look() -> None:
            if process.pid:
                self._due = None
                self.tell({"pid": process.pid})
                if self._process is process and process.status is not None:
                    self._ended(process)
            elif process.error is not None:
                self._due = None
                self.fail(explain(process.error, program), exit=failure_code(process.error))
            elif self._peer.fileno() >= 0:
                self._sandbox.loop.call_later(_LOOK_AGAIN, look)

        self._due = look
        look()

    def _ended(self, process: GuestProcess) -> None:
        from hv.sandbox.sandbox import exit_code_of

        if process.pid and self._due is None and not self._exit_told:       # else `look` tells
            self._exit_told = True
            over = process.status is None and process.error is None
            self.tell({"exit": 128 + SIGKILL if over else exit_code_of(process)})

    def wait(self, message: dict[str, Any], fds: list[int]) -> None:
        """Be told of the end."""
        self.waits = True

    def kill(self, message: dict[str, Any], fds: list[int]) -> None:
        """Signal the bundle's program, or that of this connection."""
        number = _number(message, "signal", 1, 64)
        if self._process is not None:
            self._process.signal(number)
        else:
            self._sandbox.kill(number)
            self.tell({})

    def resize(self, message: dict[str, Any], fds: list[int]) -> None:
        """A terminal's size."""
        size = _number(message, "rows", 0, 0xFFFF), _number(message, "columns", 0, 0xFFFF)
        if self._process is not None:
            self._process.resize(*size)
        else:
            self._sandbox.running().resize(*size)
            self.tell({})

    def stop(self, message: dict[str, Any], fds: list[int]) -> None:
        """A signal, and the end some time later."""
        self._sandbox.stop(_number(message, "milliseconds", 0, 1 << 40) / 1000, _number(message, "signal", 1, 64))
        self.tell({})

    def pause(self, message: dict[str, Any], fds: list[int]) -> None:
        """Hold the guest."""
        self._sandbox.pause()
        self.tell({})

    def resume(self, message: dict[str, Any], fds: list[int]) -> None:
        """Let it go on."""
        self._sandbox.resume()
        self.tell({})

    def state(self, message: dict[str, Any], fds: list[int]) -> None:
        """Whether its program runs, and whether it is held."""
        process = self._sandbox.process
        self.tell({"pid": process.pid if process is not None else 0, "paused": self._sandbox.machine.pausing})

    def stats(self, message: dict[str, Any], fds: list[int]) -> None:
        """The guest's figures."""
        self._ask(self._sandbox.stats)

    def processes(self, message: dict[str, Any], fds: list[int]) -> None:
        """The guest's processes."""
        self._ask(self._sandbox.processes)

    def _ask(self, question: Callable[[], object]) -> None:
        if self._sandbox.machine.pausing:
            raise StateError(f"{self._sandbox.name} is paused", "resume it first")

        def ask() -> None:
            try:
                answer = question()
                self._sandbox.loop.call(lambda: self.tell({"answer": answer}))
            except HvError as error:
                failure = error
                self._sandbox.loop.call(lambda: self.fail(failure))

        start_new_thread(ask, ())


HANDLERS: dict[str, Callable[[Client, dict[str, Any], list[int]], None]] = {
    name: getattr(Client, name) for name in ("start", "exec", "wait", "kill", "resize", "stop", "pause", "resume",
                                             "state", "stats", "processes")}


def _number(message: dict[str, Any], name: str, least: int, most: int) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{message.get('do')}: {name} {value!r:.60}", f"{least} to {most}")
    return value
