"""One stream between the guest and a socket of the host (virtio 1.2, 5.10.6.3 and 5.10.6.5).

    host client   --REQUEST-->   guest          REQUESTED  -> ESTABLISHED by RESPONSE, gone by RST
    host program  <--REQUEST--   guest          CONNECTING -> ESTABLISHED, or refused by RST
    both directions ended by the host           ESTABLISHED -> CLOSING until the guest answers with RST
    both directions ended by the guest          ESTABLISHED -> gone; LINGERING while the host has bytes to take

Credit: each side says how much it buffers (buf_alloc) and how much of what came it has passed on (fwd_cnt); the other
never has more than that under way. What the guest sends goes straight from its memory to the socket; only what the
socket does not take is copied, to `_backlog`, which credit bounds. What the host sends stays in its socket until the
guest has buffers and credit, and is received straight into guest memory.

Driven by tests/unit/test_virtio_vsock.py.
"""

from __future__ import annotations

__all__ = ["Connection"]

from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RD, SHUT_WR
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP

from hv.devices.virtio import vsock_packet as packet
from hv.devices.virtio.vsock_packet import HEADER, HEADER_SIZE, OP_RW, PAYLOAD_MOST, TYPE_STREAM, WRAP, cut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

    from hv.devices.virtio.chain import Chain, Views
    from hv.devices.virtio.vsock import Vsock

REQUESTED, CONNECTING, ESTABLISHED, CLOSING, LINGERING, GONE = range(6)

# What a stream has to tell the guest, in the order of telling. A set of bits, not a list of packets: however often the
# guest asks, no more than this is ever kept.
DUE_REQUEST, DUE_RESPONSE, DUE_CREDIT_REQUEST, DUE_CREDIT_UPDATE, DUE_SHUTDOWN = 1, 2, 4, 8, 16
_OPS = {DUE_REQUEST: packet.OP_REQUEST, DUE_RESPONSE: packet.OP_RESPONSE,
        DUE_CREDIT_REQUEST: packet.OP_CREDIT_REQUEST, DUE_CREDIT_UPDATE: packet.OP_CREDIT_UPDATE,
        DUE_SHUTDOWN: packet.OP_SHUTDOWN}

SEND, RECEIVE, BOTH = packet.SHUTDOWN_SEND, packet.SHUTDOWN_RECEIVE, packet.SHUTDOWN_BOTH

# Edge triggered: that a socket can be read is remembered in `_readable`, so a stream that must wait costs nothing.
_EVENTS = EPOLLIN | EPOLLRDHUP | EPOLLET
_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL
_GATHER_MOST = 64           # pieces for one system call; the kernel's limit is 1024 (UIO_MAXIOV)


