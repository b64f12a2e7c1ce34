"""An instance's standard streams: the ends that its program has, and those that the keeper reads and writes.

Made by the process that makes the instance (launch.py), which then has the outer ends as descriptors 0 to 2.
Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["Streams"]

import os
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, SOCK_CLOEXEC, SOCK_STREAM, socketpair

from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

_PATIENCE = 10.0            # seconds for the terminal's descriptor to come


class Streams:
    """`inner`: three descriptors for the program; `outer`: three for the keeper, -1 where there is none.

    `pty`: the program gets a terminal of its own making, whose master comes over `console`.
    """

    def __init__(self, *, terminal: bool, interactive: bool, pty: bool) -> None:
        self.console = -1
        self._sender: socket | None = None
        self._receiver: socket | None = None
        self.inner, self.outer = [-1, -1, -1], [-1, -1, -1]
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        if terminal and pty:
            self._receiver, self._sender = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
            self.console = self._sender.fileno()
            self.inner = [null, null, null]
            return
        self.inner[0] = null
        if interactive or terminal:
            self.inner[0], self.outer[0] = os.pipe2(os.O_CLOEXEC)
            os.close(null)
        for number in (1,) if terminal else (1, 2):
            self.outer[number], self.inner[number] = os.pipe2(os.O_CLOEXEC)
        if terminal:
            self.inner[2] = self.inner[1]

    def take_terminal(self) -> None:
        """The program has its terminal: the master is the outer end."""
        if self._receiver is None:
            return
        self._receiver.settimeout(_PATIENCE)
        try:
            _, extra, _, _ = self._receiver.recvmsg(64, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
        except OSError:
            extra = []
        if not extra:
            raise HvError("the instance's terminal did not come")
        master = int.from_bytes(extra[0][2][:4], "little")
        self.outer = [master, master, -1]

    def put_inside(self) -> None:
        """Make the program's ends our descriptors 0 to 2."""
        for number, fd in enumerate(self.inner):
            os.dup2(fd, number)

    def put_outside(self) -> list[int]:
        """Make the outer ends our descriptors 0 to 2, and close all else of this; what keep.json says of them."""
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for number, fd in enumerate(self.outer):
            os.dup2(fd if fd >= 0 else null, number)
        for fd in {null, *self.inner, *self.outer}:
            if fd > 2:
                os.close(fd)
        for end in (self._sender, self._receiver):
            if end is not None:
                end.close()
        return [number if fd >= 0 else -1 for number, fd in enumerate(self.outer)]
