"""The generation ID: what ACPI tells of it, where it is, and that it changes."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from hv.boot import aml
from hv.boot.acpi import GENERATION_GSI, write_tables
from hv.boot.e820 import RAM, memory_map
from hv.kvm.abi_chips import IrqchipState
from hv.machine import attach, platform
from hv.memory.guest import GuestMemory
from hv.memory.layout import ACPI_START, GENERATION_ID
from hv.snapshot.vmgenid import renew


@pytest.fixture
def memory():
    ram = GuestMemory(16 << 20)
    yield ram
    ram.close()


def dsdt(memory):
    write_tables(memory, 1)
    data = memory.read(ACPI_START, 0x2000)
    at = data.index(b"DSDT")
    return data[at:at + int.from_bytes(data[at + 4:at + 8], "little")]


def test_its_page_is_not_the_guests_ram(memory):
    assert GENERATION_ID % 0x1000 == 0
    for start, size, kind in memory_map(memory, []):
        assert kind != RAM or start + size <= GENERATION_ID or start >= GENERATION_ID + 0x1000


def test_each_boot_has_another(memory):
    seen = set()
    for _ in range(3):
        write_tables(memory, 1)
        seen.add(bytes(memory.read(GENERATION_ID, 16)))
    assert len(seen) == 3 and bytes(16) not in seen
    assert memory.read(GENERATION_ID + 16, 0x1000 - 16) == bytes(0x1000 - 16)


def test_its_interrupt_is_its_own():
    fixed = {platform.COM1_GSI, platform.SCI_GSI, 0, 1, 2, 8}
    assert GENERATION_GSI == platform.GENERATION_GSI
    assert GENERATION_GSI not in fixed | set(attach.GSIS_ACPI)


def test_what_the_method_is_made_of():
    assert aml.argument(0) == b"\x68"
    assert aml.notify("VGEN", 0x80) == b"\x86VGEN\x0a\x80"
    assert aml.if_equal(aml.argument(0), aml.integer(3), aml.notify("VGEN", 0x80)) == \
        b"\xa0\x0c\x93\x68\x0a\x03\x86VGEN\x0a\x80"
    assert aml.method("_EVT", 1, b"\xa3") == b"\x14\x07_EVT\x09\xa3"


def test_the_table_names_the_page(memory):
    data = dsdt(memory)
    assert b"\x08ADDR\x12\x08\x02\x0c" + GENERATION_ID.to_bytes(4, "little") + b"\x00" in data
    assert b"\x08_CID\x0dVM_Gen_Counter\x00" in data and b"\x08_HID\x0dACPI0013\x00" in data


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed (package acpica-tools)")
def test_iasl_reads_it_and_compiles_it_again(memory, tmp_path):
    file = tmp_path / "dsdt.aml"
    file.write_bytes(dsdt(memory))
    done = subprocess.run(["iasl", "-d", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join((tmp_path / "dsdt.dsl").read_text().split())
    assert 'Name (_CID, "VM_Gen_Counter")' in text
    assert "Name (ADDR, Package (0x02) { 0x000EF000, Zero })" in text
    assert "Method (_EVT, 1, Serialized)" in text
    assert "If ((Arg0 == 0x03)) { Notify (VGEN, 0x80)" in text
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared, ,, ) { 0x00000003, }" in text
    done = subprocess.run(["iasl", tmp_path / "dsdt.dsl"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and " 0 Errors, 0 Warnings" in done.stdout, done.stdout + done.stderr


def machine_with(memory, entry=0x31):
    """`entry`: what the guest wrote into the IOAPIC for that pin (82093AA, 3.2.4; struct kvm_ioapic_state)."""
    lines = []
    chip = IrqchipState(chip_id=2)
    chip.chip[24:24 + 24 * 8] = b"".join((entry if pin == GENERATION_GSI else 1 << 16).to_bytes(8, "little")
                                         for pin in range(24))
    vm = SimpleNamespace(irq_line=lambda gsi, level: lines.append((gsi, level)), get_irqchip=lambda number: chip)
    return SimpleNamespace(memory=memory, at_start=[], vm=vm), lines


def test_a_restored_machine_gets_another_and_an_edge(memory):
    write_tables(memory, 1)
    before = bytes(memory.read(GENERATION_ID, 16))
    machine, lines = machine_with(memory)
    assert renew(machine) and memory.read(GENERATION_ID, 16) != before
    assert not lines            # not before it starts
    machine.at_start[0]()
    assert lines == [(GENERATION_GSI, True), (GENERATION_GSI, False)]


def test_a_guest_that_does_not_listen_gets_no_interrupt(memory):
    """One that uses the PIC would take it for another's."""
    write_tables(memory, 1)
    before = bytes(memory.read(GENERATION_ID, 16))
    machine, _ = machine_with(memory, entry=1 << 16)
    assert renew(machine) and memory.read(GENERATION_ID, 16) != before and not machine.at_start


def test_a_machine_without_tables_is_left_alone(memory):
    machine, lines = machine_with(memory)
    assert not renew(machine)
    assert memory.read(GENERATION_ID, 16) == bytes(16) and not machine.at_start and not lines
