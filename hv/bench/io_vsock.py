"""vsock: one stream in each direction between the mock driver and a program of the host; beside it a plain socket pair.

Driver and device take turns in this process, payload lies in guest memory; the host's program is a process of its own
(stream_end.py), the same for the socket pair. What arrives is counted, and numbers in it are looked at. Driven by
tests/kvm/test_bench_io.py.
"""

from __future__ import annotations

__all__ = ["vsock_group"]

import socket
import subprocess
import sys
import time
from contextlib import contextmanager

from hv.bench import stream_end
from hv.bench.io_group import MIB, Group, Run
from hv.bench.rings import FastRing
from hv.bench.stream_end import PIECE, TAIL
from hv.devices.virtio import vsock_packet as packet
from hv.devices.virtio.vsock import RX, TX
from hv.devices.virtio.vsock_config import VsockConfig
from hv.devices.virtio.vsock_packet import HEADER, HEADER_SIZE
from hv.errors import HvError
from hv.memory.guest import GuestMemory
from hv.testing import Driver, EpollLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CID, PORT, HOST_PORT = 42, 9, 5000
RING = 128
BUFFERS = 64            # receive buffers that the device has, as many as the ring holds
LINUX_BUFFER = 4096     # Linux 6.1's (VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE)
WINDOW = 1 << 20        # bytes that the guest's end of the stream takes
RAM = 16 << 20
_PATIENCE = 60.0
_BASE = "host, a socket pair"
_MEASURES = {"to-host": ("vsock: one stream, guest to host, packets of 64 KiB", "MB/s"),
             "to-guest": ("vsock: one stream, host to guest, receive buffers of 64 KiB", "MB/s"),
             "to-guest-4k": ("vsock: one stream, host to guest, receive buffers of 4 KiB as Linux has them", "MB/s")}


