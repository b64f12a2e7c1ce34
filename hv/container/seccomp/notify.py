"""Handing the listener of a filter to the supervisor (runtime-spec 1.2, config-linux.md, The Container Process State).

    runtime      connect() to listenerPath before anything is made: nobody there, no container
    C2           loads the filter, and with its next system call sends state and descriptor: `hand_over`
                 (one sendmsg, on the connection it has from the runtime)

C2 sends them itself because it is the one that knows the descriptor, and the runtime may have gone: the filter is
loaded as late as can be. So SCMP_ACT_NOTIFY on sendmsg is refused (rules.py), as it is on write by runc.
Driven by tests/root/test_seccomp.py.
"""

from __future__ import annotations

__all__ = ["connect", "hand_over", "process_state"]

import os
from socket import AF_UNIX, SCM_RIGHTS, SO_SNDTIMEO, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from sys import byteorder

from hv.container.plainjson import dumps
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SECONDS = 10                   # a supervisor that does not accept or read must not hold a container up for good


def connect(path: str) -> int:
    """A connection to the supervisor. ConfigError where nobody listens."""
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    connection.setsockopt(SOL_SOCKET, SO_SNDTIMEO, _SECONDS.to_bytes(8, byteorder) + bytes(8))  # struct timeval
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise ConfigError(f"linux.seccomp.listenerPath {path}: {os.strerror(error.errno or 0) or error}",
                          "start the supervisor first") from None
    return connection.detach()


def process_state(state: dict[str, Any], pid: int, metadata: str = "") -> bytes:
    """The message: `state` as runtime.md has it, with the status of the moment; `pid` as the runtime sees it."""
    message: dict[str, Any] = {"ociVersion": state["ociVersion"], "fds": ["seccompFd"], "pid": pid}
    if metadata:
        message["metadata"] = metadata
    return dumps(message | {"state": state | {"pid": pid}}).encode()


def hand_over(connection: int, message: bytes, load: Callable[[], int]) -> None:
    """`load()` the filter, send its listener with `message`, close both ends of it here.

    The filter is in force from then on, so everything but sendmsg and close is done before.
    """
    end = socket(AF_UNIX, SOCK_STREAM, 0, fileno=connection)
    listener = load()
    try:
        # the descriptors belong to the first sendmsg (config-linux.md)
        sent = end.sendmsg([message], [(SOL_SOCKET, SCM_RIGHTS, listener.to_bytes(4, byteorder))])
        while sent < len(message):
            sent += end.sendmsg([message[sent:]])
    except OSError as error:
        raise HvError(f"linux.seccomp.listenerPath: {os.strerror(error.errno or 0) or error}",
                      "the profile must allow sendmsg, and the supervisor read") from None
    for close in (end.close, lambda: os.close(listener)):
        try:
            close()
        except OSError:
            pass        # the profile forbids it; exec closes both
