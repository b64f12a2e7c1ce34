"""An instance's output on disk, in the form of docker's json-file driver: a JSON object a line.

    {"log":"text\\n","stream":"stdout","time":"2026-01-01T00:00:00.000000000Z"}

What comes is written at once, so that the keeper's end loses nothing: a line whose end has not come yet is an object
whose text has none. Bytes that are no UTF-8 stand as lone surrogates (\\udcXX), which are bytes again when they are
read here, and replacement characters elsewhere. A file that is full becomes log.json.1, what was that log.json.2, ...

Driven by tests/unit/test_instance_log.py.
"""

from __future__ import annotations

__all__ = ["LogReader", "LogWriter", "log_path"]

import os
from _json import encode_basestring_ascii

from hv.container.state import now
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE = 16 << 10               # of a line without end: docker's
_BLOCK = 1 << 16
_LINE_MOST = 1 << 20            # of a file that somebody has damaged
_ENDED = b'\\n","stream"'       # in a line of the file: its text ends a line


def log_path(folder: str) -> str:
    """The newest file, in an instance's folder."""
    return f"{folder}/log.json"


class LogWriter:
    """`most`: bytes of one file, 0 without bound; `files`: how many are kept."""

    def __init__(self, path: str, most: int = 0, files: int = 1) -> None:
        self._path, self._most, self._files = path, most, files
        self._fd = -1
        self._size = 0
        self.lost = 0               # bytes that could not be written: a full disk

    def _open(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            self._size = os.fstat(self._fd).st_size
        except OSError:
            self._fd = -1

    def write(self, stream: str, data: bytes) -> None:
        """Append what the program wrote to `stream`. A disk that is full loses text, never the program."""
        tail = f',"stream":"{stream}","time":"{now()}"}}\n'
        *lines, rest = data.decode("utf-8", "surrogateescape").split("\n")
        pieces = [line + "\n" for line in lines]
        if rest:
            pieces.append(rest)
        if len(data) > _PIECE and any(len(piece) > _PIECE for piece in pieces):
            pieces = [piece[at:at + _PIECE] for piece in pieces for at in range(0, len(piece), _PIECE)]
        text = "".join(['{"log":' + encode_basestring_ascii(piece) + tail for piece in pieces]).encode("ascii")
        if self._fd < 0:
            self._open()                # most programs that are short-lived say nothing
        if self._most and self._size and self._size + len(text) > self._most:
            self._rotate()
        try:
            done = os.write(self._fd, text)
            if done < len(text):
                done += os.write(self._fd, text[done:])
            self._size += done
        except OSError:
            self.lost += len(data)

    def _rotate(self) -> None:
        self.close()
        try:
            for number in range(self._files - 1, 0, -1):
                older = f"{self._path}.{number - 1}" if number > 1 else self._path
                if os.path.exists(older):
                    os.replace(older, f"{self._path}.{number}")
            if self._files == 1:
                os.unlink(self._path)       # who reads it has it open still
        except OSError:
            pass
        self._open()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LogReader:
    """The records of a log, the oldest first, across rotation: (stream, bytes, time)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._rest = b""

    def all(self, tail: int = -1) -> Iterator[tuple[str, bytes, str]]:
        """What there is now; the last `tail` lines. Then more() goes on where this ended."""
        files = self._files()
        skip = 0
        if tail >= 0:
            files, skip = self._tail(files, tail)
        for place, path in enumerate(files):
            last = place == len(files) - 1
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            self._use(fd)
            if not place and skip:
                os.lseek(fd, skip, os.SEEK_SET)
            yield from self._read()
            if last and path != self._path:
                self._use(-1)

    def more(self) -> Iterator[tuple[str, bytes, str]]:
        """What has come since."""
        if self._fd >= 0:
            yield from self._read()
            if not self._moved():
                return
            yield from self._read()         # what was written between the two
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        self._use(fd)
        yield from self._read()

    def _moved(self) -> bool:
        """Whether the file we read is the newest no more."""
        mine = os.fstat(self._fd)
        try:
            newest = os.stat(self._path)
        except OSError:
            return False                    # in the middle of it
        return (mine.st_dev, mine.st_ino) != (newest.st_dev, newest.st_ino)

    def _files(self) -> list[str]:
        found = [self._path]
        while os.path.exists(f"{self._path}.{len(found)}"):
            found.append(f"{self._path}.{len(found)}")
        return found[::-1]

    def _tail(self, files: list[str], lines: int) -> tuple[list[str], int]:
        """Which files have the last lines, and where they begin in the first of them."""
        if not lines:                       # nothing but what is to come
            return files[-1:], _size(files[-1])
        # a line begins behind the end of the one before it; the newest of all may have no end yet
        wanted = -1
        for place in range(len(files) - 1, -1, -1):
            try:
                fd = os.open(files[place], os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                where, wanted = _seek_ends(fd, wanted, lines)
            finally:
                os.close(fd)
            if wanted == 0:
                return files[place:], where
        return files, 0

    def _use(self, fd: int) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._rest = fd, b""

    def _read(self) -> Iterator[tuple[str, bytes, str]]:
        while data := os.read(self._fd, _BLOCK):
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _LINE_MOST:
                self._rest = b""
            for line in lines:
                try:
                    row = loads(line.decode())
                    yield str(row["stream"]), row["log"].encode("utf-8", "surrogateescape"), str(row["time"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    pass                    # a disk was full in the middle of it
        # nothing more now

    def close(self) -> None:
        """Close what is open."""
        self._use(-1)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _seek_ends(fd: int, wanted: int, lines: int) -> tuple[int, int]:
    """Where the text behind the `wanted`-th end of a line from the back begins, how many ends are missing.

    `wanted` -1: nothing was looked at yet, and `lines` lines are looked for.
    """
    at = os.fstat(fd).st_size
    text, block = b"", _BLOCK
    left = wanted
    while at > 0:
        step = min(block, at)
        at, block = at - step, 2 * block
        text = os.pread(fd, step, at) + text
        rows = text.split(b"\n")[:-1]
        if wanted < 0 and rows:
            wanted = lines + (_ENDED in rows[-1])
        left = wanted
        for index in range(len(rows) - 1, -1 if at == 0 else 0, -1):
            if _ENDED in rows[index]:
                left -= 1
                if not left:
                    return at + sum(len(row) + 1 for row in rows[:index + 1]), 0
    return 0, left
