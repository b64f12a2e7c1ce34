"""Reading tar archives as they come, one entry after the other, never more than a piece of a file in memory.

v7, ustar, GNU and pax archives: long names (GNU L and K; pax path, linkpath), numbers in base 256, sparse files (GNU's
old form; pax 0.0, 0.1, 1.0), extended attributes (SCHILY.xattr.*), owners and times of global pax headers. Sources:
POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; tar(5) of libarchive; GNU tar's manual, "Sparse
Formats".

The archive is hostile: each number, name and map is checked here, and bounded by what headers may take. Of global
headers nothing else counts: what they hold would be done for each of the entries after them. Left out, and refused by
name: volumes of an archive in parts. tarfile of the standard library is not used: it takes 100 us and more for an
entry, this takes 10, and has no bound on what a pax header may be.

Driven by tests/unit/test_image_tarstream.py.
"""

from __future__ import annotations

__all__ = ["BLOCK", "Entry", "TarStream"]

from zlib import adler32

from hv.errors import ImageError
from hv.image.tarpax import decimal, nanoseconds, parse_pax, sparse_of_pax, sparse_of_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 512
_HEADER_MOST = 1 << 20          # bytes of one pax header or long name, as Go's archive/tar has it
_EXTENSIONS_MOST = 8            # headers that may stand before one entry
_MAP_MOST = 65536               # pieces of one sparse file
_SIZE_MOST = 1 << 62
_TIME_MOST = 1 << 40           # seconds; no file system has more
_ADLER = 65521                  # RFC 1950
_ZEROS = bytes(BLOCK)
# Types of entries. The data of a link, device or folder is none, whatever its size field says (as Go's archive/tar).
_REGULAR, _OLD_REGULAR, _CONTIGUOUS, _SPARSE, _FOLDER, _DUMP = b"0", b"\0", b"7", b"S", b"5", b"D"
_OF_ALL = (b"mtime", b"uid", b"gid")    # what a global header says of the entries after it
_FILES = {_REGULAR, _OLD_REGULAR, _CONTIGUOUS, _SPARSE}
_OTHERS = {b"1", b"2", b"3", b"4", b"6", _FOLDER}
_LONG_NAME, _LONG_LINK, _PAX, _SUN_PAX, _GLOBAL, _VOLUME = b"L", b"K", b"x", b"X", b"g", b"V"
_PARTS = {b"M": "a continued file of a multi-volume archive", b"N": "an old GNU long name"}


class Entry:
    """One entry. `kind`: tar's type, `0` for all regular files. `mtime` in ns. `pieces`: a sparse file's map."""

    __slots__ = ("gid", "kind", "link", "major", "minor", "mode", "mtime", "name", "pieces", "real", "size", "uid",
                 "xattrs")

    name: bytes
    link: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int               # bytes of data in the archive
    real: int               # bytes of the file
    mtime: int
    major: int
    minor: int
    xattrs: dict[bytes, bytes] | None
    pieces: list[tuple[int, int]] | None


