"""Socket device: streams between programs in the guest and programs on the host, without a network (virtio 1.2, 5.10).

    guest program -- AF_VSOCK -- driver == tx, rx queues == Vsock -- Connection -- Unix socket -- host program

Packets from the guest are taken as they come, whatever the host's sockets do. Packets to the guest are made only when
it has a buffer for one: `_ready` lists the streams that have something to say, each at most once, and `_resets` the
answers to packets that belong to no stream. When the guest gives no buffers both stay as they are, host sockets are
not read, and with too many answers waiting the tx queue is not served either (5.10.6.1).

Left out on purpose: SOCK_SEQPACKET (VIRTIO_VSOCK_F_SEQPACKET), streams from guest to guest. Streams do not survive a
snapshot: the loaded guest is told by a transport reset (5.10.6.7).

The host's side is in vsock_unix.py. Driven by tests/unit/test_virtio_vsock.py and tests/kvm/test_virtio_vsock.py.
"""

from __future__ import annotations

__all__ = ["Vsock"]

from _collections import deque  # collections itself loads much more
from time import monotonic

from hv.devices.virtio import ids
from hv.devices.virtio import vsock_packet as packet
from hv.devices.virtio.device import VirtioDevice
from hv.devices.virtio.vsock_conn import CLOSING, CONNECTING, REQUESTED, Connection
from hv.devices.virtio.vsock_packet import HEADER, HEADER_SIZE, HOST_CID, OP_RW, TYPE_STREAM, cut

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket as socket_module
    from _socket import socket
    from typing import Protocol

    from hv.devices.virtio.chain import Chain
    from hv.devices.virtio.device import Interrupts, Io
    from hv.devices.virtio.vsock_unix import HostSide, Listener
    from hv.memory.guest import GuestMemory

    class Expiring(Protocol):
        """What waits for an answer."""

        def expired(self) -> None: ...

RX, TX, EVENT = range(3)    # 5.10.2
F_STREAM = 1 << 0           # 5.10.3

TX_BATCH = 64               # packets of 64 KiB: 4 MiB before others get a turn
RX_BATCH = 256
RESETS_MOST = 256           # answers that wait for rx buffers (5.10.6.1.2: a bounded number of additional resources)
BUFFER_MOST, BUFFER_LEAST = 256 << 10, 16 << 10     # buf_alloc: what is kept for one stream's host socket
BUFFERS = 64 << 20          # ... for all: the n-th stream gets an n-th of it, so n streams have BUFFERS * ln(n) at most
HOST_PORTS = 1 << 30        # host clients get port numbers from here up
FINISH_SECONDS = 1.0        # at the end, for all sockets that have bytes to take


