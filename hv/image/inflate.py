"""A layer's blob, decompressed piece by piece: gzip (of several members), zstd (of several frames, skippable ones too),
or plain; told by their first bytes, whatever the media type says.

Bounded: a blob may become `Limits.ratio` times its size and `Limits.most` bytes, not more, and a zstd frame may want a
window of 128 MiB, what the format advises decoders to take (RFC 8878, 3.1.1.1.2, has 8 MiB as the least). What follows
a gzip member and is neither zeros nor a member is refused, as is a member or frame that ends early. Formats: RFC 1952,
RFC 8878. gzip by ISA-L (twice as fast as zlib) where its wheel is there. Left out: bzip2 and xz, which no image has.

Driven by tests/unit/test_image_tarstream.py.
"""

from __future__ import annotations

__all__ = ["Limits", "inflate"]

import os

from hv.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = bytes(range(0x50, 0x60)), b"\x2a\x4d\x18"      # RFC 8878, 3.1.2: 0x184D2A5?
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_READ = 256 << 10               # compressed bytes at a time
_PIECE = 1 << 20                # plain bytes at a time
_GZIP_WITH_HEADER = 31          # zlib.h, inflateInit2: 15 bits of window, and 16 for gzip
_WINDOW = 128 << 20
_FREE = 1 << 30                 # bytes that any blob may become


class Limits:
    """What one layer may cost. `ratio`: times its compressed size; gzip reaches 1,030, zstd more, with zeros."""

    __slots__ = ("entries", "most", "ratio")

    def __init__(self, most: int = 0, ratio: int = 0, entries: int = 0) -> None:
        self.most = most or _setting("PYHV_LAYER_BYTES", 256 << 30)
        self.ratio = ratio or _setting("PYHV_LAYER_RATIO", 200)
        self.entries = entries or _setting("PYHV_LAYER_ENTRIES", 4_000_000)

    def bytes_of(self, packed: int) -> int:
        """How much a blob of `packed` bytes may become."""
        return min(self.most, max(_FREE, packed * self.ratio))


def _setting(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 19 and int(text) else usual


def inflate(fd: int, label: str, limits: Limits, done: Callable[[int], object] | None = None) -> Iterator[bytes]:
    """The plain bytes of the blob open as `fd`; `done` hears how many compressed bytes were read. ImageError."""
    size = os.fstat(fd).st_size
    most, total = limits.bytes_of(size), 0
    for piece in _pieces(fd, label, done):
        total += len(piece)
        if total > most:
            raise ImageError(f"{label}: becomes more than {most} bytes; {size} are in the store",
                             "if you trust it, raise PYHV_LAYER_RATIO (times its size) and PYHV_LAYER_BYTES")
        yield piece


def _pieces(fd: int, label: str, done: Callable[[int], object] | None) -> Iterator[bytes]:
    source = _Source(fd, done)
    head = source.read()
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise ImageError(f"{label}: is compressed with {name}", "gzip, zstd and plain layers are taken")
    try:
        if head.startswith(_GZIP):
            yield from _gunzip(source, head, label)
        elif head.startswith(_ZSTD) or (head[:1] in _SKIPPABLE[0] and head[1:4] == _SKIPPABLE[1]):
            yield from _unzstd(source, head, label)
        else:
            while head:
                yield head
                head = source.read(_PIECE)
    except OSError as error:
        raise ImageError(f"{label}: can't be read: {error.strerror}") from None


class _Source:
    def __init__(self, fd: int, done: Callable[[int], object] | None) -> None:
        self._fd, self._done, self._read = fd, done, 0
        self.held = b""         # read already

    def read(self, size: int = _READ) -> bytes:
        if self.held:
            data, self.held = self.held[:size], self.held[size:]
            return data
        data = os.read(self._fd, size)
        if self._done is not None:
            self._read += len(data)
            self._done(self._read)
        return data


def _gunzip(source: _Source, data: bytes, label: str) -> Iterator[bytes]:
    library: Any
    try:
        from isal import isal_zlib

        library = isal_zlib
    except ImportError:
        import zlib

        library = zlib
    while data:
        member = library.decompressobj(_GZIP_WITH_HEADER)
        while not member.eof:
            try:
                piece = member.decompress(data, _PIECE)
            except library.error as error:
                raise ImageError(f"{label}: its gzip data is damaged: {error}", "`pyhv image fsck`") from None
            if piece:
                yield piece
            data = member.unconsumed_tail
            if not data and not member.eof and len(piece) < _PIECE:
                data = source.read()
                if not data:
                    raise ImageError(f"{label}: its gzip data ends early")
        data = member.unused_data
        while len(data) < 2 and (more := source.read()):
            data += more
        if data and not data.startswith(_GZIP):
            _only_zeros(source, data, f"{label}: something follows its gzip data")
            return


def _only_zeros(source: _Source, data: bytes, message: str) -> None:
    while data:
        if data.count(0) != len(data):
            raise ImageError(message)
        data = source.read()


def _unzstd(source: _Source, data: bytes, label: str) -> Iterator[bytes]:
    """A frame that ends early is not told by the library; the tar reader or the digest will."""
    import zstandard

    source.held = data
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(
        source, read_across_frames=True)  # type: ignore[arg-type]
    try:
        while piece := reader.read(_PIECE):
            yield piece
    except zstandard.ZstdError as error:
        raise ImageError(f"{label}: its zstd data is damaged: {error}", "`pyhv image fsck`") from None
