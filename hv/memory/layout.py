"""The guest-physical address map: every magic address, with the reason it is where it is.

              0 +--------------------------------+
                | real-mode vectors, BIOS data   |
        0x0_0500 +-------------------------------+
                | GDT, boot parameters, command  |  written by the loader, free once the kernel has copied it
                | line, page tables              |
        0x9_FC00 +-------------------------------+ EBDA: MP table
        0xA_0000 +-------------------------------+ VGA hole: reserved
        0xE_0000 +-------------------------------+ BIOS area: ACPI tables
        0xE_F000 +-------------------------------+ generation ID
       0x10_0000 +-------------------------------+ 1 MiB: kernels
                | RAM                            |
     0xC000_0000 +-------------------------------+ 3 GiB: MMIO hole (virtio, PCI, IOAPIC, LAPIC)
   0x1_0000_0000 +-------------------------------+ 4 GiB: the rest of RAM
"""

from __future__ import annotations

__all__ = [
    "ACPI_END",
    "ACPI_START",
    "BDA_EBDA_SEGMENT",
    "BOOT_GDT",
    "BOOT_PARAMS",
    "BOOT_STACK",
    "CMDLINE",
    "CMDLINE_MAX",
    "EBDA_START",
    "GENERATION_ID",
    "GENERATION_ID_SIZE",
    "HIGH_RAM_START",
    "IDENTITY_MAP",
    "IOAPIC",
    "KERNEL_START",
    "LAPIC",
    "LOW_RAM_END",
    "MIN_RAM",
    "MODULES_INFO",
    "MP_TABLE",
    "PAGE_SIZE",
    "PAGE_TABLES",
    "PAGE_TABLES_END",
    "PCI_WINDOW",
    "PCI_WINDOW_END",
    "PVH_INFO",
    "SOFTKVM_DOORBELL",
    "SOFTKVM_PAGES",
    "TSS",
    "VGA_HOLE",
    "VIRTIO_MMIO",
    "ram_ranges",
]

PAGE_SIZE = 0x1000

BDA_EBDA_SEGMENT = 0x40E    # BIOS data area: where the EBDA is, in 16-byte units
BOOT_GDT = 0x500            # five 8-byte descriptors, above the BIOS data area (0x400-0x4FF)
PVH_INFO = 0x6000           # hvm_start_info, memory map and module list (one page)
BOOT_PARAMS = 0x7000        # struct boot_params, the "zero page": 4 KiB
BOOT_STACK = 0x8FF0         # grows down from the end of the page after boot_params
PAGE_TABLES = 0x9000        # PML4, PDPT, 4 page directories: 6 pages map 4 GiB in 2 MiB steps
PAGE_TABLES_END = PAGE_TABLES + 6 * PAGE_SIZE
MODULES_INFO = 0x10000      # Multiboot information, memory map, module list: 64 KiB
CMDLINE = 0x20000           # at most CMDLINE_MAX bytes with the NUL
CMDLINE_MAX = 0x10000
SOFTKVM_PAGES = 0x9B000     # software-KVM help: system-call stub and page tables for it; reserved up to the EBDA
EBDA_START = 0x9FC00        # last KiB of conventional memory, reserved for firmware
VGA_HOLE = 0xA0000          # to 1 MiB: reserved in e820
ACPI_START = 0xE0000        # the RSDP is searched for in 0xE0000-0xFFFFF (ACPI 6.4, 5.2.5.1)
ACPI_END = 0xEF000
GENERATION_ID = 0xEF000     # a page of its own, which nobody maps uncached; 16 bytes of it
GENERATION_ID_SIZE = 16
MP_TABLE = 0xF0000          # kernels look for it in 0xF0000-0xFFFFF (MP 1.4, 4); 64 KiB hold 64 processors many times
KERNEL_START = 0x100000

LOW_RAM_END = 0xC0000000    # 3 GiB: room for 1 GiB of MMIO below 4 GiB
VIRTIO_MMIO = 0xD0000000    # a page for each virtio-mmio device
PCI_WINDOW = 0xD8000000     # BARs of PCI devices: 128 MiB
PCI_WINDOW_END = 0xE0000000
SOFTKVM_DOORBELL = 0xFEB00000   # no RAM and no device there: a store exits to user space
IOAPIC = 0xFEC00000         # fixed by the in-kernel irqchip (arch/x86/kvm/ioapic.h)
LAPIC = 0xFEE00000          # reset value of IA32_APIC_BASE (SDM 3A, 11.4.1)
IDENTITY_MAP = 0xFFFBC000   # KVM_SET_IDENTITY_MAP_ADDR: 1 page, Intel real-mode helper
TSS = 0xFFFBD000            # KVM_SET_TSS_ADDR: 3 pages after it, below the 256 KiB BIOS image
HIGH_RAM_START = 0x100000000

MIN_RAM = 2 * 1024 * 1024   # 1 MiB of legacy area and 1 MiB of room for a guest


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """(gpa, bytes) of each RAM range for `size` bytes of RAM: one, or two around the MMIO hole."""
    if size <= LOW_RAM_END:
        return [(0, size)]
    return [(0, LOW_RAM_END), (HIGH_RAM_START, size - LOW_RAM_END)]
