"""The back end as the front end knows it: what it can do, and the conversations with it.

    BackEnd(path)               connect, negotiate features of the protocol, number of queues, configuration space
    start(features, ...)        features, guest RAM, then each ring: size, position, addresses, descriptors, enable
    stop(index)                 stop a ring; where it stood
    channel_requests()          what the back end wants of us, on a channel of its own

The steps follow docs/interop/vhost-user.rst, "Front-end message types" and "Ring states". Each raises VhostUserError
(hv/devices/vhost_user/protocol.py). Driven by tests/unit/test_vhost_user.py.
"""

from __future__ import annotations

__all__ = ["BackEnd", "Ring"]

import _socket

from hv.devices.vhost_user import protocol
from hv.devices.vhost_user.protocol import Connection, VhostUserError, close_descriptors, u64
from hv.devices.virtio.ids import F_VERSION_1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

_WANTED = protocol.P_MQ | protocol.P_REPLY_ACK | protocol.P_BACKEND_REQ | protocol.P_CONFIG
_MOST_CHANNEL = 512         # bytes of a request of the back end's; the largest defined has 24


class Ring:
    """What the back end is told of one ring. `kick` and `call` are event descriptors."""

    __slots__ = ("avail", "base", "call", "desc", "index", "kick", "size", "used")

    def __init__(self, index: int, size: int, base: int, desc: int, avail: int, used: int, kick: int,
                 call: int) -> None:
        self.index, self.size, self.base = index, size, base
        self.desc, self.avail, self.used = desc, avail, used        # addresses in this process: "user addresses"
        self.kick, self.call = kick, call


