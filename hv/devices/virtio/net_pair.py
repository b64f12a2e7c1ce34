"""A cable between two guests: a UNIX socket that keeps frames apart (SOCK_SEQPACKET), with the header in front of each.

The first guest that names SOCKET listens there, the second one connects; each may leave and come back. Locks beside
the socket (hv/linux/slots.py) say who is which, so a socket that was left behind is told from one in use.

Both drivers are offered all offloads: a large segment or an open checksum crosses as it is. If the receiving driver did
not take the feature, or the header makes no sense, the receiving end finishes the frame or drops it: what comes out of
the socket was made by another guest. Driven by tests/unit/test_virtio_net_pair.py and tests/kvm/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["NetCable", "NetPair"]

import os
import stat
from _socket import AF_UNIX, SO_SNDBUF, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net_backend import Backend, scatter
from hv.devices.virtio.net_offload import finish, is_plain, may_pass
from hv.errors import ConfigError
from hv.linux.slots import leave_slot, take_slot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import Io

EPOLLIN = 1                     # include/uapi/linux/eventpoll.h
RETRY = 0.5                     # seconds between two looks for the other guest
PATH_MOST = 100                 # sun_path has 108 bytes (man 7 unix)
_KIND = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK
_BUFFER = 1 << 20               # bytes under way; the host may allow less
_PLAIN = bytes(net.HEADER_SIZE)


class NetCable(Backend):
    """One end of a cable: a connected socket, or none (-1)."""

    features = (net.F_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN
                | net.F_GUEST_CSUM | net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_ECN)

    def __init__(self, fd: int = -1) -> None:
        self._taken = 0                             # features of the driver
        self._finished: list[bytearray] = []        # plain frames that one large one became
        self._io: Io | None = None
        self._change: Callable[[Callable[[], None]], None] | None = None
        self.fd = -1
        self.carrier = False
        if fd >= 0:
            self._adopt(fd)
            self.identity = f"socketpair={os.fstat(fd).st_ino}"

    @staticmethod
    def socketpair() -> tuple[NetCable, NetCable]:
        """Two ends, for two machines of one process."""
        ends = socketpair(AF_UNIX, _KIND)
        for end in ends:
            end.setsockopt(SOL_SOCKET, SO_SNDBUF, _BUFFER)
        return NetCable(ends[0].detach()), NetCable(ends[1].detach())

    def attach(self, io: Io, mac: bytes, change: Callable[[Callable[[], None]], None]) -> None:
        """The loop is known now."""
        self._io, self._change = io, change

    def negotiated(self, features: int) -> None:
        """What may come out of the cable as it went in."""
        self._taken = features

    def send(self, parts: list[memoryview]) -> bool:
        """Header and frame as one message."""
        try:
            os.writev(self.fd, parts)
        except BlockingIOError:
            return False
        return True     # an error is the peer's leaving, which receive() sees too

    def receive(self, views: list[memoryview]) -> int:
        """One message, finished if the driver can't do that; the next of several."""
        while not self._finished:
            if self.fd < 0:
                raise BlockingIOError
            try:
                size = os.readv(self.fd, views)
            except BlockingIOError:
                raise
            except OSError:
                size = 0        # ECONNRESET: the peer left with frames unread
            if not size:
                self._hang_up()
                raise BlockingIOError
            if size < net.SHORTEST:
                continue
            header = views[0][:net.HEADER_SIZE]
            if len(header) < net.HEADER_SIZE:
                header = memoryview(b"".join(views)[:net.HEADER_SIZE])
            if is_plain(header):
                scatter(_PLAIN, views)
                return size
            if may_pass(self._taken, header, size - net.HEADER_SIZE):
                return size
            self._finished = finish(b"".join(views)[:size], 0)
        frame = self._finished.pop(0)
        scatter(_PLAIN + frame, views)
        return net.HEADER_SIZE + len(frame)

    def _adopt(self, fd: int) -> None:
        """`fd` is the cable from now on."""
        self._let_go()
        os.set_blocking(fd, False)
        self.fd, self.carrier = fd, True

    def _let_go(self) -> None:
        if self.fd >= 0:
            if self._io is not None:
                self._io.remove(self.fd)
            os.close(self.fd)
        self.fd, self.carrier = -1, False

    def _hang_up(self) -> None:
        """The other guest has left. With the device's lock held."""
        self._let_go()
        assert self._io is not None
        self._io.call(self._peer_left)

    def _peer_left(self) -> None:
        if self._change is not None:
            self._change(lambda: None)

    def close(self) -> None:
        """This end's."""
        self._io = None
        self._let_go()