class Connection:
    """A stream. Methods are called with the device's lock held, but for `on_events`."""

    __slots__ = ("_armed", "_asked", "_backlog", "_device", "_guest_ends", "_host_ends", "_hung", "_readable",
                 "_sent_fwd", "_threshold", "buf_alloc", "due", "fwd_cnt", "guest_port", "host_port", "peer_buf_alloc",
                 "peer_fwd_cnt", "queued", "rx_cnt", "sock", "state", "tx_cnt", "welcome")

    def __init__(self, device: Vsock, host_port: int, guest_port: int, state: int, buf_alloc: int) -> None:
        self._device = device
        self.host_port = host_port
        self.guest_port = guest_port
        self.state = state
        self.sock: socket | None = None
        self.due = 0
        self.queued = False         # whether the device's to-do list holds it
        self.welcome = b""          # what a host client hears once the guest has accepted
        self._readable = False      # the socket may have something; False only after it said that it has not
        self._hung = False          # both directions of the socket have ended
        self._armed = False         # EPOLLOUT is asked for
        self._host_ends = 0         # SHUTDOWN_SEND, SHUTDOWN_RECEIVE: told to the guest, or due
        self._guest_ends = 0        # told by the guest
        self._backlog = bytearray()
        # guest -> host: bytes that came, that the socket took, what of the latter the guest knows
        self.buf_alloc = buf_alloc
        self._threshold = buf_alloc // 2
        self.rx_cnt = self.fwd_cnt = self._sent_fwd = 0
        # host -> guest: as 32-bit numbers
        self.tx_cnt = self.peer_fwd_cnt = self.peer_buf_alloc = 0
        self._asked = False         # a CREDIT_REQUEST is out

    @property
    def alive(self) -> bool:
        """False once it has been reset."""
        return self.state != GONE

    @property
    def backlog(self) -> int:
        """Bytes of the guest that the host's socket has not taken yet."""
        return len(self._backlog)

    def take(self, sock: socket) -> None:
        """This is the host's end."""
        self.sock = sock
        self._device.io.add(sock.fileno(), _EVENTS, self.on_events)

    # the host's socket ----------------------------------------------------------------------------

    def on_events(self, events: int) -> None:
        """From the I/O loop."""
        device = self._device
        with device.lock:
            if self.sock is None:
                return
            if events & EPOLLOUT and self._backlog:
                self._flush()
            if self.state == LINGERING:
                if events & (EPOLLHUP | EPOLLERR):
                    self.drop()
                return
            if events & ~EPOLLOUT:
                self._readable = not self._guest_ends & RECEIVE
                if events & EPOLLHUP:
                    self._hang_up()
                device.want(self)
            device.pump()

    def _hang_up(self) -> None:
        self._hung = True
        if self.state == REQUESTED:
            self._device.reset(self)        # the client gave up
        elif self.state == ESTABLISHED and (self._host_ends & SEND or self._guest_ends & RECEIVE):
            self._end(BOTH)                 # else once it has been read to its end

    def _end(self, which: int) -> None:
        """Tell the guest that the host will not send, or not receive, any more."""
        if self._host_ends | which != self._host_ends:
            self._host_ends |= which
            self.due |= DUE_SHUTDOWN
            self._device.want(self)

    def _flush(self) -> None:
        """Send of the backlog what the socket takes."""
        backlog, sock = self._backlog, self.sock
        assert sock is not None
        try:
            while backlog:
                count = sock.send(backlog, _FLAGS)
                del backlog[:count]
                self._forwarded(count)
        except BlockingIOError:
            pass
        except OSError:
            self._deafen()
        self._settle()

    def _settle(self) -> None:
        """After a change of the backlog: watch the socket for room, or pass on that the guest sent all it will."""
        sock = self.sock
        if sock is None:
            return
        if self._armed != bool(self._backlog):
            self._armed = not self._armed
            self._device.io.modify(sock.fileno(), _EVENTS | EPOLLOUT if self._armed else _EVENTS)
        if not self._backlog:
            if self.state == LINGERING:
                self.drop()
            elif self._guest_ends & SEND:
                _shutdown(sock, SHUT_WR)

    def _deafen(self) -> None:
        """The host's reader is gone: what the guest sends goes nowhere."""
        lost = len(self._backlog)
        self._backlog.clear()
        self._forwarded(lost)
        if self.state == ESTABLISHED:
            self._end(RECEIVE)

    def _forwarded(self, count: int) -> None:
        self.fwd_cnt += count
        if self.fwd_cnt - self._sent_fwd >= self._threshold and self.state == ESTABLISHED:
            self.due |= DUE_CREDIT_UPDATE
            self._device.want(self)

    # from the guest -------------------------------------------------------------------------------

    def credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        """What every packet says of the guest's buffer (5.10.6.3).

        A count that is not between the last one and what was sent is stale (Linux' threads may overtake each other
        between counting and queueing) or wrong, and is not taken: less credit is always safe.
        """
        before = self.peer_fwd_cnt
        if (fwd_cnt - before) & WRAP <= (self.tx_cnt - before) & WRAP:
            self.peer_fwd_cnt = fwd_cnt
        self.peer_buf_alloc = buf_alloc
        if self._readable:
            self._device.want(self)

    def request(self, sock: socket) -> None:
        """Ask the guest, for a client of the host."""
        self.welcome = b"OK %d\n" % self.host_port
        self.due |= DUE_REQUEST
        self.take(sock)
        self._device.want(self)

    def accepted(self) -> None:
        """The guest accepts (RESPONSE)."""
        self.state = ESTABLISHED
        assert self.sock is not None
        try:
            self.sock.send(self.welcome, _FLAGS)
        except OSError:
            self._device.reset(self)
            return
        self._device.want(self)

    def accept(self, sock: socket) -> None:
        """The host accepts what the guest asked for."""
        self.state = ESTABLISHED
        self.take(sock)
        self.due |= DUE_RESPONSE
        self._device.want(self)

    def tell_credit(self) -> None:
        """The guest asks (CREDIT_REQUEST)."""
        if self.state >= ESTABLISHED:
            self.due |= DUE_CREDIT_UPDATE
            self._device.want(self)

    def receive(self, views: Views, length: int) -> str:
        """`length` bytes of payload; what is wrong with it, or ""."""
        if self.rx_cnt - self.fwd_cnt + length > self.buf_alloc:
            return f"{length} bytes beyond its credit (5.10.6.3.1)"
        if self._guest_ends & SEND or self.state < ESTABLISHED:
            return "payload before the start or behind the end of its stream (5.10.6.5)"
        self.rx_cnt += length
        sock = self.sock
        if sock is None or self._host_ends & RECEIVE:
            self._forwarded(length)     # nobody is there to take it, and the guest has been told
            return ""
        if self._backlog:
            self._keep(views, 0)
            return ""
        try:
            sent = sock.send(views[0], _FLAGS) if len(views) == 1 else sock.sendmsg(views[:_GATHER_MOST], (), _FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._deafen()
            sent = length
        self._forwarded(sent)
        if sent < length:
            self._keep(views, sent)
            self._settle()
        return ""

    def _keep(self, views: Views, sent: int) -> None:
        for view in views:
            if sent < len(view):
                self._backlog += view[sent:]
            sent = max(0, sent - len(view))

    def shutdown(self, flags: int) -> None:
        """The guest will not send, or not receive, any more (5.10.6.5); hints add up."""
        if self.state < ESTABLISHED:
            self._device.reset(self)
            return
        self._guest_ends |= flags & BOTH
        if self._guest_ends == BOTH:
            self._device.reset(self, linger=True)       # RST is the answer that a clean end needs
            return
        if self.sock is None:
            return
        if self._guest_ends & RECEIVE:
            self._readable = False
            _shutdown(self.sock, SHUT_RD)
            if self._hung:
                self._end(BOTH)
        self._settle()

    # to the guest ---------------------------------------------------------------------------------

    @property
    def wants(self) -> bool:
        """Whether it may have something for the guest."""
        return bool(self.due) or (self._readable and self.state == ESTABLISHED)

    def emit(self, chain: Chain) -> int:
        """The next packet into `chain`, which has room for a header: bytes written, 0 where there is none."""
        due = self.due
        if due:
            bit = due & -due
            self.due = due ^ bit
            ends = self._host_ends if bit == DUE_SHUTDOWN else 0
            written = self._write(cut(chain.writable, HEADER_SIZE)[0], _OPS[bit], 0, ends)
            if ends == BOTH:
                self._await_reset()
            return written
        if not self._readable or self.state != ESTABLISHED:
            return 0
        credit = self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & WRAP)
        if credit > 0:
            return self._emit_data(chain, min(credit, PAYLOAD_MOST))
        if self._asked:
            return 0
        self._asked = True
        return self._write(cut(chain.writable, HEADER_SIZE)[0], packet.OP_CREDIT_REQUEST, 0, 0)

    def _emit_data(self, chain: Chain, most: int) -> int:
        head, rest = cut(chain.writable, HEADER_SIZE)
        body = cut(rest, most)[0]
        sock = self.sock
        assert sock is not None
        if not body:
            self._device.fault("a receive buffer without room for payload")
            return self._write(head, packet.OP_CREDIT_UPDATE, 0, 0)
        try:
            count = sock.recv_into(body[0]) if len(body) == 1 else sock.recvmsg_into(body[:_GATHER_MOST])[0]
        except BlockingIOError:
            self._readable = False
            return 0
        except OSError:
            self._device.reset(self)    # the host's program reset it, by a close with bytes unread
            return 0
        if count:
            self._asked = False
            self.tx_cnt = (self.tx_cnt + count) & WRAP
            return self._write(head, OP_RW, count, 0)
        self._readable = False
        self._end(BOTH if self._hung else SEND)
        return 0

    def _write(self, head: Views, op: int, length: int, flags: int) -> int:
        self._sent_fwd = self.fwd_cnt
        self.due &= ~DUE_CREDIT_UPDATE      # every packet tells it
        fields = (packet.HOST_CID, self._device.cid, self.host_port, self.guest_port, length, TYPE_STREAM, op, flags,
                  self.buf_alloc, self.fwd_cnt & WRAP)
        if len(head) == 1:
            HEADER.pack_into(head[0], 0, *fields)
        else:
            data, at = HEADER.pack(*fields), 0
            for view in head:
                view[:] = data[at:at + len(view)]
                at += len(view)
        return HEADER_SIZE + length

    # the end --------------------------------------------------------------------------------------

    def _await_reset(self) -> None:
        self._close_socket()
        self.state = CLOSING
        self._readable = False
        self._device.expire(self, packet.CLOSE_SECONDS)

    def expired(self) -> None:
        """The guest did not answer in time."""
        self._device.reset(self)

    def linger(self) -> None:
        """The guest is through with it: let the socket have what it has not taken, then close it."""
        if self.sock is None or not self._backlog or self._host_ends & RECEIVE:
            self.drop()
            return
        self.state = LINGERING
        self.due = 0
        self._readable = False
        self._device.lingering.add(self)

    def drop(self) -> None:
        """Close the socket at once."""
        self._device.lingering.discard(self)
        self._close_socket()
        self.state = GONE
        self.due = 0
        self._readable = False

    def finish(self, seconds: float) -> None:
        """Before the device is closed: give the socket that long to take what is left."""
        if self.sock is not None and self._backlog:
            try:
                self.sock.settimeout(seconds)
                self.sock.sendall(self._backlog, MSG_NOSIGNAL)
            except OSError:
                pass
        self.drop()

    def _close_socket(self) -> None:
        sock, self.sock = self.sock, None
        self._backlog.clear()
        if sock is not None:
            self._device.io.remove(sock.fileno())
            sock.close()


def _shutdown(sock: socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass        # its peer is gone already
