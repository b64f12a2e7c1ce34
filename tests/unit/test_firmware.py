"""ACPI and MP tables as a kernel would walk them."""

from __future__ import annotations

import shutil
import subprocess
import types

import pytest

from hv.boot import aml
from hv.boot.acpi import write_tables
from hv.boot.mptable import write_mptable
from hv.machine.attach_pci import finish_pci
from hv.memory.guest import GuestMemory
from hv.memory.layout import ACPI_END, ACPI_START, GENERATION_ID, MP_TABLE


@pytest.fixture
def memory():
    ram = GuestMemory(16 << 20)
    yield ram
    ram.close()


def table(memory, gpa):
    data = memory.read(gpa, memory.u32(gpa + 4))
    assert sum(data) & 0xFF == 0, data[:4]
    return data


def tables(memory, cpus):
    rsdp = write_tables(memory, cpus)
    root = memory.read(rsdp, 36)
    assert root[:8] == b"RSD PTR " and sum(root[:20]) & 0xFF == 0 and sum(root) & 0xFF == 0
    xsdt = table(memory, int.from_bytes(root[24:32], "little"))
    found = {}
    for at in range(36, len(xsdt), 8):
        entry = table(memory, int.from_bytes(xsdt[at:at + 8], "little"))
        found[entry[:4]] = entry
    found[b"DSDT"] = table(memory, int.from_bytes(found[b"FACP"][140:148], "little"))
    facs = int.from_bytes(found[b"FACP"][36:40], "little")
    assert memory.read(facs, 4) == b"FACS" and facs % 64 == 0
    return found


@pytest.mark.parametrize("cpus", [1, 4, 64])
def test_acpi_lists_every_processor_and_one_ioapic(memory, cpus):
    madt = tables(memory, cpus)[b"APIC"]
    at, seen = 44, []
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        seen.append((kind, madt[at:at + length]))
        at += length
    assert [row[3] for kind, row in seen if kind == 0] == list(range(cpus))
    assert sum(kind == 1 for kind, _ in seen) == 1
    overrides = {row[3]: int.from_bytes(row[4:8], "little") for kind, row in seen if kind == 2}
    assert overrides == {9: 9}        # the PIT is where KVM wires it, on pin 0
    assert memory.read(GENERATION_ID + 16, 16) == bytes(16) and ACPI_END == GENERATION_ID


def test_fadt_names_the_ports_of_the_platform(memory):
    fadt = tables(memory, 1)[b"FACP"]
    assert len(fadt) == 276
    assert int.from_bytes(fadt[64:68], "little") == 0x604
    assert int.from_bytes(fadt[120:128], "little") == 0xCF9 and fadt[128] == 6
    assert int.from_bytes(fadt[109:111], "little") & 2 == 0     # no 8042


def test_dsdt_has_s5_and_the_serial_port(memory):
    dsdt = tables(memory, 1)[b"DSDT"]
    assert b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" in dsdt
    assert b"COM1" in dsdt and b"\x47\x01\xf8\x03\xf8\x03\x01\x08\x22\x10\x00\x79" in dsdt


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed (package acpica-tools)")
def test_iasl_understands_the_dsdt(memory, tmp_path):
    file = tmp_path / "dsdt.aml"
    file.write_bytes(tables(memory, 2)[b"DSDT"])
    done = subprocess.run(["iasl", "-d", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "dsdt.dsl").read_text()
    assert "PNP0501" in text and "_S5" in text


def test_aml_lengths_grow_by_bytes():
    for size in (1, 61, 62, 63, 64, 4000, 5000, 70000):
        device = aml.device("DEV0", bytes(size))
        lead = device[2] >> 6
        length = device[2] & 0x3F if not lead else device[2] & 0xF | int.from_bytes(device[3:3 + lead], "little") << 4
        assert length == len(device) - 2
    assert aml.integer(0x1234) == b"\x0b\x34\x12" and aml.integer(1 << 40)[0] == 0x0E
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"
    assert aml.memory32(0xD0000000, 0x200)[:4] == b"\x86\x09\x00\x01"


@pytest.mark.parametrize("cpus", [1, 3, 64])
def test_mp_table_is_found_and_sums_to_zero(memory, cpus):
    write_mptable(memory, cpus)
    pointer = memory.read(MP_TABLE, 16)
    assert pointer[:4] == b"_MP_" and sum(pointer) & 0xFF == 0
    start = int.from_bytes(pointer[4:8], "little")
    data = memory.read(start, memory.u16(start + 4))
    assert data[:4] == b"PCMP" and sum(data) & 0xFF == 0
    at, kinds, apics = 44, [], []
    while at < len(data):
        kinds.append(data[at])
        if data[at] == 0:
            apics.append(data[at + 1])
        at += 20 if data[at] == 0 else 8
    assert apics == list(range(cpus)) and len(kinds) == memory.u16(start + 34)
    assert kinds.count(2) == 1 and kinds.count(4) == 2
    assert memory.u16(0x40E) == 0x9FC0
    assert ACPI_START < MP_TABLE


SLOTS = {1: 5, 2: 6, 31: 15}


class Root:
    """What finish_pci asks of the PCI bus."""

    interrupts = SLOTS

    def level_triggered(self) -> None:
        pass


def test_the_mp_table_wires_pci_slots(memory):
    write_mptable(memory, 1, SLOTS)
    start = int.from_bytes(memory.read(MP_TABLE, 16)[4:8], "little")
    data = memory.read(start, memory.u16(start + 4))
    rows = [data[at:at + 8] for at in range(44 + 20, len(data), 8)]
    buses = {row[1]: row[2:8] for row in rows if row[0] == 1}
    assert buses == {0: b"PCI   ", 1: b"ISA   "}
    wired = {row[5] >> 2: row[7] for row in rows if row[0] == 3 and row[4] == 0}
    assert wired == SLOTS and all(row[2] == 0xF for row in rows if row[0] == 3 and row[4] == 0)
    # a pin has one source: the ISA interrupts of these are gone
    assert sorted(row[5] for row in rows if row[0] == 3 and row[4] == 1) == [0, 1, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed (package acpica-tools)")
def test_iasl_understands_the_host_bridge(memory, tmp_path):
    root = types.SimpleNamespace(pci=Root())
    file = tmp_path / "dsdt.aml"
    rsdp = write_tables(memory, 1, finish_pci(root))        # type: ignore[arg-type]
    xsdt = int.from_bytes(memory.read(rsdp + 24, 8), "little")
    fadt = int.from_bytes(memory.read(xsdt + 36, 8), "little")
    file.write_bytes(table(memory, int.from_bytes(memory.read(fadt + 140, 8), "little")))
    done = subprocess.run(["iasl", "-d", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "dsdt.dsl").read_text()
    bridge = " ".join(text[text.index("Device (PCI0)"):].split())
    for piece in ('EisaId ("PNP0A03")', "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode", "0x001FFFFF",
                  "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite", "0xD8000000",
                  "0xDFFFFFFF", "0x08000000", "0x0CF7"):
        assert piece in bridge, bridge
    again = subprocess.run(["iasl", str(tmp_path / "dsdt.dsl")], capture_output=True, text=True, timeout=60,
                           check=False)
    assert " 0 Errors" in again.stdout, again.stdout
