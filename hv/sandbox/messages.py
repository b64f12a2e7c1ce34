"""What a sandbox's socket carries: a length (32 bits, little endian), then that many bytes of JSON, an object.

Descriptors come with a message's first byte (man 7 unix, SCM_RIGHTS). Driven by tests/unit/test_sandbox_messages.py.
"""

from __future__ import annotations

__all__ = ["FDS_MOST", "MESSAGE_MOST", "Messages", "pack", "socket_at"]

import os

from hv.errors import HvError
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Any

SOCKET = "vm.sock"
MESSAGE_MOST = 4 << 20          # bytes; arguments and environment of a program have 2 MiB (hv/sandbox/frames.py)
FDS_MOST = 3


def pack(message: dict[str, Any]) -> bytes:
    """A message's bytes. HvError where it is too long."""
    data = dumps(message).encode()
    if len(data) > MESSAGE_MOST:
        raise HvError(f"a message of {len(data)} bytes", f"at most {MESSAGE_MOST}")
    return len(data).to_bytes(4, "little") + data


class Messages:
    """Cuts what comes into messages; holds one at most."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """More has come."""
        self._data += data

    def next(self) -> dict[str, Any] | None:
        """The next message, None until it is whole. HvError for what is none."""
        if len(self._data) < 4:
            return None
        length = int.from_bytes(self._data[:4], "little")
        if length > MESSAGE_MOST:
            raise HvError(f"a message of {length} bytes", f"at most {MESSAGE_MOST}")
        if len(self._data) < 4 + length:
            return None
        body = bytes(self._data[4:4 + length])
        del self._data[:4 + length]
        try:
            message = loads(body.decode())
        except ValueError as error:
            raise HvError(f"a message that is no JSON: {error}") from None
        if not isinstance(message, dict):
            raise HvError("a message that is no object")
        return message


def socket_at(folder: str, act: Callable[[str], Any]) -> Any:
    """`act` on a path of the socket in `folder` that is short enough: a socket's has 107 bytes (man 7 unix)."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return act(f"/proc/self/fd/{fd}/{SOCKET}")
    finally:
        os.close(fd)


def take_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Those that came along."""
    found = []
    for level, kind, data in ancillary:
        if (level, kind) == (1, 1):     # SOL_SOCKET, SCM_RIGHTS
            found += [int.from_bytes(data[at:at + 4], "little") for at in range(0, len(data) // 4 * 4, 4)]
    return found


def uid_of(peer: socket) -> int:
    """Whose process is at the other end (struct ucred: pid, uid, gid)."""
    from _socket import SO_PEERCRED, SOL_SOCKET

    return int.from_bytes(peer.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)[4:8], "little")