class NetPair(NetCable):
    """The cable that two guests find by the name of a socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = os.path.abspath(path)
        if len(os.fsencode(self.path)) > PATH_MOST:
            raise ConfigError(f"--net pair={path}: a socket's path has at most {PATH_MOST} bytes", "use a shorter one")
        try:
            self._lock, self.slot = take_slot(self.path + ".lock", 2)
        except OSError as error:
            raise ConfigError(f"--net pair={path}: {error.strerror}",
                              "it must be in a folder you may write to") from None
        if self._lock < 0:
            raise ConfigError(f"--net pair={path}: two guests are joined there",
                              "a cable has two ends; use another name")
        self._listener: socket | None = None
        self.identity = f"pair={self.path},{self.slot}"
        try:
            self._check()
            if self.slot == 0:
                self._listen()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise ConfigError(f"--net pair={path}: {error.strerror}", "use another name") from None
            raise

    def _check(self) -> None:
        """Whether what is at the path, if anything, is ours to use. ConfigError, OSError."""
        if not os.path.lexists(self.path):
            return
        if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
            raise ConfigError(f"--net pair={self.path} is there and is no socket", "use another name")
        if self.slot == 0 and (fd := self._dial()) >= 0:
            os.close(fd)
            raise ConfigError(f"--net pair={self.path} belongs to another program", "use another name")

    def _dial(self) -> int:
        """A connection to who listens at the path, -1 where nobody does."""
        peer = socket(AF_UNIX, _KIND)
        try:
            peer.connect(self.path)
            peer.setsockopt(SOL_SOCKET, SO_SNDBUF, _BUFFER)
            return peer.detach()
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            return -1
        finally:
            peer.close()

    def _listen(self) -> None:
        if os.path.lexists(self.path):
            os.unlink(self.path)        # left behind: its guest would hold the lock
        self._listener = socket(AF_UNIX, _KIND)
        self._listener.bind(self.path)
        self._listener.listen(1)

    def attach(self, io: Io, mac: bytes, change: Callable[[Callable[[], None]], None]) -> None:
        """Wait for the other guest, or look for it."""
        super().attach(io, mac, change)
        if self._listener is not None:
            io.add(self._listener.fileno(), EPOLLIN, self._accept)
        else:
            self._seek()

    def _accept(self, events: int) -> None:
        assert self._listener is not None and self._change is not None
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return      # gone again
        peer = socket(fileno=fd)
        peer.setsockopt(SOL_SOCKET, SO_SNDBUF, _BUFFER)
        self._change(lambda: self._adopt(peer.detach()))        # the one before has left, and we have not noticed yet

    def _seek(self) -> None:
        if self._io is None or self._change is None or self.fd >= 0:
            return
        try:
            fd = self._dial()
        except OSError:
            fd = -1     # somebody changed what is at the path
        if fd >= 0:
            self._change(lambda: self._adopt(fd))
        else:
            self._io.call_later(RETRY, self._seek)

    def _peer_left(self) -> None:
        super()._peer_left()
        if self._listener is None:
            self._seek()

    def close(self) -> None:
        """Also the name, where it is ours."""
        super().close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
        if self._lock >= 0:
            leave_slot(self._lock, self.path + ".lock", 2, self.slot)
            self._lock = -1
