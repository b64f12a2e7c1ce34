"""The vhost-user protocol as it goes over the wire: numbers, structures, one connection (docs/interop/vhost-user.rst).

A message is a header of three 32-bit words (request, flags, size of the payload) and a payload, in the machine's byte
order; descriptors go along as SCM_RIGHTS. The back end is another program, which may be broken, foreign or hang: a
reply is taken only in the shape the request asks for, descriptors nobody asked for are closed, and a conversation has
a budget of seconds, whatever it consists of. All that fails is a VhostUserError, behind which the connection is of no
more use.

Left out: messages this front end never sends (dirty log, IOTLB, post-copy, in-band notifications, memory slots).
Driven by tests/unit/test_vhost_user_failures.py.
"""

from __future__ import annotations

__all__ = ["Connection", "VhostUserError", "close_descriptors", "u64"]

import _socket
import errno
import os
from struct import Struct
from time import monotonic, sleep

from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# requests of the front end ("Front-end message types")
GET_FEATURES, SET_FEATURES, SET_OWNER = 1, 2, 3
SET_MEM_TABLE = 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD = 21
GET_CONFIG, SET_CONFIG = 24, 25
# requests of the back end, on the channel it was given ("Back-end message types")
BACKEND_CONFIG_CHANGE = 2

F_PROTOCOL_FEATURES = 1 << 30       # among the device's features, never the driver's ("Communication")
# protocol features ("Protocol features")
P_MQ, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG = 1 << 0, 1 << 3, 1 << 5, 1 << 9

# header flags ("Header")
VERSION, VERSION_MASK, REPLY, NEED_REPLY = 1, 3, 4, 8

HEADER = Struct("=III")
VRING_STATE = Struct("=II")         # index, number ("A vring state description")
VRING_ADDR = Struct("=IIQQQQ")      # index, flags, descriptors, used, available, log ("A vring address description")
MEM_TABLE = Struct("=II")           # regions, padding ("Memory regions description")
MEM_REGION = Struct("=QQQQ")        # guest address, size, user address, offset in the file
CONFIG = Struct("=III")             # offset, size, flags ("Virtio device config space")
U64 = Struct("=Q")
MOST_REGIONS = 8                    # "Memory regions description": region0 ... region7
MOST_FDS = 8                        # "Back-end communication": at most 8 descriptors in each message

BUDGET = 5.0                        # seconds for one conversation: a loaded host answers, a dead program never will
_RETRY = 0.05                       # seconds between attempts to connect, where the back end may still be starting
_FDS_SPACE = _socket.CMSG_SPACE(4 * MOST_FDS)
_INT = Struct("=i")


class VhostUserError(HvError):
    """The back end is not there, hangs, or answers what the protocol does not allow."""


def u64(value: int) -> bytes:
    """A payload of one number."""
    return U64.pack(value)


class Connection:
    """A connection to the back end that listens at `path`. Conversations follow one another, each in its budget."""

    def __init__(self, path: str, wait: float = 0.0, budget: float = BUDGET) -> None:
        self.acknowledged = False       # REPLY_ACK: the back end answers every message
        self._deadline = monotonic() + budget
        self._socket = _connect(path, wait)

    @property
    def fd(self) -> int:
        """For the I/O loop, which learns from it that the back end has gone."""
        return self._socket.fileno()

    def begin(self, budget: float = BUDGET) -> None:
        """A new conversation: so many seconds from now."""
        self._deadline = monotonic() + budget

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without an answer of its own; with REPLY_ACK the back end says whether it could."""
        self._send(request, payload, fds, NEED_REPLY if self.acknowledged else 0)
        if self.acknowledged and (code := U64.unpack(self._reply(request, U64.size))[0]):
            raise VhostUserError(f"the back end refused request {request} (its answer: {code:#x})")

    def ask(self, request: int, payload: bytes = b"", size: int = U64.size) -> bytes:
        """A request with an answer of `size` bytes."""
        self._send(request, payload, (), 0)
        return self._reply(request, size)

    def number(self, request: int) -> int:
        """A request that is answered by a number."""
        return int(U64.unpack(self.ask(request))[0])

    def gone(self) -> str:
        """Why the back end is of no more use, looked at outside a conversation; "" where all is well."""
        try:
            self._socket.settimeout(0)      # with another one Python would wait for data itself
            data = self._socket.recv(1, _socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return ""
        except OSError as failure:
            return f"the connection to the back end failed: {os.strerror(failure.errno or 0)}"
        return "the back end sent something nobody asked for" if data else "the back end closed the connection"

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()

    def _left(self) -> float:
        left = self._deadline - monotonic()
        if left <= 0:
            raise VhostUserError("the back end does not answer")
        return left

    def _send(self, request: int, payload: bytes, fds: Sequence[int], flags: int) -> None:
        data = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(map(_INT.pack, fds)))] if fds else []
        try:
            while data:
                self._socket.settimeout(self._left())
                sent = self._socket.sendmsg([data], rights, _socket.MSG_NOSIGNAL)
                data, rights = data[sent:], []
        except TimeoutError:
            raise VhostUserError(f"the back end does not take request {request}") from None
        except OSError as failure:
            raise VhostUserError(f"the back end closed the connection ({os.strerror(failure.errno or 0)})") from None

    def _reply(self, request: int, size: int) -> bytes:
        answered, flags, length = HEADER.unpack(self._receive(HEADER.size, request))
        if answered != request or flags & (VERSION_MASK | REPLY) != VERSION | REPLY:
            raise VhostUserError(f"the back end answered request {request} by message {answered}, flags {flags:#x}")
        if length != size:
            raise VhostUserError(f"the back end answered request {request} by {length} bytes instead of {size}")
        return self._receive(size, request)

    def _receive(self, size: int, request: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                self._socket.settimeout(self._left())
                part, ancillary, _, _ = self._socket.recvmsg(size - len(data), _FDS_SPACE, _socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                raise VhostUserError(f"the back end does not answer request {request}") from None
            except OSError as failure:
                raise VhostUserError(f"the connection failed: {os.strerror(failure.errno or 0)}") from None
            if close_descriptors(ancillary):
                raise VhostUserError("the back end sent descriptors nobody asked for")
            if not part:
                raise VhostUserError(f"the back end closed the connection at request {request}")
            data += part
        return data


def close_descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> bool:
    """Close what came along with a message; whether there was anything."""
    found = False
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            for at in range(0, len(data) - _INT.size + 1, _INT.size):
                os.close(_INT.unpack_from(data, at)[0])
                found = True
    return found


def _connect(path: str, wait: float) -> _socket.socket:
    """Connected to who listens at `path`; for `wait` seconds it may still have to appear."""
    end = monotonic() + wait
    while True:
        made = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
        try:
            made.connect(path)
            return made
        except (OSError, ValueError) as failure:
            made.close()
            number = failure.errno if isinstance(failure, OSError) else None
            if number not in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN) or monotonic() >= end:
                reason = os.strerror(number) if number else str(failure)
                raise VhostUserError(f"no connection to a back end at {path!r}: {reason}") from None
        sleep(_RETRY)