class Vsock(VirtioDevice):
    """virtio-vsock. `most` bounds the streams open at a time, `host` is what they end in."""

    ID = ids.VSOCK
    NAME = "virtio-vsock"
    KIND = "vsock"
    QUEUES = (128, 128, 16)
    FEATURES = F_STREAM
    PCI_CLASS = 0x078000        # PCI 3.0, appendix D: other communications device
    DRIVER = "CONFIG_VIRTIO_VSOCKETS (module vmw_vsock_virtio_transport)"

    def __init__(self, cid: int, host: HostSide, most: int) -> None:
        super().__init__()
        self.cid = cid
        self.host = host
        self.most = most
        self.refused = 0            # streams refused because there were too many
        self.lingering: set[Connection] = set()
        self._streams: dict[int, Connection] = {}       # host port << 32 | guest port
        self._ready: deque[Connection] = deque()
        self._resets: deque[tuple[int, int, int, int]] = deque()    # source CID and port, destination port, type
        self._next_port = HOST_PORTS
        self._waiting: dict[Expiring, float] = {}       # until when
        self._ticking = False
        self._tx_held = False       # too many answers wait
        self._starved = False       # the driver was asked to say when there are rx buffers
        self._again = False         # the loop will come back to pump()
        self._lost_streams = False  # a transport reset is to be told
        self._events = 0            # buffers in the event queue once the driver has taken that in; 0: never told

    def attach(self, memory: GuestMemory, io: Io, interrupts: Interrupts) -> None:
        """Before the guest starts."""
        super().attach(memory, io, interrupts)
        self.host.attach(self)

    def config(self) -> bytes:
        """The guest's CID (5.10.4)."""
        return self.cid.to_bytes(8, "little")

    @property
    def open(self) -> int:
        """How many streams there are, with those that are being opened or still being emptied."""
        return len(self._streams) + len(self.lingering) + len(self.host.clients)

    @property
    def driver_ready(self) -> bool:
        """Whether a guest's driver is there; it may stand still for a snapshot."""
        return self.status & (ids.DRIVER_OK | ids.NEEDS_RESET | ids.FAILED) == ids.DRIVER_OK

    @property
    def reset_taken(self) -> bool:
        """Whether the driver has taken in that streams were lost, and gave the event's buffer back: it would end new
        ones too. QueueError where its ring is broken."""
        with self.lock:
            queue = self.queues[EVENT]
            return not self._lost_streams and (not queue.ready or queue.pending() >= self._events)

    # for programs that embed the machine -----------------------------------------------------------

    def connect(self, port: int, timeout: float = 10.0) -> socket_module.socket:
        """A stream to the guest's `port`; ConnectionRefusedError, TimeoutError. Not from the I/O loop's thread."""
        from hv.devices.virtio.vsock_local import connect

        return connect(self, port, timeout)

    def listen(self, port: int, backlog: int = 128) -> Listener:
        """Take the streams that the guest opens to the host's `port`, rather than a Unix socket."""
        return self.host.listen(port, backlog)

    def lost_nothing(self) -> None:
        """No stream was open when it was saved, and its CID is the same: no reset to tell. Old ports are left alone."""
        self._lost_streams, self._next_port = False, self._next_port + (1 << 16)

    # the queues ------------------------------------------------------------------------------------

    def activate(self) -> None:
        """The driver is there."""
        if self.queues[RX].ready:
            self.queues[RX].quiet()

    def notified(self, index: int) -> None:
        """The driver gives packets (tx), or buffers for packets (rx) or events."""
        if index == TX:
            self._take_packets()
        elif index == RX:
            self._give_packets()
        elif self._lost_streams:
            self._tell_reset()

    def _take_packets(self) -> None:
        queue = self.queues[TX]
        if not self._tx_held:
            for chain in self.requests(TX, TX_BATCH):
                self._packet(chain)
                queue.push(chain)
                if len(self._resets) >= RESETS_MOST:
                    self._tx_held = True
                    break
            self.used(TX)
        self.pump()

    def pump(self) -> None:
        """Give the guest what there is for it. With the lock held."""
        if self._ready or self._resets:
            self.serve_locked(RX)

    def _give_packets(self) -> None:
        queue, ready, resets = self.queues[RX], self._ready, self._resets
        chain: Chain | None = None
        for _ in range(RX_BATCH):
            if not ready and not resets:
                break
            if chain is None:
                chain = queue.pop()
                if chain is None:
                    self._starved = True
                    if queue.listen():
                        continue
                    break
                if self._starved:
                    self._starved = False
                    queue.quiet()
                views = chain.writable
                if not views or (len(views[0]) < HEADER_SIZE and chain.writable_bytes < HEADER_SIZE):
                    self.fault("a receive buffer too small for a header (5.10.6)")
                    queue.push(chain)
                    chain = None
                    continue
            if resets:
                written = self._write_reset(chain)
            else:
                stream = ready.popleft()
                stream.queued = False
                written = stream.emit(chain)
                if written and stream.wants:
                    self.want(stream)
            if written:
                queue.push(chain, written)
                chain = None
        else:
            if not self._again:
                self._again = True
                self.io.call(self._resume_pump)
        if chain is not None:
            queue.unpop()
        self.used(RX)
        if self._tx_held and len(resets) < RESETS_MOST // 2:
            self._tx_held = False
            self.io.call(lambda: self.serve(TX))

    def _resume_pump(self) -> None:
        self._again = False
        self.serve(RX)

    def want(self, stream: Connection) -> None:
        """`stream` may have something for the guest."""
        if not stream.queued:
            stream.queued = True
            self._ready.append(stream)

    def _write_reset(self, chain: Chain) -> int:
        cid, port, guest_port, kind = self._resets.popleft()
        data = HEADER.pack(cid, self.cid, port, guest_port, 0, kind, packet.OP_RST, 0, 0, 0)
        return chain.writer().write(data)

    def _tell_reset(self) -> None:
        queue = self.queues[EVENT]
        chain = queue.pop()
        if chain is None and queue.listen():
            chain = queue.pop()
        if chain is None:
            return      # notified() comes back to it
        self._lost_streams = False
        self._events = queue.pending() + 1
        queue.push(chain, chain.writer().write(packet.EVENT_TRANSPORT_RESET.to_bytes(4, "little")))
        self.used(EVENT)

    # packets from the guest ------------------------------------------------------------------------

    def _packet(self, chain: Chain) -> None:
        views = chain.readable
        if views and len(views[0]) == HEADER_SIZE:      # as Linux does it
            fields, body = HEADER.unpack(views[0]), views[1:]
        else:
            head, body = cut(views, HEADER_SIZE)
            data = b"".join(head)
            if len(data) < HEADER_SIZE:
                self.fault(f"a packet of {len(data)} bytes (5.10.6)")
                return
            fields = HEADER.unpack(data)
        src_cid, dst_cid, guest_port, host_port, length, kind, op, flags, buf_alloc, fwd_cnt = fields
        if src_cid != self.cid:
            if not self._events and not self._lost_streams:     # else a clone's driver may not know its own yet
                self.fault(f"a packet from CID {src_cid:#x} (5.10.6.4)")
            return
        if kind != TYPE_STREAM or dst_cid != HOST_CID:
            if kind != TYPE_STREAM:
                self.fault(f"a packet of type {kind} (5.10.6.4)")
            if op != packet.OP_RST:
                self._resets.append((dst_cid, host_port, guest_port, kind))
            return
        stream = self._streams.get(host_port << 32 | guest_port)
        if op == packet.OP_REQUEST and (stream is None or stream.state == CLOSING):
            if stream is not None:
                self._forget(stream).drop()
            self._open_for_guest(host_port, guest_port, buf_alloc, fwd_cnt)
        elif stream is None:
            # In an honest guest too: it could not know yet that the stream has ended.
            if not 1 <= op <= packet.OP_CREDIT_REQUEST:
                self.fault(f"a packet with operation {op} (5.10.6)")
            if op != packet.OP_RST:
                self._resets.append((HOST_CID, host_port, guest_port, TYPE_STREAM))
        elif op == OP_RW:
            given = sum(map(len, body))
            if length < given:
                body = cut(body, length)[0]
            wrong = f"{length} bytes of payload in {given} (5.10.6)" if length > given else ""
            stream.credit(buf_alloc, fwd_cnt)
            wrong = wrong or stream.receive(body, length)
            if wrong:
                self.fault(wrong)
                self.reset(stream)
        else:
            stream.credit(buf_alloc, fwd_cnt)
            self._control(stream, op, flags)

    def _control(self, stream: Connection, op: int, flags: int) -> None:
        if op == packet.OP_RST:
            self._forget(stream).drop()
        elif op == packet.OP_RESPONSE and stream.state == REQUESTED:
            self._waiting.pop(stream, None)
            stream.accepted()
        elif op == packet.OP_SHUTDOWN:
            stream.shutdown(flags)
        elif op == packet.OP_CREDIT_REQUEST:
            stream.tell_credit()
        elif op != packet.OP_CREDIT_UPDATE:
            self.fault(f"a packet with operation {op} on an open stream (5.10.6)")
            self.reset(stream)

    # streams ---------------------------------------------------------------------------------------

    def _add(self, host_port: int, guest_port: int, state: int) -> Connection:
        share = BUFFERS // (self.open + 1)      # lingering ones have their bytes too
        stream = Connection(self, host_port, guest_port, state, max(BUFFER_LEAST, min(BUFFER_MOST, share)))
        self._streams[host_port << 32 | guest_port] = stream
        return stream

    def _forget(self, stream: Connection) -> Connection:
        self._streams.pop(stream.host_port << 32 | stream.guest_port, None)
        self._waiting.pop(stream, None)
        return stream

    def _open_for_guest(self, host_port: int, guest_port: int, buf_alloc: int, fwd_cnt: int) -> None:
        if self.open >= self.most:
            self.refused += 1
            self._resets.append((HOST_CID, host_port, guest_port, TYPE_STREAM))
            return
        stream = self._add(host_port, guest_port, CONNECTING)
        stream.credit(buf_alloc, fwd_cnt)
        self.host.dial(stream)

    def open_for_host(self, sock: socket, port: int) -> None:
        """A host client's socket asks for the guest's `port`. With the lock held."""
        if not self.driver_ready or self.open >= self.most:
            self.refused += 1
            sock.close()
            return
        while (host_port := self._next_port) << 32 | port in self._streams:
            self._next_port = HOST_PORTS | (host_port + 1) & (HOST_PORTS - 1)
        self._next_port = HOST_PORTS | (host_port + 1) & (HOST_PORTS - 1)
        stream = self._add(host_port, port, REQUESTED)
        self.expire(stream, packet.CONNECT_SECONDS)
        stream.request(sock)
        self.pump()

    def reset(self, stream: Connection, linger: bool = False) -> None:
        """End `stream` by RST; with `linger` its socket gets what the guest sent."""
        self._forget(stream)
        self._resets.append((HOST_CID, stream.host_port, stream.guest_port, TYPE_STREAM))
        if linger:
            stream.linger()
        else:
            stream.drop()

    def _drop_all(self) -> None:
        for stream in self._streams.values():
            stream.linger()
        self._streams.clear()
        for client in tuple(self.host.clients):
            client.drop()
        self._waiting.clear()
        self._ready.clear()
        self._resets.clear()
        self._tx_held = self._starved = self._lost_streams = False
        self._events = 0

    def drop(self) -> None:
        """A reset: no stream is left. Bytes that the guest sent before still reach their sockets."""
        self._drop_all()

    def broken(self, text: str) -> None:
        """The queues are unusable until a reset: nobody should wait for that."""
        super().broken(text)
        self._drop_all()

    def close(self) -> None:
        """Close all sockets; the host's programs get, within a second, what the guest sent."""
        self._drop_all()
        end = monotonic() + FINISH_SECONDS
        for stream in tuple(self.lingering):
            stream.finish(max(0.0, end - monotonic()))
        self.host.close()

    # time ------------------------------------------------------------------------------------------

    def expire(self, waiting: Expiring, seconds: float) -> None:
        """Call waiting.expired() after that time, unless `settled` comes before. In the I/O loop's thread."""
        self._waiting[waiting] = monotonic() + seconds
        if not self._ticking:
            self._ticking = True
            self.io.call_later(1.0, self._tick)

    def settled(self, waiting: Expiring) -> None:
        """It has its answer."""
        self._waiting.pop(waiting, None)

    def _tick(self) -> None:
        with self.lock:
            now = monotonic()
            for waiting in [key for key, until in self._waiting.items() if until <= now]:
                del self._waiting[waiting]
                waiting.expired()
            self._ticking = bool(self._waiting)
            if self._ticking:
                self.io.call_later(1.0, self._tick)
            self.pump()

    # state -----------------------------------------------------------------------------------------

    def load_model(self, state: dict[str, object]) -> None:
        """The streams of the guest's past are gone: it must know (5.10.6.7)."""
        self._drop_all()
        self._lost_streams = bool(self.status & ids.DRIVER_OK)
