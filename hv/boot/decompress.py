"""The compressions a bzImage's payload may have, undone on the host with bounded output.

In the guest it would take minutes where KVM emulates ring 0, and is no faster on hardware. Formats: lib/decompress*.c
and scripts/Makefile.lib of Linux. Each decoder returns at most `size` + 1 bytes, so a payload that lies about its size
costs no more than it declared.
"""

from __future__ import annotations

__all__ = ["decompress", "expand", "method_of"]

from hv.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LZ4_LEGACY = b"\x02\x21\x4c\x18"
LZO_MAGIC = b"\x89LZO\0\r\n\x1a\n"
_MAGICS = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x5d\0\0", "lzma"),
           (LZO_MAGIC, "lzo"), (LZ4_LEGACY, "lz4"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x7fELF", "none"))
_LZ4_BLOCK = 8 << 20            # legacy frames hold blocks of at most 8 MiB (lib/decompress_unlz4.c)
_LZO_BLOCK = 256 << 10          # lib/decompress_unlzo.c, LZO_BLOCK_SIZE
_LZO_HAS_FILTER = 0x0800
_MEMORY_LIMIT = 1 << 30         # bytes a decoder may take for its dictionary


def method_of(data: bytes) -> str | None:
    """gzip, bzip2, xz, lzma, lzo, lz4, zstd or none, by magic number."""
    return next((method for magic, method in _MAGICS if data.startswith(magic)), None)


def decompress(data: bytes, size: int, name: str = "kernel") -> bytes:
    """The plain payload; it must be exactly `size` bytes. ImageError where it is not, or is damaged."""
    plain = expand(data, size, name)
    if len(plain) != size:
        more = "more than" if len(plain) > size else f"{len(plain)} bytes, not"
        raise ImageError(f"{name}: its {method_of(data)} payload decompresses to {more} the {size} bytes it declares",
                         "the image is damaged")
    return plain


def expand(data: bytes, most: int, name: str = "kernel") -> bytes:
    """The plain payload, of which `most` + 1 bytes at most. ImageError where it is damaged."""
    method = method_of(data)
    if method is None:
        raise ImageError(f"{name}: its payload is compressed in an unknown way ({data[:4].hex()})",
                         "boot the vmlinux itself")
    try:
        return _METHODS[method](data, most)
    except ImportError as error:
        raise ImageError(f"{name}: no decoder for {method}: {error}", "pip install pyhv again") from None
    except ImageError:
        raise
    except Exception as error:      # each library has its own error classes; all of them mean this
        raise ImageError(f"{name}: its {method} payload is damaged: {error}",
                         "it may be a download that failed") from None


def _gzip(data: bytes, size: int) -> bytes:
    import zlib

    return zlib.decompressobj(31).decompress(data, size + 1)


def _bzip2(data: bytes, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _xz(data: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY_LIMIT).decompress(data, size + 1)


def _lzma(data: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MEMORY_LIMIT).decompress(data, size + 1)


def _zstd(data: bytes, size: int) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT).stream_reader(data) as reader:
        return bytes(reader.read(size + 1))


def _lz4(data: bytes, size: int) -> bytes:
    from lz4.block import decompress as block

    blocks, total, at = [], 0, 4
    while at + 4 <= len(data) and total <= size:
        if data[at:at + 4] == LZ4_LEGACY:       # concatenated frames
            at += 4
            continue
        length = int.from_bytes(data[at:at + 4], "little")
        if not 0 < length <= len(data) - at - 4:
            break       # the appended size
        blocks.append(block(data[at + 4:at + 4 + length], uncompressed_size=_LZ4_BLOCK))
        total += len(blocks[-1])
        at += 4 + length
    return b"".join(blocks)


def _lzo(data: bytes, size: int) -> bytes:
    from lzallright import LZOCompressor

    blocks, total = [], 0
    at = _lzo_header(data)
    while at + 12 <= len(data) and total <= size:
        plain, packed = int.from_bytes(data[at:at + 4], "big"), int.from_bytes(data[at + 4:at + 8], "big")
        if not plain:
            break
        at += 12        # both lengths and the checksum
        if plain > _LZO_BLOCK or not 0 < packed <= plain or at + packed > len(data):
            raise ValueError(f"a block of {packed} bytes for {plain}")
        piece = data[at:at + packed]
        blocks.append(piece if packed == plain else LZOCompressor().decompress(piece, plain))
        if len(blocks[-1]) != plain:
            raise ValueError("a block of another length than announced")
        total += plain
        at += packed
    return b"".join(blocks)


def _lzo_header(data: bytes) -> int:
    """Where the blocks begin (lib/decompress_unlzo.c, parse_header)."""
    version = int.from_bytes(data[9:11], "big")
    late = version >= 0x0940
    at = 16 + late
    at += 8 if int.from_bytes(data[at:at + 4], "big") & _LZO_HAS_FILTER else 4
    at += 12 if late else 8                         # mode, time
    return at + 1 + (data[at] if at < len(data) else 0) + 4     # name, checksum


def _none(data: bytes, size: int) -> bytes:
    return data[:size]


_METHODS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "lzma": _lzma, "lzo": _lzo, "lz4": _lz4, "zstd": _zstd, "none": _none}
