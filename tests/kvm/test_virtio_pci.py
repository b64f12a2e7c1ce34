"""virtio-pci with the real KVM: messages and notifications by event descriptors, and Linux finding its devices."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import needs_kvm

from hv import Machine, MachineConfig
from hv.devices.pci.host import DATA
from hv.devices.pci.msix import ENABLE, ENTRY
from hv.devices.virtio import pci
from hv.devices.virtio.balloon import BalloonConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.console_config import ConsoleConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.pci import VirtioPci
from hv.devices.virtio.rng import RngConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.memory.layout import PCI_WINDOW

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

VECTOR = 0x41
SPIV, IRR = 0xF0, 0x200         # local APIC registers (SDM 3A, 11.4.1)


def transport_of(machine: Machine, name: str) -> VirtioPci:
    transport = machine.devices[name].interrupts
    assert isinstance(transport, VirtioPci)
    return transport


def put(machine: Machine, slot: int, register: int, size: int, value: int) -> None:
    machine.pio.write(0xCF8, 4, 0x80000000 | slot << 11 | register & 0xFC)
    machine.pio.write(0xCFC + (register & 3), size, value)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with two devices that never starts; its processor's local APIC takes interrupts."""
    with Machine(MachineConfig(devices=(RngConfig(), RngConfig()), transport="pci")) as made:
        apic = made.vcpus[0].fd.get("LAPIC")
        apic.regs[SPIV:SPIV + 4] = (0x1FF).to_bytes(4, "little")
        made.vcpus[0].fd.set("LAPIC", apic)
        yield made


def requested(machine: Machine, wait: float) -> bool:
    """Whether VECTOR is requested at the local APIC before `wait` seconds have passed."""
    end = time.monotonic() + wait
    at, bit = IRR + VECTOR // 32 * 16 + VECTOR % 32 // 8, 1 << VECTOR % 8
    while not machine.vcpus[0].fd.get("LAPIC").regs[at] & bit:
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_a_message_reaches_the_local_apic_when_nothing_masks_it(machine: Machine) -> None:
    transport = transport_of(machine, "rng0")
    put(machine, 1, 4, 2, 6)
    put(machine, 1, transport._msix_at + 2, 2, ENABLE)
    machine.mmio.write(PCI_WINDOW + pci.QUEUE_MSIX_VECTOR, 2, 1)
    fd = transport.queue_fd(0)
    assert fd is not None
    os.eventfd_write(fd, 1)                 # by anybody: a back end outside, say
    table = PCI_WINDOW + pci.TABLE + ENTRY
    for field, value in enumerate((0xFEE00000, 0, VECTOR)):
        machine.mmio.write(table + 4 * field, 4, value)
    assert not requested(machine, 0.05) and machine.mmio.read(PCI_WINDOW + pci.PENDING, 8) == 2
    machine.mmio.write(table + 12, 4, 0)
    assert requested(machine, 2) and machine.mmio.read(PCI_WINDOW + pci.PENDING, 8) == 0


def test_a_message_is_sent_by_the_device(machine: Machine) -> None:
    transport = transport_of(machine, "rng1")
    put(machine, 2, 4, 2, 6)
    put(machine, 2, transport._msix_at + 2, 2, ENABLE)
    base = PCI_WINDOW + pci.BAR_SIZE
    machine.mmio.write(base + pci.CONFIG_MSIX_VECTOR, 2, 0)
    machine.mmio.write(base + pci.TABLE, 8, 0xFEE00000)
    machine.mmio.write(base + pci.TABLE + 8, 8, VECTOR)
    assert not requested(machine, 0.05)
    transport.config_changed()
    assert requested(machine, 2)


def test_pins_are_shared_and_level_triggered(machine: Machine) -> None:
    assert machine.pci is not None
    gsi = machine.pci.interrupts[1]
    pins = [machine.pci.pin(1), machine.pci.pin(9)]
    machine.pci.interrupts[9] = gsi

    def level() -> bool:
        return bool(machine.vm.get_irqchip(0).chip[1] >> gsi & 1)      # struct kvm_pic_state: irr, follows a level

    for pin, on, expected in ((0, True, True), (1, True, True), (0, False, True), (1, False, False)):
        pins[pin](on)
        assert level() is expected


