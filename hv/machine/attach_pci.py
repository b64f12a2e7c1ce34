"""Virtio devices onto the PCI bus, and what ACPI tells of the bus (ACPI 6.4, 6.2.13 _PRT, 6.4.3.5 address spaces).

    driver writes its queue's notification address -> KVM_IOEVENTFD -> eventfd -> I/O thread -> device.notified()

The notification addresses lie in the BAR, so their event descriptors go with it: bound where it answers, unbound when
it is moved or switched off. hv/machine/pciroot.py has the way of interrupts. Driven by tests/kvm/test_virtio_pci.py.
"""

from __future__ import annotations

__all__ = ["finish_pci", "place_pci"]

from hv.boot import aml
from hv.devices.pci.host import ADDRESS_PORT
from hv.devices.virtio.pci import BAR_SIZE, MOST_QUEUES, NOTIFY, NOTIFY_STEP, VirtioPci
from hv.errors import ConfigError, HvError
from hv.machine.attach import GSIS, join
from hv.machine.pciroot import PciRoot
from hv.memory.layout import PCI_WINDOW, PCI_WINDOW_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.device import VirtioDevice
    from hv.machine.machine import Machine

ANY_LENGTH = 0      # KVM_CAP_IOEVENTFD_ANY_LENGTH: the address alone decides, and KVM need not decode the instruction


def place_pci(machine: Machine, device: VirtioDevice) -> None:
    """Give the device the next slot, its vectors, and its event descriptors."""
    root = machine.pci
    if root is None:
        root = machine.pci = PciRoot(machine, GSIS)
    queues = len(device.QUEUES)
    if queues > MOST_QUEUES:
        raise ConfigError(f"{device.name}: {queues} queues, a PCI device has at most {MOST_QUEUES}", "use fewer")
    slot = len(root.bridge.slots)
    bindings = _Bindings(machine, device)
    transport = VirtioPci(device, root.vectors(queues + 1), root.pin(slot), bindings.moved)
    join(machine, device, transport)
    transport.announce()
    root.bridge.plug(transport, BAR_SIZE)
    transport.wire(root.wire(slot))


class _Bindings:
    """The event descriptors of one device's notification addresses."""

    def __init__(self, machine: Machine, device: VirtioDevice) -> None:
        self._vm, self._device = machine.vm, device
        self._bound: list[tuple[int, int]] = []

    def moved(self, base: int | None) -> None:
        """The BAR answers at `base`, or nowhere."""
        for fd, address in self._bound:
            self._vm.ioeventfd(fd, address, ANY_LENGTH, remove=True)
        self._bound.clear()
        if base is None:
            return
        for index, fd in enumerate(self._device.kick_fds):
            address = base + NOTIFY + NOTIFY_STEP * index
            try:
                self._vm.ioeventfd(fd, address, ANY_LENGTH)
            except HvError:
                return      # KVM has room for a thousand: the rest exit to VirtioPci.write
            self._bound.append((fd, address))


def finish_pci(machine: Machine) -> bytes:
    """AML of the host bridge: its bus, its windows, and where each slot's INTA goes."""
    root = machine.pci
    if root is None:
        return b""
    root.level_triggered()
    routes = [aml.package(aml.integer(slot << 16 | 0xFFFF), aml.integer(0), aml.integer(0), aml.integer(gsi))
              for slot, gsi in root.interrupts.items()]
    return aml.device(
        "PCI0", aml.name("_HID", aml.eisa_id("PNP0A03")), aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", aml.resources(
            aml.window_bus(0, 0), aml.io_ports(ADDRESS_PORT, 8), aml.window_io(0, ADDRESS_PORT - 1),
            aml.window_io(ADDRESS_PORT + 8, 0xFFFF), aml.window_memory(PCI_WINDOW, PCI_WINDOW_END - 1))),
        aml.name("_PRT", aml.package(*routes)))
