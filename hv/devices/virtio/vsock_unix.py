"""The socket device's host side: Unix sockets, in the convention of Firecracker and cloud-hypervisor.

    host to guest   a client connects to SOCKET and writes `CONNECT <port>\\n`; `OK <host port>\\n` answers it once
                    the guest has accepted, else the connection is closed
    guest to host   a stream to CID 2, port P goes to whoever listens at SOCKET_P, or is refused

Nothing here blocks: a connect to a Unix socket succeeds or fails at once, or asks to come again (a full backlog).
Driven by tests/unit/test_virtio_vsock.py.
"""

from __future__ import annotations

__all__ = ["HostSide", "Listener", "listen_at"]

import errno
import os
import stat
from _socket import AF_UNIX, MSG_PEEK, SOCK_NONBLOCK, SOCK_STREAM, socket
from select import EPOLLET, EPOLLHUP, EPOLLIN, EPOLLRDHUP
from time import monotonic

from hv.devices.virtio.vsock_packet import PORT_MOST
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.vsock import Vsock
    from hv.devices.virtio.vsock_conn import Connection
    from hv.devices.virtio.vsock_local import Listener
else:
    Listener = object

PATH_MOST = 107             # sun_path, without its end (man 7 unix)
SUFFIX_MOST = len("_4294967294")
BACKLOG = 4096              # the kernel takes less where net.core.somaxconn is less
LINE_MOST = 32              # `CONNECT 4294967294\r\n` and some spaces
LINE_SECONDS = 60.0         # a client has so long to write its line
DIAL_SECONDS = 2.0          # Linux' connect() waits as long (VSOCK_DEFAULT_CONNECT_TIMEOUT)
DIAL_AGAIN = 0.02
DIALS_MOST = 256            # that wait for a backlog to have room; each costs a system call every DIAL_AGAIN
ACCEPT_AGAIN = 0.2          # after a shortage of descriptors
ACCEPT_MOST = 64            # clients before other work gets a turn


def listen_at(path: str) -> socket:
    """A socket that listens at `path`; what a killed run left there is replaced. ConfigError."""
    if not path or len(os.fsencode(path)) > PATH_MOST - SUFFIX_MOST:
        raise ConfigError(f"--vsock {path!r}: a socket's path has 1 to {PATH_MOST - SUFFIX_MOST} bytes",
                          "choose a shorter one, for example in /tmp")
    try:
        _remove_stale(path)
        listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
        try:
            listener.bind(path)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"--vsock {path}: {getattr(error, 'strerror', None) or error}",
                          "name a path in a folder that you may write to") from None
    return listener


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--vsock {path}: exists, and is no socket", "remove it, or name another path")
    probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
    try:
        answer = probe.connect_ex(path)
    finally:
        probe.close()
    if answer != errno.ECONNREFUSED:    # nobody listens
        raise ConfigError(f"--vsock {path}: somebody listens there ({os.strerror(answer) if answer else 'in use'})",
                          "another machine? name another path")
    os.unlink(path)