def test_hostile_moves_of_a_bar_leave_the_machine_whole(machine: Machine) -> None:
    for place in (0, 0x100000, 0xD0000000, 0xFEB00000, 0xFEC00000, 0xFEE00000, 0xFFFF8000, PCI_WINDOW + pci.BAR_SIZE,
                  PCI_WINDOW + 0x100000, PCI_WINDOW):
        for command in (2, 0, 6):
            put(machine, 1, 4, 2, command)
            put(machine, 1, 0x10, 4, place)
            put(machine, 2, 4, 2, command)
    assert {base for base, _, device in machine.mmio.devices if isinstance(device, VirtioPci)} \
        == {PCI_WINDOW, PCI_WINDOW + pci.BAR_SIZE}
    assert machine.pio.read(0xCFC, 4) != 0 and DATA == 4


class Counted:
    """How often the registers of a device were read or written by exits."""

    def __init__(self, transport: VirtioPci) -> None:
        self.count = 0
        for name in ("read", "write"):
            setattr(transport, name, self._counted(getattr(transport, name)))

    def _counted(self, method):
        def call(*arguments: int):
            self.count += 1
            return method(*arguments)
        return call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk, and a folder to share; sockets and files of the other devices go there too."""
    folder = tmp_path_factory.mktemp("pci")
    (folder / "disk").write_bytes(random.Random(1).randbytes(1 << 20))
    (folder / "share").mkdir()
    (folder / "share/note").write_text("from the host")
    return folder


@pytest.fixture(scope="module")
def linux(place: Path) -> Iterator[Shell]:
    """A guest with one device of each kind, and a second entropy device."""
    skip_without_build_tools()
    devices = (RngConfig(), RngConfig(), DiskConfig(str(place / "disk")), BalloonConfig(),
               NetConfig(pair=str(place / "net"), mac="52:54:00:12:34:56"),
               ConsoleConfig(guest=False, ports=(f"out,file={place / 'out'}",)), VsockConfig(str(place / "vsock")),
               ShareConfig(str(place / "share"), tag="host"))
    with Shell(kernel("smp") / "vmlinux", devices=devices, transport="pci", cpus=2, memory=128 << 20,
               timeout=600) as shell:
        yield shell.booted()


def interrupts(shell: Shell, name: str) -> tuple[int, str]:
    """(how often, by which chip) of the interrupt called `name`."""
    for line in shell.run("cat /proc/interrupts").splitlines():
        words = line.split()
        if words and words[-1] == name:
            return int(words[1]) + int(words[2]), words[3]
    raise AssertionError(f"no interrupt {name}")


def test_linux_finds_bridge_and_devices(linux: Shell) -> None:
    count = 1 + len(linux.machine.devices)
    words = linux.run("cd /sys/bus/pci/devices; echo *; cat */vendor */device */class; grep -h -m 1 x */resource; "
                      "cd").split()
    columns = [words[at:at + count] for at in range(0, 4 * count, count)]
    expected = [("00", "0x1b36", "0x0008", "0x060000")]
    for slot, device in enumerate(linux.machine.devices.values(), 1):
        expected.append((f"{slot:02x}", "0x1af4", f"{0x1040 + device.ID:#06x}", f"{device.PCI_CLASS:#08x}"))
    assert list(zip(*columns, strict=True)) == [(f"0000:00:{slot}.0", *rest) for slot, *rest in expected]
    bases = [int(base, 16) for base in words[4 * count + 3:7 * count:3]]
    assert bases == [PCI_WINDOW + pci.BAR_SIZE * slot for slot in range(len(linux.machine.devices))]
    assert "[mem 0xd8000000-0xdfffffff window]" in linux.run("dmesg | grep pci_bus")
    assert "virtio_rng.0 virtio_rng.1" in linux.run("cat /sys/class/misc/hw_random/rng_available")


def test_every_kind_of_device_works(linux: Shell, place: Path) -> None:
    assert hashlib.md5((place / "disk").read_bytes()).hexdigest() in linux.run("md5sum /dev/vda")
    assert "52:54:00:12:34:56" in linux.run("cat /sys/class/net/eth0/address")
    linux.run("echo over pci > /dev/vport5p1")
    assert "from the host" in linux.run("mount -t virtiofs host /tmp && cat /tmp/note")
    bound = re.findall(r"drivers/(\S+)/(virtio\d)\b", linux.run("ls -d /sys/bus/virtio/drivers/*/virtio*"))
    assert {device: driver for driver, device in bound} == {
        "virtio0": "virtio_rng", "virtio1": "virtio_rng", "virtio2": "virtio_blk", "virtio3": "virtio_balloon",
        "virtio4": "virtio_net", "virtio5": "virtio_console", "virtio6": "vmw_vsock_virtio_transport",
        "virtio7": "virtiofs"}
    assert (place / "out").read_bytes().startswith(b"over pci")
    assert all(device.driven and not device.faults for device in linux.machine.devices.values())
    lines = [line.split() for line in linux.run("grep virtio /proc/interrupts").splitlines()]
    chips = {words[-1].partition("-")[0]: words[3] for words in lines if len(words) > 3}
    assert chips == {f"virtio{number}": "PCI-MSI" for number in range(8)}


def test_requests_and_interrupts_cost_no_exit_to_us(linux: Shell) -> None:
    counted = Counted(transport_of(linux.machine, "rng0"))
    before, chip = interrupts(linux, "virtio0-input")
    assert chip == "PCI-MSI"
    assert "50+0 records in" in linux.run("dd if=/dev/hwrng of=/dev/null bs=64 count=50")
    after, _ = interrupts(linux, "virtio0-input")
    assert after - before >= 50 and counted.count == 0


def test_a_device_moved_about_works_at_its_new_place(linux: Shell) -> None:
    transport, device = transport_of(linux.machine, "rng1"), "/sys/bus/pci/devices/0000:00:02.0"
    places: list[int | None] = []
    home = PCI_WINDOW + pci.BAR_SIZE
    move = transport.moved
    transport.moved = lambda base: (places.append(base), move(base))[1]     # type: ignore[method-assign]
    linux.run(f"echo 0000:00:02.0 > /sys/bus/pci/drivers/virtio-pci/unbind; echo 1 > {device}/enable")
    # BAR 0 to 0xd8100000 behind Linux' back, which puts it where there is room when it looks again
    text = linux.run(f"printf '\\000\\000\\020\\330' | dd of={device}/config bs=4 seek=4 conv=notrunc; "
                     f"echo 1 > {device}/remove; echo 1 > /sys/bus/pci/rescan; head -n 1 {device}/resource")
    assert f"{home:#018x}" in text
    moved = [base for base in places if base is not None]
    assert 0xD8100000 in moved and moved[-1] == places[-1] == home, places
    counted = Counted(transport)
    linux.run("echo virtio_rng.1 > /sys/class/misc/hw_random/rng_current")
    assert "20+0 records in" in linux.run("dd if=/dev/hwrng of=/dev/null bs=64 count=20")
    assert counted.count == 0
    assert not any(found.faults for found in linux.machine.devices.values())


def test_without_acpi_and_messages_the_pins_do(linux: Shell) -> None:
    linux.machine.close()
    with Shell(kernel("smp") / "vmlinux", devices=(RngConfig(), RngConfig()), transport="pci", acpi=False,
               cmdline="pci=nomsi", memory=128 << 20, timeout=300).booted() as shell:
        text = shell.run("dmesg | grep 'IRQ transform'")        # arch/x86/pci/irq.c, from the MP table
        assert re.findall(r"01\.0: .*INT A -> IRQ (\d+)|02\.0: .*INT A -> IRQ (\d+)", text) == [("6", ""), ("", "7")]
        assert "30+0 records in" in shell.run("dd if=/dev/hwrng of=/dev/null bs=64 count=30")
        words = next(line.split() for line in shell.run("cat /proc/interrupts").splitlines() if "virtio0" in line)
        assert int(words[1]) >= 30 and "fasteoi" in words[3]
        assert all(device.driven and not device.faults for device in shell.machine.devices.values())
