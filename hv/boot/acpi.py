"""ACPI tables: what devices there are and how to power off (ACPI 6.4, chapter 5).

RSDP -> XSDT -> FADT (-> FACS, DSDT) and MADT, in the BIOS area. Ports and interrupts are those of
hv/machine/platform.py. Driven by tests/unit/test_firmware.py.

The generation ID (Microsoft, "Virtual Machine Generation ID"; drivers/virt/vmgenid.c) is 16 random bytes in a page of
its own, others after each boot and each restore; that it has changed a restored guest learns by an interrupt, for which
the Generic Event Device (5.6.9) evaluates _EVT. Driven by tests/unit/test_vmgenid.py.
"""

from __future__ import annotations

__all__ = ["write_tables"]

from posix import urandom
from struct import pack, pack_into

from hv.boot import aml
from hv.errors import ConfigError
from hv.memory.layout import ACPI_END, ACPI_START, GENERATION_ID, GENERATION_ID_SIZE, IOAPIC, LAPIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

OEM = b"PYHV  "
TABLE_ID = b"PYHVPC  "
CREATOR = b"PYHV"

PM1_EVENT, PM1_CONTROL, PM_TIMER, SCI = 0x600, 0x604, 0x608, 9
GENERATION_GSI = 3              # hv/machine/platform.py: no COM2, nobody else's
CHANGED = 0x80                  # the generation ID's notification, a device's own (5.6.6)
RESET_PORT, RESET_VALUE = 0xCF9, 6
SOFT_OFF = 5                    # SLP_TYP of S5, as hv/devices/legacy/acpi_pm.py has it

# FADT flags (5.2.9, table 5.10) and boot architecture flags (table 5.11)
WBINVD, PROC_C1, SLP_BUTTON, TMR_VAL_EXT, RESET_REG_SUP = 1, 1 << 2, 1 << 5, 1 << 8, 1 << 10
LEGACY_DEVICES, VGA_NOT_PRESENT = 1, 1 << 2     # and no 8042: Linux skips its half-second probe then
PCAT_COMPAT = 1                 # MADT: there is an 8259 pair too
LEVEL_HIGH = 0xD                # MPS INTI flags (table 5.26): level triggered, active high


def write_tables(memory: GuestMemory, cpus: int, devices: bytes = b"") -> int:
    """Write all tables; the RSDP's address. `devices` is AML put into the \\_SB scope."""
    at = ACPI_START + 0x40
    facs = at
    memory.write(facs, pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2))
    at += 64
    places: list[int] = []
    for table in (_dsdt(devices), None, _madt(cpus)):
        data = _fadt(facs, places[0]) if table is None else table
        if at + len(data) + 64 > ACPI_END:
            raise ConfigError("the ACPI tables outgrow the BIOS area", "use fewer devices")
        memory.write(at, data)
        places.append(at)
        at += len(data) + 15 & ~15
    memory.write(at, _table(b"XSDT", 1, pack("<QQ", places[1], places[2])))
    rsdp = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM, 2, 0, 36, at, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF        # the checksum of ACPI 1.0 covers 20 bytes
    rsdp[32] = -sum(rsdp) & 0xFF
    memory.write(ACPI_START, rsdp)
    memory.write(GENERATION_ID, urandom(GENERATION_ID_SIZE))
    return ACPI_START


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """The header that all tables share (5.2.6), and `body`."""
    header = pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM, TABLE_ID, 1, CREATOR, 1)
    data = bytearray(header + body)
    data[9] = -sum(data) & 0xFF
    return bytes(data)


def _dsdt(devices: bytes) -> bytes:
    power = aml.name("\\_S5", aml.package(*[aml.integer(SOFT_OFF)] * 2, aml.integer(0), aml.integer(0)))
    serial = aml.device("COM1", aml.name("_HID", aml.eisa_id("PNP0501")), aml.name("_UID", aml.integer(1)),
                        aml.name("_CRS", aml.resources(aml.io_ports(0x3F8, 8), aml.irq(4))))
    clock = aml.device("RTC", aml.name("_HID", aml.eisa_id("PNP0B00")),
                       aml.name("_CRS", aml.resources(aml.io_ports(0x70, 2), aml.irq(8))))
    return _table(b"DSDT", 2, power + aml.scope("\\_SB", serial, clock, _generation_id(), devices))


def _generation_id() -> bytes:
    """Where the generation ID is, and the event of its change. Its _HID is the vendor's, by _CID it is found."""
    kind, gsi = aml.string("VM_Gen_Counter"), aml.integer(GENERATION_GSI)
    return aml.device(
        "VGEN", aml.name("_HID", aml.string("PYHV0001")), aml.name("_CID", kind), aml.name("_DDN", kind),
        aml.name("ADDR", aml.package(aml.integer(GENERATION_ID), aml.integer(0)))) + aml.device(
        "GED0", aml.name("_HID", aml.string("ACPI0013")), aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.interrupt(GENERATION_GSI))),
        aml.method("_EVT", 1, aml.if_equal(aml.argument(0), gsi, aml.notify("VGEN", CHANGED))))


def _fadt(facs: int, dsdt: int) -> bytes:
    body = bytearray(276 - 36)

    def put(layout: str, offset: int, *values: int) -> None:
        pack_into("<" + layout, body, offset - 36, *values)

    put("II", 36, facs, dsdt)
    put("H", 46, SCI)
    put("I", 56, PM1_EVENT)
    put("I", 64, PM1_CONTROL)
    put("I", 76, PM_TIMER)
    put("BBBB", 88, 4, 2, 0, 4)             # PM1_EVT_LEN, PM1_CNT_LEN, PM2_CNT_LEN, PM_TMR_LEN
    put("HH", 96, 0xFFF, 0xFFF)             # no C2, no C3: latencies beyond what is allowed
    put("B", 108, 0x32)                     # CENTURY: where hv/devices/legacy/rtc.py keeps it
    put("H", 109, LEGACY_DEVICES | VGA_NOT_PRESENT)
    put("I", 112, WBINVD | PROC_C1 | SLP_BUTTON | TMR_VAL_EXT | RESET_REG_SUP)
    put("BBBBQB", 116, 1, 8, 0, 1, RESET_PORT, RESET_VALUE)
    put("QQ", 132, 0, dsdt)                 # X_FIRMWARE_CTRL stays 0 where FIRMWARE_CTRL is used (5.2.9)
    put("BBBBQ", 148, 1, 32, 0, 2, PM1_EVENT)       # generic addresses: I/O space, width, offset, access size
    put("BBBBQ", 172, 1, 16, 0, 2, PM1_CONTROL)
    put("BBBBQ", 208, 1, 32, 0, 3, PM_TIMER)
    return _table(b"FACP", 6, bytes(body))


def _madt(cpus: int) -> bytes:
    body = pack("<II", LAPIC, PCAT_COMPAT)
    body += b"".join(pack("<BBBBI", 0, 8, index, index, 1) for index in range(cpus))
    body += pack("<BBBBII", 1, 12, 0, 0, IOAPIC, 0)
    # No override for interrupt 0: KVM wires its PIT to pin 0 (arch/x86/kvm/irq_comm.c, default_routing).
    body += pack("<BBBBIH", 2, 10, 0, SCI, SCI, LEVEL_HIGH)
    body += pack("<BBBHB", 4, 6, 0xFF, 0, 1)                    # NMI on LINT1 of every processor
    return _table(b"APIC", 5, body)
