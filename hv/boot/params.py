"""struct boot_params, the "zero page" (Documentation/arch/x86/boot.rst and zero-page.rst): what Linux is told."""

from __future__ import annotations

__all__ = ["default_header", "write_boot_params"]

from struct import pack, pack_into

from hv.boot.e820 import memory_map
from hv.memory.layout import BOOT_PARAMS, CMDLINE, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

# offsets in boot_params
RSDP, EXT_RAMDISK_IMAGE, EXT_RAMDISK_SIZE = 0x70, 0xC0, 0xC4
E820_ENTRIES, E820_TABLE, E820_MAX = 0x1E8, 0x2D0, 128
HEADER, HEADER_LENGTH, HEADER_END_BASE = 0x1F1, 0x201, 0x202
BOOT_FLAG, MAGIC, VERSION = 0x1FE, 0x202, 0x206
TYPE_OF_LOADER, LOADFLAGS, CODE32_START = 0x210, 0x211, 0x214
RAMDISK_IMAGE, RAMDISK_SIZE, CMD_LINE_PTR, INITRD_ADDR_MAX = 0x218, 0x21C, 0x228, 0x22C
KERNEL_ALIGNMENT, XLOADFLAGS, CMDLINE_SIZE = 0x230, 0x236, 0x238
PAYLOAD_OFFSET, PAYLOAD_LENGTH, PREF_ADDRESS, INIT_SIZE = 0x248, 0x24C, 0x258, 0x260

LOADER_UNDEFINED = 0xFF         # boot.rst: no id assigned to this loader
LOADED_HIGH = 1
XLF_KERNEL_64, XLF_ABOVE_4G = 1, 2
LINUX_CMDLINE_MAX = 2047        # COMMAND_LINE_SIZE - 1 (arch/x86/include/asm/setup.h)


def default_header() -> bytes:
    """A setup header for a vmlinux, which has none of its own."""
    page = bytearray(PAGE_SIZE)
    end = INIT_SIZE + 8
    pack_into("<H", page, BOOT_FLAG, 0xAA55)
    page[HEADER_LENGTH] = end - HEADER_END_BASE
    pack_into("<4sH", page, MAGIC, b"HdrS", 0x020F)
    pack_into("<I", page, INITRD_ADDR_MAX, 0x7FFFFFFF)
    pack_into("<I", page, KERNEL_ALIGNMENT, 0x1000000)
    pack_into("<H", page, XLOADFLAGS, XLF_KERNEL_64 | XLF_ABOVE_4G)
    pack_into("<I", page, CMDLINE_SIZE, LINUX_CMDLINE_MAX)
    return bytes(page[HEADER:end])


def write_boot_params(memory: GuestMemory, header: bytes, *, initrd: tuple[int, int], rsdp: int,
                      reserved: list[tuple[int, int]]) -> int:
    """Write the page; `initrd` is (gpa, bytes). The command line stands at CMDLINE already. Returns its address."""
    page = bytearray(PAGE_SIZE)
    page[HEADER:HEADER + len(header)] = header
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    page[LOADFLAGS] |= LOADED_HIGH
    gpa, size = initrd
    pack_into("<II", page, RAMDISK_IMAGE, gpa & 0xFFFFFFFF, size & 0xFFFFFFFF)
    pack_into("<II", page, EXT_RAMDISK_IMAGE, gpa >> 32, size >> 32)
    pack_into("<I", page, CMD_LINE_PTR, CMDLINE)
    pack_into("<Q", page, RSDP, rsdp)
    rows = memory_map(memory, reserved)[:E820_MAX]
    page[E820_ENTRIES] = len(rows)
    at = E820_TABLE
    for start, length, kind in rows:
        page[at:at + 20] = pack("<QQI", start, length, kind)
        at += 20
    memory.write(BOOT_PARAMS, page)
    return BOOT_PARAMS
