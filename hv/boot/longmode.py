"""What a kernel entered in protected or long mode finds: a flat GDT and, for long mode, an identity map.

Sources: Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL" (selectors 0x10 and 0x18); SDM 3A, 3.4.5
(descriptors) and 4.5 (4-level paging).
"""

from __future__ import annotations

__all__ = ["write_gdt", "write_identity_map"]

from struct import pack

from hv.memory.layout import BOOT_GDT, PAGE_SIZE, PAGE_TABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

CODE64 = 0x00AF9B000000FFFF     # execute, read; G, L; limit 4 GiB
CODE32 = 0x00CF9B000000FFFF     # the same with D instead of L
DATA = 0x00CF93000000FFFF       # read, write; G, B
TSS = 0x00008B0000000067        # busy 32-bit TSS, 104 bytes, never used

PRESENT, WRITABLE, LARGE = 1, 2, 1 << 7
LARGE_PAGE = 2 << 20
DIRECTORIES = 4                 # each maps 1 GiB


def write_gdt(memory: GuestMemory, *, long_mode: bool) -> None:
    """Five descriptors at BOOT_GDT: two null, code (0x10), data (0x18), TSS (0x20)."""
    memory.write(BOOT_GDT, pack("<5Q", 0, 0, CODE64 if long_mode else CODE32, DATA, TSS))


def write_identity_map(memory: GuestMemory) -> None:
    """PML4, one PDPT and four page directories at PAGE_TABLES: the first 4 GiB in 2 MiB pages."""
    flags = PRESENT | WRITABLE
    pdpt, directory = PAGE_TABLES + PAGE_SIZE, PAGE_TABLES + 2 * PAGE_SIZE
    memory.write(PAGE_TABLES, pack("<Q4088x4Q4064x", pdpt | flags,
                                   *(directory + i * PAGE_SIZE | flags for i in range(DIRECTORIES))))
    pages = DIRECTORIES * 512
    memory.write(directory, pack(f"<{pages}Q", *range(flags | LARGE, pages * LARGE_PAGE, LARGE_PAGE)))
