"""The PCI bus of a machine, wired to KVM: message-signalled interrupts, interrupt pins.

    a write to a vector's eventfd -> KVM_IRQFD -> GSI -> KVM_SET_GSI_ROUTING -> message to a local APIC

KVM's routing table is replaced as a whole, so the rows it begins with are kept here: GSI n is IOAPIC pin n, and below
16 an input of the 8259 pair too (arch/x86/kvm/irq_comm.c, default_routing). Vectors have the GSIs behind them.

Pins: INTA of slot s is wired to one of eight GSIs that no fixed device has; slots share them, as on any PC.
Driven by tests/kvm/test_virtio_pci.py.
"""

from __future__ import annotations

__all__ = ["PciRoot", "Vector"]

import os
from _thread import allocate_lock
from select import POLLIN, poll

from hv.devices.pci.host import ADDRESS_PORT, DATA, DATA_PORT, HostBridge
from hv.errors import ConfigError, HvError
from hv.kvm.const import (
    KVM_CAP_IRQ_ROUTING,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
)
from hv.memory.layout import PCI_WINDOW, PCI_WINDOW_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.kvm.vm import VmFd
    from hv.machine.machine import Machine

    Row = tuple[int, int, tuple[int, int, int]]

IOAPIC_PINS, PIC_INPUTS = 24, 16
ELCR = 14       # offset in struct kvm_pic_state (arch/x86/include/uapi/asm/kvm.h): inputs that are level triggered


class PciRoot:
    """Host bridge, interrupt routes and pins. `gsis` are those the pins may be wired to."""

    def __init__(self, machine: Machine, gsis: tuple[int, ...]) -> None:
        self._vm = machine.vm
        self._own_fd = machine.own_fd
        self._gsis = gsis
        self._lock = allocate_lock()
        self._pins: dict[int, set[int]] = {gsi: set() for gsi in gsis}      # GSI -> slots that hold it
        self._rows = default_rows()
        self._first_vector = len(self._rows)
        self._most = self._vm.check(KVM_CAP_IRQ_ROUTING)
        self._gsi = IOAPIC_PINS
        self.interrupts: dict[int, int] = {}        # slot -> GSI of its INTA
        self.bridge = HostBridge(machine.mmio, PCI_WINDOW, PCI_WINDOW_END)
        machine.pio.add(self.bridge, ADDRESS_PORT, 1, wide=True)
        machine.pio.add(self.bridge, DATA_PORT, 4, wide=True, first=DATA)

    # messages ------------------------------------------------------------------------------------------

    def vectors(self, count: int) -> list[Vector]:
        """So many new MSI-X vectors."""
        if len(self._rows) + count > self._most:
            raise ConfigError(f"more than {self._most} interrupt routes", "use fewer devices, or fewer queues")
        made = []
        for _ in range(count):
            fd = self._own_fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            made.append(Vector(self, self._vm, self._gsi, fd))
            self._rows.append((self._gsi, KVM_IRQ_ROUTING_MSI, (0, 0, 0)))
            self._gsi += 1
        return made

    def route(self, gsi: int, address: int, data: int) -> bool:
        """Have `gsi` send this message. False where KVM has no such route."""
        at = self._first_vector + gsi - IOAPIC_PINS
        row = (gsi, KVM_IRQ_ROUTING_MSI, (address & 0xFFFFFFFF, address >> 32, data))
        with self._lock:
            before = self._rows[at]
            if row == before:
                return True
            self._rows[at] = row
            try:
                # Rows nobody has set yet are left out: less for KVM to go through.
                self._vm.set_gsi_routing([kept for kept in self._rows if kept[1] != KVM_IRQ_ROUTING_MSI or kept[2][0]])
            except HvError:
                self._rows[at] = before
                return False
        return True

    # pins ----------------------------------------------------------------------------------------------

    def wire(self, slot: int) -> int:
        """Wire INTA of `slot`; the GSI."""
        gsi = self.interrupts[slot] = self._gsis[slot % len(self._gsis)]
        return gsi

    def pin(self, slot: int) -> Callable[[bool], None]:
        """What drives INTA of `slot`, once it is wired."""
        def drive(level: bool) -> None:
            gsi = self.interrupts[slot]
            with self._lock:
                holders = self._pins[gsi]
                before = bool(holders)
                (holders.add if level else holders.discard)(slot)
                if bool(holders) != before:
                    self._vm.irq_line(gsi, not before)

        return drive

    def level_triggered(self) -> None:
        """Tell the 8259 pair that the pins in use are level triggered, as firmware would."""
        for chip in (0, 1):
            inputs = sum(1 << gsi - 8 * chip for gsi in set(self.interrupts.values()) if gsi >> 3 == chip)
            state = self._vm.get_irqchip(chip)
            state.chip[ELCR] |= inputs
            self._vm.set_irqchip(state)


class Vector:
    """An MSI-X vector: event descriptor `fd` and a GSI (a hv.devices.pci.msix.Line)."""

    __slots__ = ("_connected", "_root", "_vm", "fd", "gsi")

    def __init__(self, root: PciRoot, vm: VmFd, gsi: int, fd: int) -> None:
        self._root, self._vm = root, vm
        self.gsi, self.fd = gsi, fd
        self._connected = False

    def connect(self, address: int, data: int) -> bool:
        """Route the GSI, then give KVM the descriptor; KVM delivers what was written to it before."""
        if not self._root.route(self.gsi, address, data):
            return False
        if not self._connected:
            try:
                self._vm.irqfd(self.fd, self.gsi)
            except HvError:
                return False
            self._connected = True
        return True

    def disconnect(self) -> None:
        """Take the descriptor back."""
        if self._connected:
            self._vm.irqfd(self.fd, self.gsi, remove=True)
            self._connected = False

    def pending(self) -> bool:
        """Whether the descriptor's count is not 0."""
        poller = poll()
        poller.register(self.fd, POLLIN)
        return bool(poller.poll(0))


def default_rows() -> list[Row]:
    """The routes of a new VM's interrupt controllers."""
    rows: list[Row] = []
    for gsi in range(IOAPIC_PINS):
        rows.append((gsi, KVM_IRQ_ROUTING_IRQCHIP, (KVM_IRQCHIP_IOAPIC, gsi, 0)))
        if gsi < PIC_INPUTS:
            chip = KVM_IRQCHIP_PIC_MASTER if gsi < 8 else KVM_IRQCHIP_PIC_SLAVE
            rows.append((gsi, KVM_IRQ_ROUTING_IRQCHIP, (chip, gsi & 7, 0)))
    return rows
