"""Recognising kernel images by their first bytes."""

from __future__ import annotations

__all__ = ["BZIMAGE", "ELF", "FLAT", "MULTIBOOT", "sniff"]

from hv.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    Image = bytes | mmap

BZIMAGE, ELF, MULTIBOOT, FLAT = "bzImage", "ELF", "Multiboot", "flat"

ELF_MAGIC = b"\x7fELF"
BOOT_FLAG = b"\x55\xaa"             # at 0x1fe: boot sectors and bzImages alike
HEADER_MAGIC = b"HdrS"              # at 0x202 (Documentation/arch/x86/boot.rst)
ARM64_MAGIC = b"ARM\x64"            # at 0x38 (Documentation/arm64/booting.rst)
RISCV_MAGIC = b"RSC\x05"            # at 0x38 (Documentation/riscv/boot-image-header.rst)
MULTIBOOT_MAGIC = (0x1BADB002).to_bytes(4, "little")
MULTIBOOT_SEARCH = 8192             # the header lies within the first 8 KiB (Multiboot 0.6.96, 3.1)
FLAT_MAX = 0x9FC00 - 0x7C00         # conventional memory above the boot sector's address

_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"),
               (b"\x02\x21\x4c\x18", "lz4"), (b"\x04\x22\x4d\x18", "lz4"), (b"\x89LZO", "lzo"))


def sniff(image: Image, name: str = "kernel") -> str:
    """BZIMAGE, ELF, MULTIBOOT or FLAT. ImageError says what a foreign file looks like."""
    head = image[:0x210]
    if head[:4] == ELF_MAGIC:
        # An ELF file may carry a Multiboot header too; a 64-bit one is not for Multiboot loaders.
        return MULTIBOOT if head[4:5] == b"\x01" and multiboot_header(image) is not None else ELF
    if head[0x202:0x206] == HEADER_MAGIC and head[0x1FE:0x200] == BOOT_FLAG:
        return BZIMAGE
    if multiboot_header(image) is not None:
        return MULTIBOOT
    for magic, method in _COMPRESSED:
        if head.startswith(magic):
            raise ImageError(f"{name}: a {method} file, not a kernel image", "decompress it first")
    if head[0x38:0x3C] in (ARM64_MAGIC, RISCV_MAGIC):
        raise ImageError(f"{name}: a kernel for another processor architecture", "pyhv runs x86-64 guests")
    if head[0x1FE:0x200] == BOOT_FLAG:
        if len(image) <= FLAT_MAX:
            return FLAT
        raise ImageError(f"{name}: a boot sector with {len(image)} bytes, a disk image or a kernel older than bzImage",
                         f"real-mode images have at most {FLAT_MAX} bytes; take the kernel out of a disk image")
    raise ImageError(f"{name}: not a bzImage, ELF, Multiboot or boot-sector image",
                     "--boot-protocol flat runs a small file as real-mode code")


def multiboot_header(image: Image) -> int | None:
    """The offset of a valid Multiboot 1 header, None where there is none."""
    head = image[:MULTIBOOT_SEARCH]
    at = head.find(MULTIBOOT_MAGIC)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(head):
            words = [int.from_bytes(head[at + i:at + i + 4], "little") for i in (0, 4, 8)]
            if sum(words) & 0xFFFFFFFF == 0:
                return at
        at = head.find(MULTIBOOT_MAGIC, at + 1)
    return None
