"""A connection to the keeper: its frames in, its frames out, and how much of them waits.

Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["HIGH", "LOW", "Guest"]

from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT

from hv.errors import HvError
from hv.instance.wire import Frames, frame, frames
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

    from hv.instance.keeper import Keeper
    from hv.instance.kept import Kept

_CHUNK = 1 << 16
HIGH, LOW = 1 << 20, 1 << 18    # bytes waiting for a guest at which its instance is read no more, and again
_GONE = EPOLLHUP | EPOLLERR


class Guest:
    """`kept` is the instance it is attached to."""

    def __init__(self, keeper: Keeper, sock: socket) -> None:
        self._keeper, self._socket = keeper, sock
        self._frames = Frames()
        self._out = bytearray()
        self._asked_once = self._ending = False
        self._paused = False
        self.asked: dict[str, Any] = {}
        self.kept: Kept | None = None
        sock.setblocking(False)
        keeper.add(sock.fileno(), EPOLLIN, self._ready)

    @property
    def waiting(self) -> int:
        """Bytes that it has not taken yet."""
        return len(self._out)

    def answer(self, said: dict[str, Any]) -> None:
        """The answer to its request."""
        self._send(frame(b"A", dumps(said).encode()))

    def output(self, kind: bytes, data: bytes) -> None:
        """What the program wrote."""
        self._send(frames(kind, data))

    def end(self, code: int) -> None:
        """The exit code; then it is hung up on."""
        self._ending = True
        self._send(frame(b"X", code.to_bytes(4, "little")))

    def read_on(self, on: bool) -> None:
        """Read what it sends, or not now: its program takes no more input."""
        if self._paused == on:
            self._paused = not on
            self._look()

    def _look(self) -> None:
        events = (0 if self._paused else EPOLLIN) | (EPOLLOUT if self._out else 0)
        try:
            self._keeper.change(self._socket.fileno(), events)
        except (OSError, ValueError):
            pass                        # closed

    def _send(self, data: bytes) -> None:
        first = not self._out
        self._out += data
        if first:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                done = self._socket.send(self._out[:_CHUNK])
                del self._out[:done]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._ending and not self._out:
            self.close()
            return
        self._look()
        if self.kept is not None and self.waiting < LOW:
            self.kept.flow()

    def _ready(self, events: int) -> None:
        if events & EPOLLOUT:
            self._flush()
        if events & EPOLLIN:
            self._read()
        elif events & _GONE:
            self.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            for kind, payload in self._frames.feed(data):
                self._take(kind, payload)
        except (HvError, ValueError) as error:
            self._keeper.note(f"a connection: {error}")
            self.close()

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind == b"Q" and not self._asked_once:
            self._asked_once = True
            asked = loads(payload.decode())
            if not isinstance(asked, dict):
                raise HvError("a request that is no object")
            try:
                self._keeper.request(self, asked)
            except HvError as error:
                self.answer({"error": f"{error}", "hint": error.hint})
        elif self.kept is not None:
            self.kept.heard(self, kind, payload)
        elif kind == b"Q" or not self.asked:
            raise HvError("a frame that nobody has asked for")
        else:
            self._early(kind, payload)

    def _early(self, kind: bytes, payload: bytes) -> None:
        """What comes before its instance does is kept for then."""
        rows = self.asked.setdefault("early", [])
        if sum(len(row[1]) for row in rows) > HIGH:
            raise HvError("too much input before the instance runs")
        rows.append((kind, payload))

    def close(self) -> None:
        """Hang up."""
        if self._socket.fileno() < 0:
            return
        self._keeper.drop(self._socket.fileno())
        self._socket.close()
        self._out.clear()
        self._keeper.gone(self)
        if self.kept is not None:
            kept, self.kept = self.kept, None
            kept.detach(self)
