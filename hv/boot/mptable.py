"""The MP table: processors and interrupts for kernels without ACPI (Intel MultiProcessor Specification 1.4).

Driven by tests/unit/test_firmware.py.
"""

from __future__ import annotations

__all__ = ["write_mptable"]

from struct import pack

from hv.memory.layout import BDA_EBDA_SEGMENT, EBDA_START, IOAPIC, LAPIC, MP_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

SPEC_1_4 = 4
APIC_VERSION, IOAPIC_VERSION = 0x14, 0x11
ENABLED, BOOT_PROCESSOR = 1, 2
INT, NMI, EXTINT = 0, 1, 3
PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
PCI_BUS, ISA_BUS = 0, 1         # a PCI bus has its own number as id (MP 1.4, D.2)
ALL_APICS = 0xFF
LEVEL_LOW = 0xF                 # level triggered, active low (4.3.4), as PCI interrupts are


def write_mptable(memory: GuestMemory, cpus: int, pci: dict[int, int] | None = None) -> None:
    """The floating pointer and the table behind it, in the BIOS area, and the EBDA's segment in the BIOS data area.

    `pci` says which interrupt INTA of each slot of PCI bus 0 is wired to.
    """
    pci = pci or {}
    ioapic = cpus       # ids are shared with the processors', which have 0 to cpus - 1
    rows = [pack("<BBBBIIII", PROCESSOR, index, APIC_VERSION, ENABLED | (0 if index else BOOT_PROCESSOR),
                 0x600, 0x201, 0, 0) for index in range(cpus)]      # family 6; FPU and APIC on chip
    if pci:
        rows.append(pack("<BB6s", BUS, PCI_BUS, b"PCI   "))
    rows.append(pack("<BB6s", BUS, ISA_BUS, b"ISA   "))
    rows.append(pack("<BBBBI", IO_APIC, ioapic, IOAPIC_VERSION, ENABLED, IOAPIC))
    for irq in range(16):
        # 2 is the cascade; KVM wires all others to the pin of the same number, the PIT's too
        if irq != 2 and irq not in pci.values():
            rows.append(pack("<BBHBBBB", IO_INTERRUPT, INT, 0, ISA_BUS, irq, ioapic, irq))
    for slot, irq in pci.items():       # the source is the slot, and pin 0: INTA (D.3)
        rows.append(pack("<BBHBBBB", IO_INTERRUPT, INT, LEVEL_LOW, PCI_BUS, slot << 2, ioapic, irq))
    rows.append(pack("<BBHBBBB", LOCAL_INTERRUPT, EXTINT, 0, ISA_BUS, 0, ALL_APICS, 0))
    rows.append(pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, ISA_BUS, 0, ALL_APICS, 1))
    body = b"".join(rows)
    table = bytearray(pack("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), SPEC_1_4, 0, b"PYHV    ", b"PYHV PC     ",
                           0, 0, len(rows), LAPIC, 0, 0, 0) + body)
    table[7] = -sum(table) & 0xFF
    pointer = bytearray(pack("<4sIBBB5s", b"_MP_", MP_TABLE + 16, 1, SPEC_1_4, 0, b""))
    pointer[10] = -sum(pointer) & 0xFF
    memory.write(MP_TABLE, pointer + table)
    memory.put16(BDA_EBDA_SEGMENT, EBDA_START >> 4)
