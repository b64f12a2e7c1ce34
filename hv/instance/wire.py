"""What commands and the keeper say to each other over RUN/keeper.sock: frames, as the guest's agent has them.

    u8 type, three bytes of zero, u32 length (little-endian, 65536 at most), payload

    command -> keeper   Q request (JSON), I input, i its end, W rows and columns (u16 each)
    keeper -> command   A answer (JSON), O output, R error output, X exit code (u32): the end

One request a connection; {"do": "attach", ...} goes on with the other frames. Driven by
tests/unit/test_instance_wire.py.
"""

from __future__ import annotations

__all__ = ["FRAME_MOST", "Frames", "frame", "frames"]

from hv.errors import HvError

FRAME_MOST = 1 << 16
_HEADER = 8
_TYPES = b"QIiWAORX"


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """One frame."""
    return kind + b"\0\0\0" + len(payload).to_bytes(4, "little") + payload


def frames(kind: bytes, data: bytes) -> bytes:
    """As many as `data` needs."""
    if len(data) <= FRAME_MOST:
        return frame(kind, data)
    return b"".join(frame(kind, data[at:at + FRAME_MOST]) for at in range(0, len(data), FRAME_MOST))


class Frames:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The frames that are whole by now. HvError where these are none."""
        self._data += data
        found = []
        at = 0
        while len(self._data) - at >= _HEADER:
            kind = bytes(self._data[at:at + 1])
            size = int.from_bytes(self._data[at + 4:at + 8], "little")
            if kind not in _TYPES or size > FRAME_MOST or any(self._data[at + 1:at + 4]):
                raise HvError("the other side does not speak pyhv's protocol")
            if len(self._data) - at - _HEADER < size:
                break
            found.append((kind, bytes(self._data[at + _HEADER:at + _HEADER + size])))
            at += _HEADER + size
        del self._data[:at]
        return found
