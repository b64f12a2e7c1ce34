"""The text in pax headers: records, numbers, maps of sparse files.

Sources: POSIX.1-2017 pax, "pax Extended Header"; GNU tar's manual, "Storing Sparse Files". Driven by
tests/unit/test_image_tarstream.py.
"""

from __future__ import annotations

__all__ = ["decimal", "nanoseconds", "parse_pax", "sparse_of_pax", "sparse_of_text"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Bad = Callable[[str], Exception]

_MAP_MOST = 65536
_DIGITS = 19                # 2**63 has as many
_FRACTION_MOST = 40         # digits; a global header's is read for each entry
_SECONDS_MOST = 1 << 40     # a file's times beyond this are no times


def parse_pax(text: bytes, bad: Bad) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n`. What stands twice counts the last time, but a sparse map's parts (GNU 0.0)."""
    records: dict[bytes, bytes] = {}
    offsets: list[bytes] = []
    at = 0
    while at < len(text):
        blank = text.find(b" ", at, at + 10)
        number = text[at:blank]
        if blank < 0 or not number.isdigit():
            raise bad("has a pax header with a bad length")
        end = at + int(number)
        equals = text.find(b"=", blank, end)
        if equals < 0 or end > len(text) or text[end - 1] != 0x0a or equals > end - 2:
            raise bad("has a pax header with a bad record")
        key, value = text[blank + 1:equals], text[equals + 1:end - 1]
        if b"\0" in value and not key.startswith(b"SCHILY.xattr."):
            raise bad(f"has a pax header with a zero byte in {key[:40]!r}")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            offsets.append(value)
            if len(offsets) % 2 != (key == b"GNU.sparse.offset"):
                raise bad("has a sparse file with a bad map")
        else:
            records[key] = value
        at = end
    if offsets:
        records[b"GNU.sparse.map"] = b",".join(offsets)
    return records


def decimal(text: bytes, key: bytes, bad: Bad) -> int:
    """A number of a record that takes none but natural ones."""
    if not text.isdigit() or len(text) > _DIGITS:
        raise bad(f"has a pax header whose {key.decode('ascii', 'replace')} is {text[:24]!r}")
    return int(text)


def nanoseconds(text: bytes, bad: Bad) -> int:
    """A time in seconds, with a fraction perhaps, and perhaps before 1970."""
    whole, _, fraction = text.removeprefix(b"-").partition(b".")
    if len(whole) > _DIGITS or len(fraction) > _FRACTION_MOST or not (whole + fraction).isdigit():
        raise bad(f"has a pax header whose time is {text[:24]!r}")
    total = min(int(whole or b"0"), _SECONDS_MOST) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -total if text.startswith(b"-") else total


def sparse_of_pax(pax: dict[bytes, bytes], bad: Bad) -> tuple[list[tuple[int, int]], int]:
    """The map and real size of GNU's forms 0.0 and 0.1."""
    numbers = pax[b"GNU.sparse.map"].split(b",")
    if len(numbers) % 2 or len(numbers) > 2 * _MAP_MOST:
        raise bad("has a sparse file with a bad map")
    real = decimal(pax.get(b"GNU.sparse.size", b""), b"GNU.sparse.size", bad)
    return _pairs(numbers, bad), real


def sparse_of_text(text: bytes, bad: Bad) -> list[tuple[int, int]]:
    """The map of form 1.0: how many pieces, then an offset and a length for each, a line each."""
    lines = text.split(b"\n")
    count = decimal(lines[0], b"sparse map", bad)
    if count > _MAP_MOST or len(lines) < 2 * count + 2:
        raise bad("has a sparse file with a bad map")
    return _pairs(lines[1:2 * count + 1], bad)


def _pairs(numbers: list[bytes], bad: Bad) -> list[tuple[int, int]]:
    values = [decimal(number, b"sparse map", bad) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))
