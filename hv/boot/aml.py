"""A small encoder for ACPI Machine Language (ACPI 6.4, 20.2) and resource descriptors (6.4)."""

from __future__ import annotations

__all__ = ["argument", "device", "eisa_id", "if_equal", "integer", "interrupt", "io_ports", "irq", "memory32", "method",
           "name", "notify", "package", "resources", "scope", "string", "window_bus", "window_io", "window_memory"]

_ZERO, _ONE, _NAME, _BYTE, _WORD, _DWORD, _STRING, _QWORD = 0x00, 0x01, 0x08, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x10", b"\x11", b"\x12", b"\x5b\x82"
_METHOD, _ARG0, _NOTIFY, _LEQUAL, _IF = b"\x14", 0x68, b"\x86", b"\x93", b"\xa0"
_SERIALIZED = 1 << 3            # MethodFlags (20.2.5.2)


def integer(value: int) -> bytes:
    """ZeroOp, OneOp or the shortest constant (20.2.3)."""
    if value in (0, 1):
        return bytes((_ONE if value else _ZERO,))
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise OverflowError(value)


def string(text: str) -> bytes:
    """A NUL-terminated ASCII string."""
    return bytes((_STRING,)) + text.encode("ascii") + b"\0"


def path(text: str) -> bytes:
    """A NameString (20.2.2): `_HID`, `COM1`, `\\_SB_`; short segments are padded with underscores."""
    root, rest = (b"\\", text[1:]) if text.startswith("\\") else (b"", text)
    parts = [part.ljust(4, "_").encode("ascii") for part in rest.split(".")]
    prefix = b"" if len(parts) == 1 else b"\x2e" if len(parts) == 2 else bytes((0x2F, len(parts)))
    return root + prefix + b"".join(parts)


def name(text: str, value: bytes) -> bytes:
    """Name (text, value)."""
    return bytes((_NAME,)) + path(text) + value


def scope(text: str, *terms: bytes) -> bytes:
    """Scope (text) { terms }."""
    return _SCOPE + _sized(path(text) + b"".join(terms))


def device(text: str, *terms: bytes) -> bytes:
    """Device (text) { terms }."""
    return _DEVICE + _sized(path(text) + b"".join(terms))


def method(text: str, arguments: int, *terms: bytes) -> bytes:
    """Method (text, arguments, Serialized) { terms } (20.2.5.2)."""
    return _METHOD + _sized(path(text) + bytes((arguments | _SERIALIZED,)) + b"".join(terms))


def argument(number: int) -> bytes:
    """Arg0 to Arg6 (20.2.6.1)."""
    return bytes((_ARG0 + number,))


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """If (left == right) { terms } (20.2.5.3)."""
    return _IF + _sized(_LEQUAL + left + right + b"".join(terms))


def notify(text: str, value: int) -> bytes:
    """Notify (text, value) (20.2.5.3)."""
    return _NOTIFY + path(text) + integer(value)


def package(*items: bytes) -> bytes:
    """Package { items }."""
    return _PACKAGE + _sized(bytes((len(items),)) + b"".join(items))


def eisa_id(text: str) -> bytes:
    """EISAID ("PNP0501") as an integer (19.6.36)."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return bytes((_DWORD,)) + value.to_bytes(4, "big")


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }: a buffer that ends with an end tag without checksum."""
    data = b"".join(descriptors) + b"\x79\x00"
    return _BUFFER + _sized(integer(len(data)) + data)


def io_ports(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length)."""
    return b"\x47\x01" + base.to_bytes(2, "little") * 2 + bytes((1, length))


def irq(number: int) -> bytes:
    """IRQNoFlags () { number }: edge triggered, active high."""
    return b"\x22" + (1 << number).to_bytes(2, "little")


def interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared) { gsi } (6.4.3.6)."""
    return b"\x89\x06\x00\x0b\x01" + gsi.to_bytes(4, "little")


def memory32(base: int, length: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, length)."""
    return b"\x86\x09\x00\x01" + base.to_bytes(4, "little") + length.to_bytes(4, "little")


def window_bus(low: int, high: int) -> bytes:
    """WordBusNumber: what a bridge leads to, as the next two (6.4.3.5.3)."""
    return _window(b"\x88", 2, 2, 0, low, high)


def window_io(low: int, high: int) -> bytes:
    """WordIO (EntireRange): ports `low` to `high`."""
    return _window(b"\x88", 2, 1, 3, low, high)


def window_memory(low: int, high: int) -> bytes:
    """DWordMemory (NonCacheable, ReadWrite): addresses `low` to `high` (6.4.3.5.2)."""
    return _window(b"\x87", 4, 0, 1, low, high)


def _window(tag: bytes, width: int, kind: int, kind_flags: int, low: int, high: int) -> bytes:
    """An address space descriptor: producer, both ends fixed, positively decoded, no granularity, not translated."""
    numbers = b"".join(value.to_bytes(width, "little") for value in (0, low, high, 0, high - low + 1))
    body = bytes((kind, 0x0C, kind_flags)) + numbers
    return tag + len(body).to_bytes(2, "little") + body


def _sized(content: bytes) -> bytes:
    """PkgLength (20.2.4), which counts itself, and the content."""
    if len(content) + 1 < 0x40:
        return bytes((len(content) + 1,)) + content
    for more in (1, 2, 3):
        length = len(content) + 1 + more
        if length < 1 << 4 + 8 * more:
            return bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little") + content
    raise OverflowError(len(content))
