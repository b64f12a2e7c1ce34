"""The guest's side of the socket device, on the mock driver: packets sent and received as Python objects."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import NamedTuple

from framework.driver import Driver, EpollLoop

from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.vsock import RX, TX, Vsock
from hv.devices.virtio.vsock_config import VsockConfig
from hv.devices.virtio.vsock_conn import Connection

HEADER = struct.Struct("<QQIIIHHIII")       # not the device's own: one of them may be wrong
RX_BUFFER = [44, 4096]                      # as Linux 6.1 has them
RING = 128


class Packet(NamedTuple):
    """What the device sent."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes


def device_at(folder: Path) -> Vsock:
    """A device whose host socket is `folder`/v."""
    return VsockConfig(str(folder / "v")).create()


def listener_at(path: str, backlog: int = 128) -> socket.socket:
    """A host program's socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(backlog)
    listener.settimeout(10)
    return listener


class Peer:
    """A guest that keeps `buffers` receive buffers of `sizes` at the device."""

    def __init__(self, device: Vsock, buffers: int = 32, sizes: list[int] | None = None) -> None:
        self.device = device
        self.loop = EpollLoop()
        self.driver = Driver(device, loop=self.loop)
        self.listeners = set(self.loop.handlers)
        self.sizes = sizes or RX_BUFFER
        self.buffers = min(buffers, RING // len(self.sizes))
        self.last_used = False
        self.clients: list[socket.socket] = []
        self.again()

    def again(self) -> None:
        """The driver starts, from reset."""
        self.driver.probe(sizes={RX: RING, TX: RING})
        self._posted = 0
        self.refill()

    def refill(self, most: int | None = None) -> None:
        """Give receive buffers."""
        ring = self.driver.rings[RX]
        limit = self.buffers if most is None else most
        while self._posted < limit:
            ring.add([], self.sizes)
            self._posted += 1
        self.driver.notify(RX)

    def packets(self, refill: bool = True) -> list[Packet]:
        """All that the device has to say now."""
        if refill:
            self.refill()
        found = self.given(refill)
        while self.loop.poll():
            found += self.given(refill)
        return found

    def given(self, refill: bool = True) -> list[Packet]:
        """What the device has said already."""
        found = []
        while used := self.driver.rings[RX].take():
            for _, written, parts in used:
                self._posted -= 1
                if written:
                    data = b"".join(parts)[:written]
                    found.append(Packet(*HEADER.unpack(data[:44]), data[44:]))
            if refill:
                self.refill()
        return found

    def raw(self, parts: list[bytes]) -> None:
        """One chain on the tx queue."""
        ring = self.driver.rings[TX]
        ring.add(parts or [], [] if parts else [0])
        self.driver.notify(TX)
        self.last_used = bool(ring.take())

    def send(self, op: int, port: int, host_port: int, data: bytes = b"", *, flags: int = 0, buf_alloc: int = 1 << 20,
             fwd_cnt: int = 0) -> None:
        """A well-formed packet."""
        header = HEADER.pack(3, 2, port, host_port, len(data), 1, op, flags, buf_alloc, fwd_cnt)
        self.raw([header, data] if data else [header])

    def answer(self, to: Packet, op: int, data: bytes = b"", **values: int) -> None:
        """A packet of the stream that `to` belongs to."""
        self.send(op, to.dst_port, to.src_port, data, **values)

    def stream(self, host_port: int, port: int) -> Connection:
        """The device's stream."""
        return self.device._streams[host_port << 32 | port]

    def client(self, path: str) -> socket.socket:
        """A host program, connected to the device's socket."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(path)
        self.clients.append(client)
        return client

    def run_timers(self) -> None:
        """Run all timers that were set before now."""
        timers, self.loop.timers = self.loop.timers, []
        for _, function in timers:
            function()
        self.loop.run()

    def close(self) -> None:
        """Close the device and the clients."""
        self.device.close()
        for client in self.clients:
            client.close()
        assert not set(self.loop.handlers) - self.listeners, "a descriptor is still watched"
        self.loop.epoll.close()
        for queue in self.device.queues:
            queue.reset()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ended(sock: socket.socket) -> bool:
    """Whether it was closed; the kernel says that by a reset where something it sent was not read."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def opened(peer: Peer, path: str, **values: int) -> socket.socket:
    """The host's end of a stream from the guest's port 9 to the host's port 5000, behind a socket at `path`."""
    with listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 9, 5000, **values)
        assert [p.op for p in peer.packets()] == [vp.OP_RESPONSE]
        stream = listener.accept()[0]
        stream.settimeout(10)
    Path(f"{path}_5000").unlink()
    return stream