class TarStream:
    """An archive that comes as pieces of bytes; `next`, and then `data` if there is some. ImageError begins `label`."""

    def __init__(self, source: Iterator[bytes], label: str) -> None:
        self._source, self._label = source, label
        self._data, self._at = b"", 0
        self._left = 0              # of the entry's data and padding, not read yet
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self.count = 0

    # -- bytes -------------------------------------------------------------------------------------------------

    def _more(self) -> bool:
        for piece in self._source:
            if piece:
                self._data, self._at = piece, 0
                return True
        self._data, self._at = b"", 0
        return False

    def _take(self, size: int) -> bytes:
        """`size` bytes, fewer where the archive ends."""
        end = self._at + size
        if end <= len(self._data):
            part = self._data[self._at:end]
            self._at = end
            return part
        parts, missing = [], size
        while missing:
            part = self._data[self._at:self._at + missing]
            self._at += len(part)
            missing -= len(part)
            parts.append(part)
            if missing and not self._more():
                break
        return b"".join(parts)

    def _whole(self, size: int, what: str) -> bytes:
        padded = size + -size % BLOCK
        data = self._take(padded)
        if len(data) < size:
            raise self._bad(f"ends within {what}")
        return data[:size]

    def data(self) -> Iterator[memoryview]:
        """The current entry's data, in pieces that are valid until the next."""
        while self._left:
            if self._at == len(self._data) and not self._more():
                raise self._bad(f"ends within the data of entry {self.count}")
            part = memoryview(self._data)[self._at:self._at + self._left]
            self._at += len(part)
            self._left -= len(part)
            yield part

    def _skip(self) -> None:
        left, self._left, self._padding = self._left + self._padding, 0, 0
        while left:
            have = len(self._data) - self._at
            if left <= have:
                self._at += left
                return
            left -= have
            self._at += have
            if not self._more():
                raise self._bad(f"ends within the data of entry {self.count}")

    def drain(self) -> None:
        """Read on to the end of what comes: for who counts or hashes it."""
        while self._more():
            pass

    def _bad(self, text: str) -> ImageError:
        return ImageError(f"{self._label}: its tar archive {text}")

    # -- entries -----------------------------------------------------------------------------------------------

    def next(self) -> Entry | None:
        """The next entry; None at the end."""
        if self._left or self._padding:
            self._skip()
        name = link = b""
        pax: dict[bytes, bytes] | None = None
        for _ in range(_EXTENSIONS_MOST):
            header = self._header()
            if header is None:
                if name or link or pax is not None:
                    raise self._bad("ends behind an extended header")
                return None
            kind = header[156:157]
            if kind in _FILES or kind in _OTHERS:
                return self._entry(header, name, link, pax)
            size = self._size(header)
            if kind == _DUMP:
                entry = self._entry(header, name, link, pax)
                self._left, self._padding, entry.kind = size, -size % BLOCK, _FOLDER
                self._skip()
                return entry
            if kind in _PARTS:
                raise self._bad(f"has {_PARTS[kind]} at entry {self.count}")
            if size > _HEADER_MOST:
                raise self._bad(f"has an extended header of {size} bytes, more than {_HEADER_MOST}")
            text = self._whole(size, "an extended header")
            if kind == _LONG_NAME:
                name = text.split(b"\0", 1)[0]
            elif kind == _LONG_LINK:
                link = text.split(b"\0", 1)[0]
            elif kind in (_PAX, _SUN_PAX):
                pax = parse_pax(text, self._bad)
            elif kind == _GLOBAL:
                said = parse_pax(text, self._bad)
                self._globals |= {key: said[key] for key in _OF_ALL if key in said}
            elif kind != _VOLUME:
                raise self._bad(f"has an entry of unknown type {kind!r} (entry {self.count})")
        raise self._bad(f"has more than {_EXTENSIONS_MOST} headers before entry {self.count}")

    def _header(self) -> bytes | None:
        """The next header, its checksum verified; None at the end of the archive."""
        header = self._take(BLOCK)
        if len(header) < BLOCK:
            if header:
                raise self._bad(f"ends within the header of entry {self.count + 1}")
            return None                     # without the blocks that end it; so does Go's reader
        if header == _ZEROS:
            second = self._take(BLOCK)
            if second and second != _ZEROS[:len(second)]:
                raise self._bad(f"goes on after a block of zeros, behind entry {self.count}")
            return None
        # Adler-32's lower half is 1 plus the sum of the bytes, modulo 65521: the checksum at a tenth of sum()'s time
        adler = adler32(header[156:], adler32(header[:148])) & 0xffff
        declared = self._number(header[148:156], "checksum")
        if (declared - 256 + 1) % _ADLER != adler:
            signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + b" " * 8 + header[156:])
            if declared != signed:          # as old SunOS counted
                raise self._bad(f"has a header with a wrong checksum (entry {self.count + 1})")
        self.count += 1
        return header

    def _number(self, field: bytes, what: str) -> int:
        """An octal number, or GNU's base 256: the first bit is set, the number is big-endian two's complement."""
        text = field.strip(b" \0")
        if text.isdigit():
            try:
                return int(text, 8)
            except ValueError:
                pass
        elif not text:
            return 0
        elif field[0] & 0x80:
            if field[0] & 0x40:
                return int.from_bytes(field, "big", signed=True)
            return int.from_bytes(bytes([field[0] & 0x7f]) + field[1:], "big")
        elif (text := text.split(b"\0")[0].strip()).isdigit():
            try:
                return int(text, 8)
            except ValueError:
                pass
        raise self._bad(f"has a bad {what} ({field[:12]!r}) in the header of entry {self.count + 1}")

    def _size(self, header: bytes) -> int:
        size = self._number(header[124:136], "size")
        if not 0 <= size < _SIZE_MOST:
            raise self._bad(f"has an entry of {size} bytes (entry {self.count})")
        return size

    def _entry(self, header: bytes, name: bytes, link: bytes, pax: dict[bytes, bytes] | None) -> Entry:
        entry = Entry()
        number = self._number
        kind = header[156:157]
        size = self._size(header)
        entry.name = name or _name(header)
        entry.link = link or header[157:257].split(b"\0", 1)[0]
        entry.mode = number(header[100:108], "mode") & 0o7777
        entry.uid = number(header[108:116], "uid")
        entry.gid = number(header[116:124], "gid")
        entry.mtime = max(min(number(header[136:148], "mtime"), _TIME_MOST), -_TIME_MOST) * 1_000_000_000
        entry.major = entry.minor = 0
        if kind in (b"3", b"4"):
            entry.major, entry.minor = number(header[329:337], "device"), number(header[337:345], "device")
        entry.xattrs = entry.pieces = None
        if pax is not None or self._globals:
            size = self._extended(entry, size, pax or {})
        if kind in _FILES:
            entry.kind = _FOLDER if entry.name.endswith(b"/") else _REGULAR     # v7 has no folders
            self._left, self._padding = size, -size % BLOCK
            if kind == _SPARSE:
                self._old_sparse(entry, header)
            elif pax is not None and b"GNU.sparse.major" in pax:
                self._text_sparse(entry)
            if entry.pieces is not None:
                self._check_map(entry)
            else:
                entry.real = size
        else:
            entry.kind, entry.real, entry.pieces, size = kind, 0, None, 0
        entry.size = size
        if not (0 <= entry.uid < 0xffffffff and 0 <= entry.gid < 0xffffffff):   # chown(2): -1 is none
            raise self._bad(f"has an owner that can't be, {entry.uid}:{entry.gid} (entry {self.count})")
        return entry

    def _extended(self, entry: Entry, size: int, pax: dict[bytes, bytes]) -> int:
        """What the pax headers say; the size of the data."""
        sizes = decimal(pax[b"size"], b"size", self._bad) if pax.get(b"size") else size
        if not 0 <= sizes < _SIZE_MOST:
            raise self._bad(f"has an entry of {sizes} bytes (entry {self.count})")
        entry.name = pax.get(b"path") or entry.name
        entry.link = pax.get(b"linkpath") or entry.link
        if name := pax.get(b"GNU.sparse.name"):
            entry.name = name
        both = {**self._globals, **pax} if self._globals else pax
        for key, text in both.items():
            if not text:
                continue
            if key == b"mtime":
                entry.mtime = nanoseconds(text, self._bad)
            elif key == b"uid":
                entry.uid = decimal(text, key, self._bad)
            elif key == b"gid":
                entry.gid = decimal(text, key, self._bad)
            elif key.startswith(b"SCHILY.xattr."):
                if entry.xattrs is None:
                    entry.xattrs = {}
                entry.xattrs[key[13:]] = text
        entry.real = 0
        if b"GNU.sparse.map" in pax:
            entry.pieces, entry.real = sparse_of_pax(pax, self._bad)
        elif b"GNU.sparse.major" in pax:
            entry.real = decimal(pax.get(b"GNU.sparse.realsize", b""), b"GNU.sparse.realsize", self._bad)
        return sizes

    # -- sparse files ------------------------------------------------------------------------------------------

    def _old_sparse(self, entry: Entry, header: bytes) -> None:
        """GNU's old form: a map of 4 pieces in the header, 21 in each block that follows."""
        number = self._number
        pieces: list[tuple[int, int]] = []
        entry.real = number(header[483:495], "real size")
        table, more = header[386:482], header[482]
        while True:
            for at in range(0, len(table), 24):
                if not table[at:at + 24].strip(b"\0"):
                    break
                pieces.append((number(table[at:at + 12], "sparse offset"),
                               number(table[at + 12:at + 24], "sparse length")))
            if not more:
                break
            if len(pieces) > _MAP_MOST:
                raise self._bad(f"has a sparse file of more than {_MAP_MOST} pieces (entry {self.count})")
            block = self._whole(BLOCK, "a sparse file's map")
            table, more = block[:504], block[504]
        entry.pieces = pieces

    def _text_sparse(self, entry: Entry) -> None:
        """pax 1.0: the map is text before the data, padded to blocks."""
        blocks: list[bytes] = []
        have, wanted = 0, 1
        while have < wanted:
            if len(blocks) * BLOCK > _HEADER_MOST or self._left < BLOCK:
                raise self._bad(f"has a sparse file with a bad map (entry {self.count})")
            blocks.append(self._whole(BLOCK, "a sparse file's map"))
            self._left -= BLOCK
            have += blocks[-1].count(b"\n")
            if len(blocks) == 1:
                first = blocks[0].split(b"\n", 1)[0]
                wanted = 2 * int(first) + 1 if first.isdigit() and len(first) < 8 else 0
        text = b"".join(blocks)
        entry.pieces = sparse_of_text(text, self._bad)

    def _check_map(self, entry: Entry) -> None:
        end = 0
        for offset, length in entry.pieces or ():
            if offset < end or length < 0 or offset + length > entry.real:
                raise self._bad(f"has a sparse file with a bad map (entry {self.count})")
            end = offset + length
        if not 0 <= entry.real < _SIZE_MOST or sum(length for _, length in entry.pieces or ()) != self._left:
            raise self._bad(f"has a sparse file whose map does not fit its data (entry {self.count})")


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:       # GNU's magic is `ustar  `, and it has other things there
        prefix = header[345:476] if header[508:512] == b"tar\0" else header[345:500]    # Schilling's star has times
        return prefix.split(b"\0", 1)[0] + b"/" + name
    return name
