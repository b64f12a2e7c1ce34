"""What the runtime and the container's first process say to each other while it is made.

    runtime (P)                      stage one (C1)                   stage two, the container's pid 1 (C2)
       | --- fork ------------------->|
       |<-- CGROUP -------------------|  "put me where I belong"
       | --- GO --------------------->|
       |<-- MAP ----------------------|  only with a new user namespace: "give me my ids"
       | --- GO --------------------->|
       |<-- PID n --------------------| --- clone, as P's child ------->|
       |                              ends                              |
       |<-- HOOKS ------------------------------------------------------|  namespaces stand: createRuntime hooks run now
       | --- GO ------------------------------------------------------->|
       |<-- READY ------------------------------------------------------|  all is done but to run the program
       |<-- ERROR text, at any time ------------------------------------|

One SOCK_SEQPACKET pair: a message is one byte and what belongs to it. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["CGROUP", "ERROR", "GO", "HOOKS", "MAP", "NOTIFY", "PID", "READY", "Channel"]

import os

from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

CGROUP, MAP, PID, HOOKS, NOTIFY, READY, ERROR, GO = b"c", b"m", b"p", b"h", b"n", b"r", b"e", b"g"
_MOST = 64 << 10


class Channel:
    """One end. Messages are small, so a send never waits."""

    def __init__(self, end: socket) -> None:
        self.end = end

    def send(self, kind: bytes, text: str = "") -> None:
        """Say something. The other side may have died: then nobody hears it."""
        try:
            self.end.send(kind + text.encode("utf-8", "surrogateescape")[:_MOST - 1])
        except OSError:
            pass

    def receive(self) -> tuple[bytes, str]:
        """The next message; HvError where the other side reports an error or has gone."""
        try:
            data = self.end.recv(_MOST)
        except OSError as error:
            raise HvError(f"the container's first process: {os.strerror(error.errno or 0)}") from None
        if not data:
            raise HvError("the container's first process died before it was ready", "see --log with --debug")
        kind, text = data[:1], data[1:].decode("utf-8", "surrogateescape")
        if kind == ERROR:
            raise HvError(text)
        return kind, text

    def ask(self, kind: bytes, text: str = "") -> None:
        """Say something and wait for GO."""
        self.send(kind, text)
        answer, _ = self.receive()
        if answer != GO:
            raise HvError(f"unexpected message {answer!r}")
