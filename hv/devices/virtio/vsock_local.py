"""Streams to and from the guest for a program that embeds the machine: Python sockets, no files.

    with machine.devices["vsock0"].listen(5000) as listener:    # the guest connects to CID 2, port 5000
        stream = listener.accept(timeout=10)
    stream = machine.devices["vsock0"].connect(6000)            # the guest listens at port 6000

Each is one end of a socket pair whose other end the device has. Driven by tests/unit/test_virtio_vsock.py.
"""

from __future__ import annotations

__all__ = ["Listener", "connect", "connect_bare"]

import _socket
from _queue import Empty, SimpleQueue
from _socket import AF_UNIX, SOCK_STREAM, socketpair
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

    from hv.devices.virtio.vsock import Vsock
    from hv.devices.virtio.vsock_unix import HostSide

_WELCOME_MOST = 32


def connect(device: Vsock, port: int, timeout: float) -> socket:
    """A stream to the guest's `port`. ConnectionRefusedError, TimeoutError."""
    return _dressed(connect_bare(device, port, timeout))


def connect_bare(device: Vsock, port: int, timeout: float) -> _socket.socket:
    """The same without the module socket, whose import takes as long as the guest's answer."""
    ours, its = _pair()

    def ask() -> None:
        with device.lock:
            device.open_for_host(its, port)

    try:
        device.io.call(ask)
        _await_welcome(ours, port, monotonic() + timeout)
    except BaseException:
        ours.close()
        raise
    ours.settimeout(None)
    return ours


def _await_welcome(ours: _socket.socket, port: int, end: float) -> None:
    """Read the line that says that the guest has accepted, and nothing behind it."""
    line = b""
    while not line.endswith(b"\n"):
        ours.settimeout(max(0.001, end - monotonic()))
        part = ours.recv(1)
        if not part or len(line) > _WELCOME_MOST:
            raise ConnectionRefusedError(f"nobody listens at the guest's vsock port {port}")
        line += part


def _pair() -> tuple[_socket.socket, _socket.socket]:
    ours, its = socketpair(AF_UNIX, SOCK_STREAM)
    its.setblocking(False)
    return ours, its


def _dressed(stream: _socket.socket) -> socket:
    from socket import socket

    return socket(fileno=stream.detach())


class Listener:
    """Streams that the guest opens to one port of the host. close() ends it; what was not accepted is refused."""

    def __init__(self, host: HostSide, port: int, backlog: int) -> None:
        self._host = host
        self._backlog = backlog
        self._waiting: SimpleQueue[socket | None] = SimpleQueue()
        self.port = port

    def accept(self, timeout: float | None = None) -> socket:
        """The next stream. TimeoutError, ConnectionAbortedError where the listener was closed."""
        try:
            stream = self._waiting.get(timeout=timeout)
        except Empty:
            raise TimeoutError(f"no stream to vsock port {self.port} in {timeout} s") from None
        if stream is None:
            self._waiting.put(None)     # for whoever else waits
            raise ConnectionAbortedError(f"the listener at vsock port {self.port} is closed")
        return stream

    def offer(self) -> _socket.socket:
        """The device's end of a new stream. OSError where too many wait, or there are no descriptors."""
        if self._waiting.qsize() >= self._backlog:
            raise ConnectionRefusedError
        ours, its = _pair()
        self._waiting.put(_dressed(ours))
        return its

    def close(self) -> None:
        """Refuse streams from now on."""
        if self._host.listeners.get(self.port) is self:
            del self._host.listeners[self.port]
        while not self._waiting.empty():
            stream = self._waiting.get()
            if stream is not None:
                stream.close()
        self._waiting.put(None)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
