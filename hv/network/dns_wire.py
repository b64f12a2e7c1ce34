"""DNS messages: questions read, answers made (RFC 1035, 4.1). Only what a name server of a network needs.

Own code: of a query only the header and one question are read, the rest is passed on as it is, and dnspython, which
tests ask us with, would cost 60 ms and 12 MiB in every network. What comes is hostile: each length is checked, and
there are no compressed names in questions. Driven by tests/unit/test_network_dns.py, against dnspython.
"""

from __future__ import annotations

__all__ = ["ANY_TYPE", "FORMERR", "IN", "NOTIMP", "NXDOMAIN", "OK", "PTR", "REFUSED", "SERVFAIL", "A", "Question",
           "answer", "encode_name", "error", "matches", "parse"]

from struct import Struct

# RFC 1035, 3.2.2, 3.2.4, 4.1.1
A, PTR, ANY_TYPE, IN = 1, 12, 255, 1
OK, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
_RESPONSE, _OPCODE, _AUTHORITATIVE, _TRUNCATED, _DESIRED, _AVAILABLE = 0x8000, 0x7800, 0x400, 0x200, 0x100, 0x80
_HEADER, _TAIL = Struct(">6H"), Struct(">HH")       # id, flags, counts; type and class behind a name
_RECORD = Struct(">HHHIH")      # a pointer to the question's name, type, class, TTL, length (4.1.3)
_TO_QUESTION = 0xC00C           # 4.1.4: the name at offset 12
TTL = 5                         # s; addresses move when instances start again
PLAIN_MOST = 512                # bytes of an answer over UDP (4.2.1)
_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class Question:
    """One query: `name` in lower case, "" where it has bytes that no name of ours has; `end` of the question in it."""

    __slots__ = ("end", "flags", "id", "kind", "kind_class", "name")

    def __init__(self, identity: int, flags: int, name: str, kind: int, kind_class: int, end: int) -> None:
        self.id, self.flags, self.name, self.kind, self.kind_class, self.end = (
            identity, flags, name, kind, kind_class, end)


def parse(data: bytes) -> Question | int | None:
    """A question; or what to answer with (FORMERR, NOTIMP); None: not to be answered at all."""
    if len(data) < _HEADER.size:
        return None
    identity, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if flags & _RESPONSE:
        return None
    if flags & _OPCODE:
        return NOTIMP
    if questions != 1 or answers or authorities:
        return FORMERR
    labels, at = [], _HEADER.size
    while True:
        if at >= len(data):
            return FORMERR
        length = data[at]
        at += 1
        if not length:
            break
        if length > 63 or at + length > len(data) or at + length - _HEADER.size > 254:      # 2.3.4
            return FORMERR
        labels.append(data[at:at + length].lower())
        at += length
    if at + _TAIL.size > len(data):
        return FORMERR
    kind, kind_class = _TAIL.unpack_from(data, at)
    plain = all(byte in _WORD for label in labels for byte in label)
    name = b".".join(labels).decode("ascii") if plain else ""
    return Question(identity, flags, name, kind, kind_class, at + _TAIL.size)


def answer(query: bytes, question: Question, records: list[tuple[int, bytes]], code: int = OK) -> bytes:
    """Of `records` (type, data) as many as a plain answer has room for."""
    flags = _RESPONSE | _AUTHORITATIVE | _AVAILABLE | question.flags & _DESIRED | code
    parts, size = [], question.end
    for kind, data in records:
        size += _RECORD.size + len(data)
        if size > PLAIN_MOST:
            flags |= _TRUNCATED
            break
        parts.append(_RECORD.pack(_TO_QUESTION, kind, IN, TTL, len(data)) + data)
    return (_HEADER.pack(question.id, flags, 1, len(parts), 0, 0) + query[_HEADER.size:question.end] + b"".join(parts))


def error(query: bytes, code: int) -> bytes:
    """A header that says no, for a query of which no more was understood."""
    identity, flags = _TAIL.unpack_from(query)
    return _HEADER.pack(identity, _RESPONSE | flags & (_OPCODE | _DESIRED) | code, 0, 0, 0, 0)


def encode_name(name: str) -> bytes:
    """As records have it."""
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"


def matches(response: bytes, identity: int, query: bytes, end: int) -> bool:
    """Whether `response` answers `query`, whose question ends at `end`, sent on with another `identity`."""
    if len(response) < _HEADER.size:
        return False
    told, flags, questions, _, _, _ = _HEADER.unpack_from(response)
    if told != identity or not flags & _RESPONSE:
        return False
    if not questions:
        return bool(flags & 15)         # an error may leave the question out
    return questions == 1 and response[_HEADER.size:end].lower() == query[_HEADER.size:end].lower()
