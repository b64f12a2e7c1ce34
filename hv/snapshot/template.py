"""The process that machines' processes are forked from: it does nothing else.

    zygote      serves the pool's socket, keeps count
      template  everything imported, the snapshot's state read; waits for a number and a channel, and forks
        child   has one machine

What a process writes to after a fork, be it a reference count, is no longer shared with the child: it is a page more
for each child, as the next one is forked from another state. So what is forked from should do as little as can be.
It dies with the zygote, its children with it (prctl(2), PR_SET_PDEATHSIG). Neither may have another thread: a lock that
one held would stay locked in the child. Driven by tests/kvm/test_pool.py.
"""

from __future__ import annotations

__all__ = ["Template"]

import os
from _socket import AF_UNIX, CMSG_SPACE, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from signal import SIG_DFL, SIG_IGN, SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGTERM, signal

from hv.errors import StateError
from hv.linux.creds import PR_SET_PDEATHSIG, prctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Live = Callable[[int, int], int]

CHANNEL = 3             # the descriptor that a process of these has beside its standard streams
_WORD = 8               # bytes of a number on the way


class Template:
    """Made by the zygote, once all is loaded. A child calls live(channel, number), and ends with what that returns."""

    def __init__(self, live: Live) -> None:
        zygote = os.getpid()
        self._channel, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
        self.pid = os.fork()
        if not self.pid:
            # Never returns: what the zygote had is neither used nor taken apart here.
            try:
                _serve(theirs.fileno(), zygote, live)
            finally:
                os._exit(0)
        theirs.close()

    def fork(self, channel: socket, number: int) -> int:
        """A child more, which has `channel`: its process ID. OSError where the host has no room for it."""
        told = b""
        try:
            rights = channel.fileno().to_bytes(4, "little")
            self._channel.sendmsg([number.to_bytes(_WORD, "little")], [(SOL_SOCKET, SCM_RIGHTS, rights)])
            told = self._channel.recv(_WORD)
        except ConnectionError:
            pass
        if not told:
            raise StateError("the pool's template process has ended", "somebody killed it: start the pool anew")
        pid = int.from_bytes(told, "little", signed=True)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def close(self) -> None:
        """End it, and with it the children there are."""
        if self._channel.fileno() >= 0:
            self._channel.close()
            os.waitpid(self.pid, 0)


def _serve(channel: int, zygote: int, live: Live) -> None:
    # What ends the pool is told to the zygote, which ends the children in order.
    for number in (SIGINT, SIGTERM, SIGHUP):
        signal(number, SIG_IGN)
    signal(SIGCHLD, SIG_IGN)            # children need not be waited for
    if not _bound_to(zygote):
        return
    keep_only(channel)
    template, sock = os.getpid(), socket(fileno=CHANNEL)
    space = CMSG_SPACE(4)
    while True:
        data, rights, _, _ = sock.recvmsg(_WORD, space)
        if not data:
            return
        theirs = int.from_bytes(rights[0][2], "little")
        try:
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or 1)
        if not pid:
            code = 70
            try:
                code = _child(theirs, template, int.from_bytes(data, "little"), live)
            finally:
                os._exit(code)
        os.close(theirs)
        sock.send(pid.to_bytes(_WORD, "little", signed=True))


def _child(channel: int, template: int, number: int, live: Live) -> int:
    for caught in (SIGTERM, SIGCHLD):
        signal(caught, SIG_DFL)
    if not _bound_to(template):
        return 1
    keep_only(channel)
    return live(CHANNEL, number)


def _bound_to(parent: int) -> bool:
    """End with `parent`, however that ends; False where it has already."""
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    return os.getppid() == parent


def keep_only(channel: int) -> None:
    """Standard streams that lead nowhere, and `channel` as the descriptor CHANNEL; nothing else."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if channel != CHANNEL:
        os.dup2(channel, CHANNEL, inheritable=False)
    os.closerange(CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