class BackEnd:
    """One connection, negotiated. `features` are the device's; `queues` 0 where the back end does not tell."""

    def __init__(self, path: str, config_size: int = 0, wait: float = 0.0, budget: float = protocol.BUDGET) -> None:
        self.config = b""
        self.queues = 0
        self._channel: _socket.socket | None = None
        self._pending = b""             # the beginning of a request on the channel
        self._memory_known = False
        self._line = Connection(path, wait, budget)
        try:
            self._negotiate(config_size)
        except BaseException:
            self.close()
            raise

    def _negotiate(self, config_size: int) -> None:
        line = self._line
        self.features = line.number(protocol.GET_FEATURES)
        if not self.features & F_VERSION_1:
            raise VhostUserError("the back end knows only devices of before virtio 1.0")
        self._protocol = 0
        if self.features & protocol.F_PROTOCOL_FEATURES:
            self._protocol = line.number(protocol.GET_PROTOCOL_FEATURES) & _WANTED
            line.tell(protocol.SET_PROTOCOL_FEATURES, u64(self._protocol))
            line.acknowledged = bool(self._protocol & protocol.P_REPLY_ACK)
        line.tell(protocol.SET_OWNER)
        if self._protocol & protocol.P_MQ:
            self.queues = line.number(protocol.GET_QUEUE_NUM)
        if config_size:
            if not self._protocol & protocol.P_CONFIG:
                raise VhostUserError("the back end gives no configuration space")
            self.config = self._get_config(config_size)
        if self._protocol & protocol.P_BACKEND_REQ:
            self._channel, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
            try:
                line.tell(protocol.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
            finally:
                theirs.close()

    # the configuration space ------------------------------------------------------------------------

    def get_config(self, size: int) -> bytes:
        """Its first `size` bytes."""
        self._line.begin()
        return self._get_config(size)

    def _get_config(self, size: int) -> bytes:
        head = protocol.CONFIG.pack(0, size, 0)
        answer = self._line.ask(protocol.GET_CONFIG, head + bytes(size), len(head) + size)
        if answer[:8] != head[:8]:
            raise VhostUserError("the back end gave another part of the configuration space than asked for")
        return answer[len(head):]

    def set_config(self, offset: int, data: bytes, size: int) -> bytes:
        """The driver writes to it; its first `size` bytes then."""
        self._line.begin()
        self._line.tell(protocol.SET_CONFIG, protocol.CONFIG.pack(offset, len(data), 0) + data)
        return self._get_config(size)

    # rings --------------------------------------------------------------------------------------------

    def start(self, features: int, memory: GuestMemory, rings: list[Ring]) -> None:
        """Have it serve `rings` in guest RAM, by what the driver took of its features."""
        line = self._line
        line.begin()
        enable = self.features & protocol.F_PROTOCOL_FEATURES
        line.tell(protocol.SET_FEATURES, u64(features & self.features | enable))
        if not self._memory_known:
            regions = memory.regions
            table = protocol.MEM_TABLE.pack(len(regions), 0)
            table += b"".join(protocol.MEM_REGION.pack(each.gpa, each.size, each.host, 0) for each in regions)
            line.tell(protocol.SET_MEM_TABLE, table, [each.fd for each in regions])
            self._memory_known = True
        for ring in rings:
            index = ring.index
            line.tell(protocol.SET_VRING_NUM, protocol.VRING_STATE.pack(index, ring.size))
            line.tell(protocol.SET_VRING_BASE, protocol.VRING_STATE.pack(index, ring.base))
            line.tell(protocol.SET_VRING_ADDR, protocol.VRING_ADDR.pack(index, 0, ring.desc, ring.used, ring.avail, 0))
            line.tell(protocol.SET_VRING_CALL, u64(index), (ring.call,))
            line.tell(protocol.SET_VRING_KICK, u64(index), (ring.kick,))
            if enable:
                line.tell(protocol.SET_VRING_ENABLE, protocol.VRING_STATE.pack(index, 1))
        if not line.acknowledged:
            line.number(protocol.GET_FEATURES)      # messages are taken in order: behind this one all have been

    def stop(self, index: int) -> int:
        """Stop a ring; the position in its available ring where it would go on."""
        self._line.begin()
        state = self._line.ask(protocol.GET_VRING_BASE, protocol.VRING_STATE.pack(index, 0), protocol.VRING_STATE.size)
        told, base = protocol.VRING_STATE.unpack(state)
        if told != index or base > 0xFFFF:
            raise VhostUserError(f"the back end says that ring {told} stands at {base}, asked about ring {index}")
        return int(base)

    # the connection -----------------------------------------------------------------------------------

    @property
    def fds(self) -> tuple[int, ...]:
        """What the I/O loop should watch: the connection, the back end's channel."""
        return (self._line.fd,) if self._channel is None else (self._line.fd, self._channel.fileno())

    def gone(self) -> str:
        """Why it is of no more use, "" where all is well."""
        return self._line.gone()

    def channel_requests(self) -> list[int]:
        """The numbers of the requests that came in on the channel, answered where the back end wants that.

        The answer comes before anything is done: the back end may wait for it, and we for the back end.
        """
        if self._channel is None:
            return []
        try:
            data, ancillary, _, _ = self._channel.recvmsg(
                4096, _socket.CMSG_SPACE(4 * protocol.MOST_FDS), _socket.MSG_CMSG_CLOEXEC | _socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data, ancillary = b"", []
        close_descriptors(ancillary)
        if not data:
            raise VhostUserError("the back end closed its channel")
        found: list[int] = []
        data = self._pending + data
        while len(data) >= protocol.HEADER.size:
            request, flags, size = protocol.HEADER.unpack_from(data)
            if flags & (protocol.VERSION_MASK | protocol.REPLY) != protocol.VERSION or size > _MOST_CHANNEL:
                raise VhostUserError(f"the back end sent request {request}, flags {flags:#x}, {size} bytes")
            if len(data) < protocol.HEADER.size + size:
                break
            data = data[protocol.HEADER.size + size:]
            found.append(request)
            if flags & protocol.NEED_REPLY:
                self._answer(request, 0 if request == protocol.BACKEND_CONFIG_CHANGE else 1)
        self._pending = data
        return found

    def _answer(self, request: int, code: int) -> None:
        assert self._channel is not None
        head = protocol.HEADER.pack(request, protocol.VERSION | protocol.REPLY, protocol.U64.size)
        try:
            self._channel.send(head + u64(code), _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            raise VhostUserError("the back end does not read answers on its channel") from None

    def close(self) -> None:
        """May be called twice."""
        self._line.close()
        if self._channel is not None:
            self._channel.close()
