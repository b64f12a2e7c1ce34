"""Netlink sockets: messages with attributes, several in one send, each acknowledged (man 7 netlink, man 7 rtnetlink).

Own code, as pyroute2 costs 125 ms to import, where starting a container may take 60 (docs/dependencies.md). What is
said by it is in hv/linux/links.py (interfaces, addresses, routes) and hv/linux/nftables.py.

    with Netlink(ROUTE) as socket:
        socket.send([Message(RTM_NEWLINK, CREATE, body), ...], "veth")      # KernelError names the first that failed
        for kind, body in socket.dump(RTM_GETLINK, header): attributes(body, 16)

Driven by tests/unit/test_netlink.py and tests/root/test_network_netlink.py, against iproute2.
"""

from __future__ import annotations

__all__ = ["CREATE", "EXCL", "NETFILTER", "ROUTE", "Message", "Netlink", "Refused", "attribute", "attributes", "nested",
           "text", "word"]

from _socket import AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, socket
from struct import Struct

from hv.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Sequence

ROUTE, NETFILTER = 0, 12                            # include/uapi/linux/netlink.h, NETLINK_ROUTE, NETLINK_NETFILTER
_REQUEST, _ACK, _ROOT, _MATCH = 1, 4, 0x100, 0x200  # the same, NLM_F_...
EXCL, CREATE = 0x200, 0x400
_CAPPED, _ACK_TLVS = 0x100, 0x200
_ERROR, _DONE = 2, 3                                # NLMSG_...
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12
_TEXT_OF_ERROR = 1                                  # enum nlmsgerr_attrs, NLMSGERR_ATTR_MSG
_NESTED, _KIND_MASK = 0x8000, 0x3FFF                # NLA_F_NESTED, NLA_TYPE_MASK
_HEADER, _ATTRIBUTE = Struct("=IHHII"), Struct("=HH")       # struct nlmsghdr; struct nlattr
_INT, _UINT = Struct("=i"), Struct("=I")
_ROOM = 1 << 18         # the kernel's answers to dumps are at most 32 KiB each (net/netlink/af_netlink.c)
_MOST_DUMPED = 1 << 26
_AT_ONCE = 64           # messages; their answers wait in the socket's buffer, some 800 bytes each of 200 KiB


class Refused(KernelError):
    """The kernel refused a message, and said why in words of its own."""

    def __init__(self, what: str, number: int, words: str, hint: str = "") -> None:
        super().__init__(what, number, hint)
        if words:
            self.args = (f"{self.args[0]}: {words}",)
        self.words = words


class Message:
    """One request: its `kind`, flags beyond those that every request has, and all behind the header.

    `may`: errors that are fine. `plain`: not acknowledged (the brackets of a netfilter batch).
    """

    __slots__ = ("body", "flags", "kind", "may", "plain")

    def __init__(self, kind: int, flags: int, body: bytes, may: Container[int] = (), plain: bool = False) -> None:
        self.kind, self.flags, self.body, self.may, self.plain = kind, flags, body, may, plain


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) & 3)


def word(kind: int, value: int) -> bytes:
    """One of 32 bits."""
    return attribute(kind, _UINT.pack(value))


