"""User-mode networking: a guest reaches the network through passt's sockets, without root (docs/net.md).

Between passt and us is a stream: each frame behind its length in 4 bytes, big endian (man 1 passt; QEMU's `-netdev
stream` is the same). passt takes complete frames only, so checksums are completed here, which spares the guest the
work; a large TCP segment goes as one frame if it is not too long for passt, since its data ends in a socket anyway.
Driven by tests/unit/test_virtio_net_user.py and tests/kvm/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["NetUser"]

import os

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net_backend import Backend, scatter
from hv.devices.virtio.net_offload import finish, is_plain
from hv.devices.virtio.net_passt import ADDRESS, Passt, arp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import Io
    from hv.devices.virtio.net_config import Forward

EPOLLIN = 1                         # include/uapi/linux/eventpoll.h
_PREFIX = 4
FRAME_MOST = 65535                  # ETH_MAX_MTU: passt hangs up on more
_BUFFER = 4 * (FRAME_MOST + _PREFIX)
_HEADERS = (bytes(net.HEADER_SIZE), bytes((net.HDR_DATA_VALID, *bytes(net.HEADER_SIZE - 1))))


class NetUser(Backend):
    """A passt of its own; `forwards` are (protocol, address, port of the host, port of the guest)."""

    features = net.F_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_GUEST_CSUM

    def __init__(self, forwards: tuple[Forward, ...] = (), mtu: int = 0) -> None:
        self.passt = Passt(forwards, mtu)
        self.fd = self.passt.fd
        self.identity = "user=" + "+".join(f"{protocol}:{address}:{host}" for protocol, address, host, _ in forwards)
        self._header = _HEADERS[0]
        self._unsent = b""          # the rest of a frame that passt took a part of
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0
        self._io: Io | None = None

    def attach(self, io: Io, mac: bytes, change: Callable[[Callable[[], None]], None]) -> None:
        """Its complaints are read, so that it never waits for us."""
        self._io = io
        # passt learns the guest's hardware address from what it sends, and has to know it for forwarded connections.
        announcement = arp(mac, ADDRESS, ADDRESS)
        os.write(self.fd, len(announcement).to_bytes(_PREFIX, "big") + announcement)
        io.add(self.passt.errors, EPOLLIN, self._complaint)

    def _complaint(self, events: int) -> None:
        self.passt.complaint()
        if not events & EPOLLIN and self._io is not None:
            self._io.remove(self.passt.errors)      # it has ended: receive() tells

    def negotiated(self, features: int) -> None:
        """Frames from sockets are sound: the driver need not check them (5.1.6.4.1, DATA_VALID)."""
        self._header = _HEADERS[bool(features & net.F_GUEST_CSUM)]

    def send(self, parts: list[memoryview]) -> bool:
        """One frame into the stream; a part of it is as good as all, the rest goes before the next."""
        if self._unsent and not self._flush():
            return False
        head = parts[0]
        if len(head) >= net.SHORTEST and is_plain(head):
            parts = [head[net.HEADER_SIZE:], *parts[1:]]
            size = sum(map(len, parts))
            if size > FRAME_MOST:
                raise OSError("too long")
            parts.insert(0, memoryview(size.to_bytes(_PREFIX, "big")))
            size += _PREFIX
        else:
            frames = [frame for frame in finish(b"".join(parts), FRAME_MOST) if len(frame) <= FRAME_MOST]
            if not frames:
                raise OSError("no frame")
            stream = b"".join(part for frame in frames for part in (len(frame).to_bytes(_PREFIX, "big"), frame))
            parts, size = [memoryview(stream)], len(stream)
        try:
            done = os.writev(self.fd, parts)
        except BlockingIOError:
            return False
        if done < size:
            self._unsent = b"".join(parts)[done:]
        return True

    def _flush(self) -> bool:
        try:
            self._unsent = self._unsent[os.write(self.fd, self._unsent):]
        except BlockingIOError:
            return False
        return not self._unsent

    def receive(self, views: list[memoryview]) -> int:
        """The next frame of the stream, behind a header of ours."""
        start, buffer = self._start, self._buffer
        while True:
            have = self._end - start
            if have >= _PREFIX:
                size = int.from_bytes(buffer[start:start + _PREFIX], "big")
                if not net.ETHERNET <= size <= FRAME_MOST:
                    raise OSError(f"passt: a frame of {size} bytes")
                if have >= _PREFIX + size:
                    break
            if start:
                # bytes(): source and target may overlap
                buffer[:have] = bytes(buffer[start:self._end])
                self._start, self._end, start = 0, have, 0
            got = os.readv(self.fd, [buffer[self._end:]])
            if not got:
                raise OSError("passt has ended")
            self._end += got
        frame = buffer[start + _PREFIX:start + _PREFIX + size]
        first = views[0]
        if len(first) >= net.HEADER_SIZE + size:
            first[:net.HEADER_SIZE] = self._header
            first[net.HEADER_SIZE:net.HEADER_SIZE + size] = frame
        else:
            scatter(self._header + frame, views)
        self._start = start + _PREFIX + size
        return net.HEADER_SIZE + size

    def close(self) -> None:
        """passt ends with its socket. The loop has ended before."""
        self.fd = -1
        self.passt.close()