def vsock_group(amounts: dict[str, int]) -> Group:
    """The device and the socket pair."""
    total = amounts["stream"] * MIB

    def device() -> dict[str, float]:
        return {"to-host": _to_host(total), "to-guest": _to_guest(total, PIECE),
                "to-guest-4k": _to_guest(total // 4, LINUX_BUFFER)}

    return Group(_MEASURES, _BASE, [Run("pyhv", device), Run(_BASE, lambda: dict.fromkeys(_MEASURES, _plain(total)))])


class _End:
    """A program at one end of a stream."""

    def __init__(self, stream: socket.socket, way: str, total: int) -> None:
        fd = stream.fileno()
        self._child = subprocess.Popen(
            [sys.executable, "-ISE", stream_end.__file__, str(fd), way, str(total)], pass_fds=(fd,),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stream.close()
        self._total = total
        self._line()

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()

    def go(self) -> None:
        """It may send."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def received(self) -> None:
        """Wait until it has everything. HvError where something is missing or wrong."""
        line = self._line()
        if line != f"{self._total} 0":
            raise HvError(f"of {self._total} bytes the host has, and as wrong: {line or 'no answer'}")

    def close(self) -> None:
        """End the program."""
        self._child.kill()
        self._child.communicate()


@contextmanager
def _end(stream: socket.socket, way: str, total: int) -> Iterator[_End]:
    end = _End(stream, way, total)
    try:
        yield end
    finally:
        end.close()


def _rate(total: int, start: int) -> float:
    return total * 1e3 / (time.perf_counter_ns() - start)


def _plain(total: int) -> float:
    first, second = socket.socketpair()
    with _end(first, "send", total) as sender, _end(second, "receive", total) as receiver:
        start = time.perf_counter_ns()
        sender.go()
        receiver.received()
        return _rate(total, start)


class _Guest:
    """A guest with one stream, which it opens to the host's port; `stream` is the host's end."""

    def __init__(self, buffer: int) -> None:
        self.device = VsockConfig(None, CID).create()
        self.memory = GuestMemory(RAM)
        self.loop = EpollLoop()
        self.received = self.credit = 0         # bytes of the stream that came; how many more may be sent
        self.bad = 0
        self._sent = self._told = 0
        self._waiting = 0           # bytes that the host's socket has not taken, as far as known
        self.ended = False          # the device said so
        driver = Driver(self.device, self.memory, self.loop).probe(sizes={RX: RING, TX: RING})
        self._rx: FastRing | None = FastRing(driver, RX)
        self._tx: FastRing | None = FastRing(driver, TX)
        buffers = [self._rx.chain([], [HEADER_SIZE, buffer]) for _ in range(BUFFERS)]
        self._buffers = {chain.head: chain for chain in buffers}
        self._control = self._tx.chain([bytes(HEADER_SIZE)], [])
        body = bytearray(PIECE - len(TAIL)) + TAIL
        self._packets = [self._tx.chain([self._header(packet.OP_RW, PIECE), bytes(body)], []) for _ in range(8)]
        self._rx.offer(*buffers)
        self.device.serve(RX)
        with self.device.listen(HOST_PORT) as listener:
            self._say(packet.OP_REQUEST)
            self.poll(0)
            self.stream = listener.accept(10)

    def _header(self, op: int, length: int = 0) -> bytes:
        return HEADER.pack(CID, packet.HOST_CID, PORT, HOST_PORT, length, packet.TYPE_STREAM, op, 0, WINDOW,
                           self.received & packet.WRAP)

    def _say(self, op: int) -> None:
        assert self._tx is not None
        self._control.readable[0][:] = self._header(op)
        self._tx.offer(self._control)
        self._serve_tx()

    def _serve_tx(self) -> None:
        assert self._tx is not None
        self.device.serve(TX)
        self.loop.run()
        for _ in self._tx.taken():
            pass
        if self._tx.in_flight:
            raise HvError(f"the vsock device keeps packets: {self.device.fault_texts}")

    def send(self, most: int) -> None:
        """As many pieces as there is credit for, and no more than `most` bytes."""
        assert self._tx is not None
        count = min(len(self._packets), self.credit // PIECE, most // PIECE)
        for number, chain in enumerate(self._packets[:count], self._sent // PIECE):
            chain.readable[1][:8] = number.to_bytes(8, "little")
        self._sent += count * PIECE
        self._waiting += count * PIECE
        self.credit -= count * PIECE
        self._tx.offer(*self._packets[:count])
        self._serve_tx()

    def poll(self, timeout: float) -> None:
        """Let the device work, take what it has, and give the buffers back."""
        rx, buffers = self._rx, self._buffers
        assert rx is not None
        self.loop.poll(0 if rx.ready else timeout)
        back = []
        for head, written in rx.taken():
            chain = buffers[head]
            _, _, _, _, length, _, op, _, buf_alloc, fwd_cnt = HEADER.unpack(chain.writable[0])
            if op == packet.OP_RW:
                self.bad += length != written - HEADER_SIZE
                self.bad += stream_end.wrong(chain.writable[1][:length], self.received)
                self.received += length
            elif op in (packet.OP_RST, packet.OP_SHUTDOWN):
                self.ended = True
            self._waiting = (self._sent - fwd_cnt) & packet.WRAP
            self.credit = buf_alloc - self._waiting
            back.append(chain)
        if back:
            rx.offer(*back)
            self.device.serve(RX)
            self.loop.run()
        if self.received - self._told >= WINDOW // 2:
            self._told = self.received
            self._say(packet.OP_CREDIT_UPDATE)

    def flush(self, limit: float) -> None:
        """Wait until the host's socket has taken everything, as the device tells who asks, or is closed."""
        while self._waiting and not self.ended:
            if time.monotonic() > limit:
                raise HvError(f"{self._waiting} bytes of a vsock stream do not reach the host")
            self._say(packet.OP_CREDIT_REQUEST)
            self.poll(0.001)

    @property
    def sent(self) -> int:
        """Bytes of the stream that the device has."""
        return self._sent

    @property
    def ready(self) -> bool:
        """Whether there is something that `poll` has not seen."""
        return self._rx is not None and self._rx.ready

    def close(self) -> None:
        """Give everything back."""
        self.stream.close()
        self._rx = self._tx = None
        self._buffers.clear()
        self._packets.clear()
        del self._control
        self.device.close()
        for queue in self.device.queues:
            queue.reset()
        self.loop.epoll.close()
        self.memory.close()

    def __enter__(self) -> _Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _to_host(total: int) -> float:
    with _Guest(LINUX_BUFFER) as guest, _end(guest.stream, "receive", total) as host:
        start, limit = time.perf_counter_ns(), time.monotonic() + _PATIENCE
        while guest.sent < total and not guest.ended:
            if guest.credit >= PIECE:
                guest.send(total - guest.sent)
                guest.poll(0)
            else:
                guest.poll(1.0)
            if time.monotonic() > limit:
                raise HvError(f"a vsock stream hangs after {guest.sent} bytes to the host")
        guest.flush(limit)
        host.received()
        return _rate(total, start)


def _to_guest(total: int, buffer: int) -> float:
    with _Guest(buffer) as guest, _end(guest.stream, "send", total) as host:
        start, limit = time.perf_counter_ns(), time.monotonic() + _PATIENCE
        host.go()
        while guest.received < total:
            guest.poll(1.0)
            if time.monotonic() > limit or (guest.ended and not guest.ready):
                break
        rate = _rate(total, start)
        if guest.received != total or guest.bad:
            raise HvError(f"of {total} bytes the guest has {guest.received}, {guest.bad} of the numbers are wrong")
        return rate
