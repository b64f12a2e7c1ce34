"""What waits for the end of an unpacking, in bounded memory: beyond a MiB it goes to a file without a name.

Driven by tests/unit/test_image_unpack.py.
"""

from __future__ import annotations

__all__ = ["Later"]

import os
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_ROW = Struct("<qiiH")          # seconds, nanoseconds, mode or -1, length of the path
_PART = 1 << 20
_LONGEST = 0xffff


class Later:
    """Rows of a folder's path, time and mode, given back in the order that they came in."""

    def __init__(self, folder_fd: int) -> None:
        self._folder, self._file, self._rows = folder_fd, -1, bytearray()

    def add(self, path: bytes, mtime: int, mode: int) -> None:
        """Keep a row; paths beyond what a row holds could not have been made."""
        seconds, rest = divmod(mtime, 1_000_000_000)
        self._rows += _ROW.pack(max(min(seconds, 1 << 40), -1 << 40), rest, mode, len(path[:_LONGEST]))
        self._rows += path[:_LONGEST]
        if len(self._rows) > _PART:
            if self._file < 0:
                self._file = os.open(f"/proc/self/fd/{self._folder}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self._flush()

    def _flush(self) -> None:
        view = memoryview(self._rows)
        while view:
            view = view[os.write(self._file, view):]
        view.release()
        self._rows = bytearray()

    def __iter__(self) -> Iterator[tuple[bytes, int, int]]:
        data = self._rows
        if self._file >= 0:
            self._flush()
            os.lseek(self._file, 0, os.SEEK_SET)
            data = bytearray(os.read(self._file, _PART))
        at = 0
        while True:
            if len(data) - at < _ROW.size + _LONGEST and self._file >= 0:
                data, at = data[at:] + os.read(self._file, _PART), 0
            if at == len(data):
                return
            seconds, rest, mode, length = _ROW.unpack_from(data, at)
            at += _ROW.size + length
            yield bytes(data[at - length:at]), seconds * 1_000_000_000 + rest, mode

    def close(self) -> None:
        """The file goes."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