def text(kind: int, value: str) -> bytes:
    """One that is text with a NUL behind it."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *inner: bytes) -> bytes:
    """One that holds others."""
    return attribute(kind | _NESTED, b"".join(inner))


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """The attributes in `data` from `start` on, by kind; of equal ones the last. What is cut off is left out."""
    found, at, end = {}, start, len(data)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4 or at + length > end:
            break
        found[kind & _KIND_MASK] = data[at + 4:at + length]
        at += length + 3 & ~3
    return found


class Netlink:
    """A socket of one `family`; it stays in the network namespace that it was made in."""

    def __init__(self, family: int) -> None:
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, family)
        self._sequence = 0
        try:
            self._socket.bind((0, 0))
            for option in (_CAP_ACK, _EXT_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def detach(self) -> int:
        """Its descriptor, which the caller closes."""
        return self._socket.detach()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def send(self, messages: Sequence[Message], what: str, hint: str = "") -> list[int]:
        """Send all in one call; for each, 0 or the error that it `may` have. Refused: the first other one.

        More than fit, by their answers, go in several calls; a failure ends it behind the call that it is in.
        """
        results: list[int] = []
        for at in range(0, len(messages), _AT_ONCE):
            results += self._send(messages[at:at + _AT_ONCE], what, hint)
        return results

    def _send(self, messages: Sequence[Message], what: str, hint: str) -> list[int]:
        first = self._sequence + 1
        data = b"".join([self._pack(message, 0 if message.plain else _ACK) for message in messages])
        waiting = {first + index for index, message in enumerate(messages) if not message.plain}
        results = [0] * len(messages)
        failure: Refused | None = None
        self._write(data, what)
        while waiting:
            for kind, flags, sequence, body in self._read(what):
                if kind != _ERROR or sequence not in waiting or len(body) < 4:
                    continue        # an echo, or the rest of what was asked before
                waiting.discard(sequence)
                number = -_INT.unpack_from(body)[0]
                results[sequence - first] = number
                if number and number not in messages[sequence - first].may and failure is None:
                    failure = Refused(what, number, _words(flags, body), hint)
        if failure:
            raise failure
        return results

    def dump(self, kind: int, body: bytes, what: str, strict: bool = False) -> list[tuple[int, bytes]]:
        """(kind, all behind the header) of each message that answers. `strict`: the header's fields are filters."""
        if strict:
            try:
                self._socket.setsockopt(_SOL_NETLINK, _STRICT, 1)
            except OSError:
                pass        # before Linux 4.20: all are told, and callers look themselves
        self._write(self._pack(Message(kind, _ROOT | _MATCH, body), 0), what)
        return self._answers(what, until_done=True)

    def get(self, kind: int, body: bytes, what: str, may: Container[int] = ()) -> bytes | None:
        """The one message that answers, without its header; None for an error that it `may` have."""
        self._write(self._pack(Message(kind, 0, body), 0), what)
        try:
            answers = self._answers(what, until_done=False)
        except Refused as error:
            if error.errno in may:
                return None
            raise
        return answers[0][1]

    def _pack(self, message: Message, flags: int) -> bytes:
        self._sequence += 1
        length = _HEADER.size + len(message.body)
        return _HEADER.pack(length, message.kind, _REQUEST | flags | message.flags, self._sequence, 0) \
            + message.body + bytes(-length & 3)

    def _write(self, data: bytes, what: str) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise Refused(what, error.errno or 0, "") from None

    def _read(self, what: str) -> list[tuple[int, int, int, bytes]]:
        """kind, flags, sequence number, body of the messages of one datagram."""
        try:
            data = self._socket.recv(_ROOM)
        except OSError as error:
            raise Refused(what, error.errno or 0, "") from None
        found, at = [], 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size or at + length > len(data):
                break
            found.append((kind, flags, sequence, data[at + _HEADER.size:at + length]))
            at += length + 3 & ~3
        return found

    def _answers(self, what: str, until_done: bool) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        size = 0
        while True:
            for kind, flags, sequence, body in self._read(what):
                if sequence != self._sequence:
                    continue
                if kind == _ERROR and len(body) >= 4 and (number := -_INT.unpack_from(body)[0]):
                    raise Refused(what, number, _words(flags, body))
                if kind in (_ERROR, _DONE):
                    return found
                found.append((kind, body))
                size += len(body)
                if size > _MOST_DUMPED:
                    raise Refused(what, 7, "more than 64 MiB of answers")       # E2BIG
            if not until_done and found:
                return found


def _words(flags: int, body: bytes) -> str:
    """What the kernel says in words: attributes behind the error and the header of the message, or all of it."""
    if not flags & _ACK_TLVS:
        return ""
    start = 4 + _HEADER.size
    if not flags & _CAPPED:
        start = 4 + (_UINT.unpack_from(body, 4)[0] + 3 & ~3)
    return attributes(body, start).get(_TEXT_OF_ERROR, b"").rstrip(b"\0").decode(errors="replace")
