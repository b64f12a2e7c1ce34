"""A process that makes itself ready to make an instance while the command still reads what is to be made.

`pyhv run` forks it before anything else (bin/pyhv): it loads the modules that a maker needs (launch.py), on the other
processor, and is told what to make over a socket, with the lock on the instance. That saves the 5 ms of loading one
after the other, and half of the pages that a later fork would copy. Nobody to tell it anything: it ends.

Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["order", "ready"]

import os
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET

from hv.instance.launch import become_maker
from hv.instance.record import Instance
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import NoReturn

_WORD = 4                   # bytes of length before the order


def order(maker: socket, instance: Instance, layers: list[str] | None, gate: bool) -> None:
    """Have the process at the other end make a locked instance. OSError where it has gone."""
    text = dumps({"id": instance.id, "layers": layers, "gate": gate}).encode()
    fds = instance.lock_fd.to_bytes(4, "little")
    maker.sendmsg([len(text).to_bytes(_WORD, "little") + text], [(SOL_SOCKET, SCM_RIGHTS, fds)])


def ready(told: socket) -> NoReturn:
    """Wait for an order, and be the maker of that instance."""
    try:
        data, extra, _, _ = told.recvmsg(_WORD, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
        if len(data) < _WORD or not extra:
            os._exit(0)
        size, text = int.from_bytes(data, "little"), b""
        while len(text) < size:
            part = told.recv(size - len(text))
            if not part:
                os._exit(0)
            text += part
        wanted = loads(text.decode())
        instance = Instance(wanted["id"])
        instance.lock_fd = int.from_bytes(extra[0][2][:4], "little")
        instance.load()
    except BaseException:
        os._exit(1)                 # whoever asked hears that it was killed
    become_maker(instance, told, wanted["layers"], wanted["gate"])