class HostSide:
    """Clients that come, programs that are called. `path` is "" where only this process may take part."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.clients: set[_Client] = set()
        self.listeners: dict[int, Listener] = {}
        self._dialling: dict[Connection, tuple[socket, float]] = {}
        self._listener = listen_at(path) if path else None
        self._inode = _inode(path)
        self._device: Vsock

    def attach(self, device: Vsock) -> None:
        """Begin to take clients."""
        self._device = device
        if self._listener is not None:
            device.io.add(self._listener.fileno(), EPOLLIN, self._accept)

    # host to guest ---------------------------------------------------------------------------------

    def _accept(self, events: int) -> None:
        device, listener = self._device, self._listener
        assert listener is not None
        with device.lock:
            for _ in range(ACCEPT_MOST):
                try:
                    fd, _address = listener._accept()  # type: ignore[attr-defined]
                except BlockingIOError:
                    return
                except OSError:
                    # Out of descriptors or memory: they wait in the backlog, and the loop must not spin on it.
                    device.refused += 1
                    device.io.modify(listener.fileno(), 0)
                    device.io.call_later(ACCEPT_AGAIN, self._accept_again)
                    return
                sock = socket(AF_UNIX, SOCK_STREAM, 0, fd)
                sock.setblocking(False)
                if device.driver_ready and device.open < device.most:
                    _Client(device, sock)
                else:
                    device.refused += 1
                    sock.close()

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._device.io.modify(self._listener.fileno(), EPOLLIN)

    # guest to host ---------------------------------------------------------------------------------

    def listen(self, port: int, backlog: int) -> Listener:
        """Streams to `port` go to a program in this process."""
        from hv.devices.virtio.vsock_local import Listener

        with self._device.lock:
            if port in self.listeners:
                raise OSError(errno.EADDRINUSE, f"vsock port {port} has a listener")
            self.listeners[port] = Listener(self, port, backlog)
            return self.listeners[port]

    def dial(self, stream: Connection) -> None:
        """Find the host's end for a stream that the guest asks for; it may be accepted later."""
        device = self._device
        port = stream.host_port
        listener = self.listeners.get(port)
        try:
            if listener is not None:
                stream.accept(listener.offer())
                return
            if not self.path:
                raise ConnectionRefusedError
            sock = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
        except OSError as error:
            device.refused += error.errno in (errno.EMFILE, errno.ENFILE)
            device.reset(stream)
            return
        if self._try(stream, sock):
            return
        if len(self._dialling) >= DIALS_MOST:
            sock.close()
            device.refused += 1
            device.reset(stream)
            return
        if not self._dialling:
            device.io.call_later(DIAL_AGAIN, self._dial_again)
        self._dialling[stream] = sock, monotonic() + DIAL_SECONDS

    def _try(self, stream: Connection, sock: socket) -> bool:
        """One attempt; False where it should be made again."""
        answer = sock.connect_ex(f"{self.path}_{stream.host_port}")
        if answer == errno.EAGAIN:
            return False
        if answer:
            sock.close()
            self._device.reset(stream)
        else:
            stream.accept(sock)
        return True

    def _dial_again(self) -> None:
        device = self._device
        with device.lock:
            now = monotonic()
            for stream, (sock, until) in tuple(self._dialling.items()):
                if not stream.alive:
                    sock.close()
                elif not self._try(stream, sock):
                    if now < until:
                        continue
                    sock.close()
                    device.reset(stream)
                del self._dialling[stream]
            if self._dialling:
                device.io.call_later(DIAL_AGAIN, self._dial_again)
            device.pump()

    def close(self) -> None:
        """Close and remove the socket. The I/O loop has ended."""
        for sock, _ in self._dialling.values():
            sock.close()
        self._dialling.clear()
        for listener in tuple(self.listeners.values()):
            listener.close()
        listener_socket, self._listener = self._listener, None
        if listener_socket is not None:
            listener_socket.close()
            if _inode(self.path) == self._inode:    # else somebody has put another there
                try:
                    os.unlink(self.path)
                except OSError:
                    pass    # the folder may not be written to any more; the next run replaces a stale socket


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Client:
    """A host program that has not said yet which port it wants."""

    __slots__ = ("_device", "_sock")

    def __init__(self, device: Vsock, sock: socket) -> None:
        self._device = device
        self._sock = sock
        device.host.clients.add(self)
        device.expire(self, LINE_SECONDS)
        device.io.add(sock.fileno(), EPOLLIN | EPOLLRDHUP | EPOLLET, self._on_events)

    def _on_events(self, events: int) -> None:
        with self._device.lock:
            if self not in self._device.host.clients:
                return
            try:
                line = self._sock.recv(LINE_MOST, MSG_PEEK)
            except BlockingIOError:
                return
            except OSError:
                self.drop()
                return
            length = line.find(b"\n") + 1
            if length:
                port = _parse(line[:length])
                if port is None:
                    self.drop()
                    return
                self._sock.recv(length)     # what stands behind it is the guest's
                self._leave()
                self._device.open_for_host(self._sock, port)
            elif len(line) == LINE_MOST or not line or events & (EPOLLRDHUP | EPOLLHUP):
                self.drop()

    def expired(self) -> None:
        """It said nothing."""
        self.drop()

    def drop(self) -> None:
        """Close it."""
        self._leave()
        self._sock.close()

    def _leave(self) -> None:
        device = self._device
        device.host.clients.discard(self)
        device.settled(self)
        device.io.remove(self._sock.fileno())


def _parse(line: bytes) -> int | None:
    """The port of `CONNECT <port>`."""
    words = line.split()
    if len(words) != 2 or words[0].upper() != b"CONNECT" or not words[1].isdigit():
        return None
    port = int(words[1])
    return port if port <= PORT_MOST else None
