"""What the runtime and the container's first process say to each other while it is made, if it is a fork.

Most are none: far.py draws how those are made.

    runtime (P)                      stage one (C1)                   first process of the container (C2)
       | --- clone, with new namespaces ------------------------------------->|     the usual way
       | --- fork ------------------->|                                       |     where namespaces are joined that
       |<-- PID n --------------------| --- clone, as P's child ------------->|     count for children only, or P has
       |                              ends                                    |     threads
       |<-- MAP --------------------------------------------------------------|  new user namespace: "give me my ids"
       | --- GO ------------------------------------------------------------->|
       |<-- TIME -------------------------------------------------------------|  "write my clocks' offsets"
       | --- GO ------------------------------------------------------------->|
       |     sets the limits of the cgroup meanwhile                          |  mounts meanwhile
       |<-- CGROUP -----------------------------------------------------------|  "are my limits set?"
       | --- GO ------------------------------------------------------------->|
       |<-- OPEN path --------------------------------------------------------|  a path that root inside can't reach
       | --- GO, descriptor ------------------------------------------------->|
       |<-- HOOKS ------------------------------------------------------------|  prestart, createRuntime hooks run now
       | --- GO ------------------------------------------------------------->|
       |<-- NOTIFY descriptor ------------------------------------------------|  the filter's, for listenerPath
       | --- GO ------------------------------------------------------------->|
       |<-- READY ------------------------------------------------------------|  all is done but to become the last
       | --- GO, if somebody has to do something first ---------------------->|  program
       |<-- end, or eight bytes (stub.py) ------------------------------------|  it has run, or why not
       |<-- ERROR text, at any time ------------------------------------------|

One SOCK_SEQPACKET pair: a message is one byte and what belongs to it. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["CGROUP", "ERROR", "GO", "HOOKS", "MAP", "NOTIFY", "OPEN", "PID", "READY", "TIME", "Channel"]

import os
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, SCM_RIGHTS, SOL_SOCKET

from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

CGROUP, MAP, OPEN, PID, HOOKS, NOTIFY, READY, TIME, ERROR, GO = (
    b"c", b"m", b"o", b"p", b"h", b"n", b"r", b"t", b"e", b"g")
_MOST = 64 << 10
_SPACE = CMSG_SPACE(4)


class Channel:
    """One end. Messages are small, so a send never waits. `received` is the descriptor that came with the last one."""

    def __init__(self, end: socket) -> None:
        self.end = end
        self.received = -1
        self._early = b""

    def send(self, kind: bytes, text: str = "", fd: int = -1) -> None:
        """Say something. The other side may have died: then nobody hears it."""
        data = kind + text.encode("utf-8", "surrogateescape")[:_MOST - 1]
        try:
            if fd < 0:
                self.end.send(data)
            else:
                self.end.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, fd.to_bytes(4, "little"))])
        except OSError:
            pass

    def receive(self) -> tuple[bytes, str]:
        """The next message; HvError where the other side reports an error or has gone."""
        data = self.last_word()
        if not data:
            raise HvError("the container's first process died before it was ready",
                          "perhaps its memory limit is too low")
        kind, text = data[:1], data[1:].decode("utf-8", "surrogateescape")
        if kind == ERROR:
            raise HvError(text)
        return kind, text

    def second_process(self) -> int:
        """The pid that stage one, which has ended, told. What the process itself said before that comes again later."""
        early = b""
        while True:
            data = self.last_word(MSG_DONTWAIT)
            if data[:1] == PID:
                self._early = early
                return int(data[1:])
            if not data:
                self._early = early
                self.receive()          # stage one's error
                raise HvError("the container's first process can't be found")
            early = data

    def last_word(self, flags: int = 0) -> bytes:
        """The next message as it is; empty where the other side has closed (MSG_DONTWAIT: or has said nothing)."""
        if self._early:
            data, self._early = self._early, b""
            return data
        try:
            data, extra, _, _ = self.end.recvmsg(_MOST, _SPACE, MSG_CMSG_CLOEXEC | flags)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise HvError(f"the container's first process: {os.strerror(error.errno or 0)}") from None
        self.received = int.from_bytes(extra[0][2][:4], "little") if extra else -1
        return data

    def ask(self, kind: bytes, text: str = "", fd: int = -1) -> None:
        """Say something and wait for GO."""
        self.send(kind, text, fd)
        answer, _ = self.receive()
        if answer != GO:
            raise HvError(f"unexpected message {answer!r}")
