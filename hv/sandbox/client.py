"""Ask a sandbox from another process, by the socket in its folder.

    vm = SandboxClient(folder)
    vm.kill(15)
    process = vm.exec({"args": ["sh"], "cwd": "/"}, 0, 1, 2)     # descriptors go along (SCM_RIGHTS)
    code = process.wait()

A connection is one request, or one program that it waits for. Driven by tests/kvm/test_sandbox.py.
"""

from __future__ import annotations

__all__ = ["ClientProcess", "SandboxClient", "StartFailedError"]

from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from select import POLLIN, poll
from time import monotonic

from hv.errors import ConfigError, HvError, StateError
from hv.sandbox.messages import Messages, pack, socket_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KINDS = {"StateError": StateError, "ConfigError": ConfigError}
_LOST = 137                     # 128 + SIGKILL: the VM has gone with all that was in it


class StartFailedError(HvError):
    """A program could not be started: `exit_code` 127 where there is none, 126 where it can't be run."""


class SandboxClient:
    """The sandbox of `folder`. Each method raises StateError where it does not run."""

    def __init__(self, folder: str, timeout: float = 60.0) -> None:
        self.folder, self.timeout = folder, timeout

    def start(self) -> int:
        """Let the bundle's program go, where its sandbox waits for that (`pyhv-vm-runtime create`); its guest's pid."""
        return int(self._ask({"do": "start"})["pid"])

    def exec(self, process: dict[str, Any], stdin: int, stdout: int, stderr: int) -> ClientProcess:
        """Run one more program. StartFailedError, HvError."""
        stream = Stream(self.folder)
        try:
            stream.send({"do": "exec", "process": process}, (stdin, stdout, stderr))
            pid = int(stream.receive(self.timeout)["pid"])
        except BaseException:
            stream.close()
            raise
        return ClientProcess(stream, pid)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code of the bundle's program, once it has ended. TimeoutError."""
        return int(self._ask({"do": "wait"}, timeout)["exit"])

    def kill(self, signal: int) -> None:
        """As Sandbox.kill()."""
        self._ask({"do": "kill", "signal": int(signal)})

    def stop(self, seconds: float, signal: int = 15) -> None:
        """As Sandbox.stop(); returns at once."""
        self._ask({"do": "stop", "milliseconds": int(seconds * 1000), "signal": int(signal)})

    def resize(self, rows: int, columns: int) -> None:
        """The size of the bundle's program's terminal."""
        self._ask({"do": "resize", "rows": rows, "columns": columns})

    def pause(self) -> None:
        """As Sandbox.pause()."""
        self._ask({"do": "pause"})

    def resume(self) -> None:
        """As Sandbox.resume()."""
        self._ask({"do": "resume"})

    def paused(self) -> bool:
        """Whether it is held."""
        return bool(self._ask({"do": "state"})["paused"])

    def stats(self) -> dict[str, Any]:
        """As Sandbox.stats()."""
        return dict(self._ask({"do": "stats"})["answer"])

    def processes(self) -> list[dict[str, Any]]:
        """As Sandbox.processes()."""
        return list(self._ask({"do": "processes"})["answer"])

    def _ask(self, message: dict[str, Any], timeout: float | None = -1.0) -> dict[str, Any]:
        stream = Stream(self.folder)
        try:
            stream.send(message)
            return stream.receive(self.timeout if timeout == -1.0 else timeout)
        finally:
            stream.close()


class Stream:
    """A connection."""

    def __init__(self, folder: str) -> None:
        self.socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        self._incoming = Messages()
        try:
            socket_at(folder, self.socket.connect)
        except OSError:
            self.socket.close()
            raise StateError(f"no VM runs in {folder}", "it has ended") from None

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send it, descriptors along."""
        data = pack(message)
        try:
            if fds:
                rights = b"".join(fd.to_bytes(4, "little") for fd in fds)
                data = data[self.socket.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, rights)]):]
            self.socket.sendall(data)
        except OSError:
            raise StateError("the VM has ended") from None

    def receive(self, timeout: float | None) -> dict[str, Any]:
        """The next message. Errors that it tells of; StateError where the VM is gone, TimeoutError."""
        end = None if timeout is None else monotonic() + timeout
        waiter = poll()
        waiter.register(self.socket, POLLIN)
        while (message := self._incoming.next()) is None:
            left = None if end is None else max(0.0, end - monotonic()) * 1000
            if not waiter.poll(left):
                raise TimeoutError(f"the VM did not answer within {timeout:g} s")
            try:
                data = self.socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                raise StateError("the VM has ended")
            self._incoming.feed(data)
        if "error" in message:
            if "exit" in message:
                failure = StartFailedError(str(message["error"]), str(message["hint"]))
                failure.exit_code = int(message["exit"])
                raise failure
            raise _KINDS.get(str(message.get("kind")), HvError)(str(message["error"]), str(message["hint"]))
        return message

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


class ClientProcess:
    """A program that exec() started; it is killed where this process ends before it does. `pid`: in the guest."""

    def __init__(self, stream: Stream, pid: int) -> None:
        self._stream, self.pid = stream, pid
        self._code: int | None = None

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._stream.socket.fileno()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, 128 + n by signal n. TimeoutError."""
        if self._code is None:
            try:
                self._code = int(self._stream.receive(timeout)["exit"])
            except StateError:
                self._code = _LOST
        return self._code

    def kill(self, signal: int) -> None:
        """Signal it."""
        self._stream.send({"do": "kill", "signal": int(signal)})

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal's size."""
        self._stream.send({"do": "resize", "rows": rows, "columns": columns})

    def close(self) -> None:
        """Hang up: it is killed if it runs."""
        self._stream.close()
