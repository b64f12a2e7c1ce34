"""bzImage: the setup header, and the kernel proper inside (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

__all__ = ["payload_of", "setup_header"]

from hv.boot import params
from hv.boot.decompress import decompress
from hv.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

MIN_VERSION = 0x020C            # 2.12 (Linux 3.8) says whether there is a 64-bit entry point
XLF_KERNEL_64 = 1 << 0
SECTOR = 512
DEFAULT_SETUP_SECTORS = 4       # "for backwards compatibility, if setup_sects is 0, the real value is 4"
PAYLOAD_MAX = 1 << 30           # bytes of decompressed kernel; a distribution's has 60 MiB


def setup_header(image: bytes | mmap, name: str) -> bytes:
    """The setup header, from offset 0x1f1 to its end. ImageError for kernels that can't be entered in 64-bit mode."""
    end = params.HEADER_END_BASE + image[params.HEADER_LENGTH] if len(image) > params.HEADER_LENGTH else 0
    header = bytes(image[params.HEADER:end])
    if end < params.INIT_SIZE + 4 or len(header) != end - params.HEADER:
        raise ImageError(f"{name}: its setup header is cut off", "it may be a download that failed")
    version = _field(header, params.VERSION, 2)
    if version < MIN_VERSION:
        raise ImageError(f"{name}: boot protocol {version >> 8}.{version & 0xFF:02}, pyhv needs 2.12 (Linux 3.8)",
                         "use a newer kernel")
    if not _field(header, params.XLOADFLAGS, 2) & XLF_KERNEL_64:
        raise ImageError(f"{name}: a 32-bit kernel", "pyhv enters Linux in 64-bit mode; use an x86-64 kernel")
    return header


def payload_of(image: bytes | mmap, header: bytes, name: str) -> bytes:
    """The decompressed payload: an ELF vmlinux, perhaps with relocations behind it."""
    sectors = header[0] or DEFAULT_SETUP_SECTORS
    start = (sectors + 1) * SECTOR + _field(header, params.PAYLOAD_OFFSET, 4)
    length = _field(header, params.PAYLOAD_LENGTH, 4)
    if length < 8 or start + length > len(image):
        raise ImageError(f"{name}: its payload of {length} bytes at {start:#x} reaches beyond the file",
                         "it may be a download that failed")
    packed = bytes(image[start:start + length])
    # The build appends the plain size, little-endian; gzip ends with it anyway (scripts/Makefile.lib, size_append).
    size = int.from_bytes(packed[-4:], "little")
    # init_size covers the plain payload as well: the kernel's own decompressor unpacks it in place. 0: not told.
    most = min(_field(header, params.INIT_SIZE, 4) or PAYLOAD_MAX, PAYLOAD_MAX)
    if not 0 < size <= most:
        raise ImageError(f"{name}: its payload claims to be {size} bytes, at most {most} are possible",
                         "the image is damaged")
    return decompress(packed, size, name)


def _field(header: bytes, offset: int, size: int) -> int:
    at = offset - params.HEADER
    return int.from_bytes(header[at:at + size], "little")
