"""Speaking to a control socket line by line, without pyhv's own client; commands for its server to serve."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from hv.errors import StateError
from hv.machine.console import Console
from hv.machine.control import Control
from hv.machine.loop import Loop

COMMANDS = {name: f"framework.control:{name}" for name in ("echo", "fails", "bug", "steps", "later", "attach")}


class Line:
    """A client: `ask` one thing, or `send` bytes and `read` replies by hand."""

    def __init__(self, path: str, timeout: float = 10) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)       # waiting: without, it fails where others stand in line
        self.socket.settimeout(timeout)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask(self, command: object, **fields: object) -> dict[str, Any]:
        self.send(json.dumps({"command": command} | fields).encode() + b"\n")
        return self.read()

    def wait_for(self, text: bytes, timeout: float = 15) -> bytes:
        """Raw bytes up to and with `text`."""
        end = time.monotonic() + timeout
        while text not in self.buffer:
            assert time.monotonic() < end, f"{text!r} did not come; got {self.buffer[-400:]!r}"
            data = self.socket.recv(65536)
            assert data, f"hung up before {text!r}; got {self.buffer[-400:]!r}"
            self.buffer += data
        at = self.buffer.index(text) + len(text)
        seen, self.buffer = self.buffer[:at], self.buffer[at:]
        return seen

    def ended(self) -> bool:
        """Whether the other side hangs up now, without another byte."""
        try:
            return not self.buffer and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


class Host:
    """What a control socket needs of a machine, without a VM: a loop that a thread serves, and a console."""

    def __init__(self, path: str, commands: dict[str, str] = COMMANDS) -> None:
        self.loop = Loop()
        self.console = Console()
        self.closing = threading.Event()
        self.seen: list[object] = []
        self._stop = False
        try:
            self.control = Control(self, path, commands)  # type: ignore[arg-type]
        except BaseException:
            self.loop.close()
            raise
        self.thread = threading.Thread(target=lambda: self.loop.run_until(lambda: self._stop))
        self.thread.start()

    def running(self) -> bool:
        return not self._stop

    def close(self) -> None:
        self._stop = True
        self.loop.call(lambda: None)
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.control.close()
        self.loop.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def echo(call: Any, *, text: str = "", number: int | None = None, share: float = 0.5, flag: bool = False,
         ) -> dict[str, object]:
    return {"text": text, "number": number, "share": share, "flag": flag}


def fails(call: Any) -> dict[str, object]:
    raise StateError("not now", "try later")


def bug(call: Any, *, needed: str) -> dict[str, object]:
    return {"never": needed[10 ** 6]}


def steps(call: Any, *, count: int, pause: float = 0.0) -> Iterator[dict[str, object]]:
    try:
        for step in range(count):
            yield {"step": step}
            time.sleep(pause)
        return {"steps": count}
    finally:
        call.machine.seen.append("closed")


def later(call: Any) -> None:
    call.on_end = lambda: {"last": "words"}


def attach(call: Any, *, history: int = 0, types: bool = True) -> None:
    call.client.become_console(history, types)
