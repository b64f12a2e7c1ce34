"""Writing tar archives: ustar headers, with a pax header before them for what does not fit in.

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; SCHILY.xattr.* as GNU tar, Go and
libarchive write it. The same entries always give the same bytes. Driven by tests/unit/test_image_archive.py.
"""

from __future__ import annotations

__all__ = ["BLOCK", "END", "header", "padding"]

BLOCK = 512
END = bytes(2 * BLOCK)

_OCTAL_12, _OCTAL_8 = 8 ** 11, 8 ** 7       # what 11 and 7 octal digits don't hold


def header(name: bytes, size: int = 0, kind: bytes = b"0", mode: int = 0o644, uid: int = 0, gid: int = 0,
           mtime: int = 0, link: bytes = b"", device: tuple[int, int] = (0, 0),
           xattrs: dict[bytes, bytes] | None = None) -> bytes:
    """The header of an entry; `mtime` in nanoseconds."""
    records = [(b"SCHILY.xattr." + key, value) for key, value in sorted((xattrs or {}).items())]
    seconds, fraction = divmod(mtime, 1_000_000_000)
    if fraction or not 0 <= seconds < _OCTAL_12:
        records.append((b"mtime", _time(mtime)))
        seconds = min(max(seconds, 0), _OCTAL_12 - 1)
    if size >= _OCTAL_12:
        records.append((b"size", b"%d" % size))
    for key, value in ((b"uid", uid), (b"gid", gid)):
        if value >= _OCTAL_8:
            records.append((key, b"%d" % value))
    if len(link) > 100:
        records.append((b"linkpath", link))
    prefix, short = _split(name)
    if prefix is None:
        records.append((b"path", name))
    before = b""
    if records:
        text = b"".join(_record(key, value) for key, value in records)
        before = _block(b"pax", b"", len(text), b"x", 0o644, 0, 0, 0, b"", (0, 0)) + text + padding(len(text))
    return before + _block(short, prefix or b"", size if size < _OCTAL_12 else 0, kind, mode,
                           uid if uid < _OCTAL_8 else 0, gid if gid < _OCTAL_8 else 0, seconds, link[:100], device)


def padding(size: int) -> bytes:
    """The zeros that follow `size` bytes of data."""
    return bytes(-size % BLOCK)


def _block(name: bytes, prefix: bytes, size: int, kind: bytes, mode: int, uid: int, gid: int, mtime: int, link: bytes,
           device: tuple[int, int]) -> bytes:
    block = b"".join((
        name.ljust(100, b"\0"), b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, mtime), b" " * 8, kind,
        link.ljust(100, b"\0"), b"ustar\00000", bytes(64), b"%07o\0%07o\0" % device, prefix.ljust(155, b"\0"),
        bytes(12)))
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _split(name: bytes) -> tuple[bytes | None, bytes]:
    """ustar's prefix and name; None and the beginning of the name where it is too long for them."""
    if len(name) <= 100:
        return b"", name
    slash = name.find(b"/", len(name) - 101, 156)
    if 0 < slash <= 155 and len(name) - slash - 1 > 0:
        return name[:slash], name[slash + 1:]
    return None, name[:100]


def _record(key: bytes, value: bytes) -> bytes:
    """A pax record, whose length counts itself."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + len(str(len(body)))
    if len(str(length)) != len(str(len(body))):
        length = len(body) + len(str(length))
    return b"%d" % length + body


def _time(mtime: int) -> bytes:
    sign, mtime = (b"-", -mtime) if mtime < 0 else (b"", mtime)
    return sign + (b"%d.%09d" % divmod(mtime, 1_000_000_000)).rstrip(b"0").rstrip(b".")
