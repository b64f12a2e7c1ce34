"""Handing the listener of a filter to the supervisor (runtime-spec 1.2, config-linux.md, The Container Process State).

    C2           loads the filter; its next system call sends the descriptor to the runtime (sync.py, NOTIFY)
    runtime      connects to listenerPath, sends the state as JSON with the descriptor, closes: `send_listener`
    C2           goes on, under the filter, as far as the supervisor lets it

So SCMP_ACT_NOTIFY on sendmsg is refused (rules.py), as it is on write by runc: nobody could answer yet.
Driven by tests/root/test_seccomp_notify.py.
"""

from __future__ import annotations

__all__ = ["load_filter", "send_listener"]

import os
from socket import AF_UNIX, SCM_RIGHTS, SO_SNDTIMEO, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from sys import byteorder

from hv.errors import HvError

# C2 needs it when it has no Python to import from any more, so it is loaded with what the runtime needs.
from hv.linux.seccomp import load_filter
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SECONDS = 10                   # a supervisor that does not accept or read must not hold the runtime up for good


def send_listener(profile: dict[str, Any], state: dict[str, Any], pid: int, listener: int) -> None:
    """Send the container process state: `state` as runtime.md has it, `pid` as the runtime sees it."""
    path = profile["listenerPath"]
    message: dict[str, Any] = {"ociVersion": state["ociVersion"], "fds": ["seccompFd"], "pid": pid}
    if profile.get("listenerMetadata"):
        message["metadata"] = profile["listenerMetadata"]
    data = dumps(message | {"state": state | {"pid": pid}}).encode()
    with socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC) as connection:
        # struct timeval; connect waits as long, where many wait before us
        connection.setsockopt(SOL_SOCKET, SO_SNDTIMEO, _SECONDS.to_bytes(8, byteorder) + bytes(8))
        try:
            connection.connect(path)
            # the descriptors belong to the first sendmsg
            sent = connection.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, listener.to_bytes(4, byteorder))])
            while sent < len(data):
                sent += connection.send(data[sent:])
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)       # a path too long has no errno
            raise HvError(f"linux.seccomp.listenerPath {path}: {why}",
                          "the supervisor must listen there before the container is created") from None
