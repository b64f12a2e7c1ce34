"""Virtio devices into a machine: each gets its page of registers, its interrupt, its event descriptors, its thread.

    driver writes QueueNotify  -> KVM_IOEVENTFD -> eventfd -> I/O thread -> device.notified()
    device uses buffers        -> eventfd -> KVM_IRQFD -> interrupt in the guest

so neither way passes through a vCPU's thread in Python. The guest learns of virtio-mmio devices from its command line
(Documentation/admin-guide/kernel-parameters.txt, virtio_mmio.device) or from ACPI (LNRO0005), of virtio-pci devices
from configuration space. `--transport auto` takes what the kernel has built in.

Driven by tests/kvm/test_virtio_rng.py.
"""

from __future__ import annotations

__all__ = ["Attached", "attach_devices", "close_devices"]

import os
from select import EPOLLET, EPOLLIN

from hv.boot import aml
from hv.devices.virtio.mmio import LENGTH, QUEUE_NOTIFY, VirtioMmio
from hv.errors import ConfigError
from hv.machine.iothread import IoThread
from hv.memory.layout import PCI_WINDOW, VIRTIO_MMIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.boot.load import Prepared
    from hv.devices.virtio.device import Interrupts, Io, VirtioDevice
    from hv.machine.machine import Machine

# Interrupts that no fixed device has (hv/machine/platform.py); more devices share them. Kernels without ACPI see only
# the first 16 pins of the IOAPIC, as the ISA interrupts of the MP table.
GSIS = (5, 6, 7, 10, 11, 12, 14, 15)
GSIS_ACPI = (*GSIS, 16, 17, 18, 19, 20, 21, 22, 23)
# Kernel messages go to the serial port until the virtio console is up, then to that
# (Documentation/admin-guide/kernel-parameters.txt, earlycon).
VIRTIO_CONSOLE = b"earlycon=uart8250,io,0x3f8 console=hvc0"
MMIO_MOST = (PCI_WINDOW - VIRTIO_MMIO) // LENGTH
# What a kernel contains that finds virtio-mmio devices by its command line, or by ACPI (drivers/virtio/virtio_mmio.c).
BY_CMDLINE, BY_ACPI = b"virtio_mmio.device", b"LNRO0005"


class Attached:
    """What the kernel is told of the devices: words for its command line, AML for the DSDT, interrupts of PCI slots."""

    def __init__(self) -> None:
        self.words: list[bytes] = []
        self.console = b""          # where its console is, if not on the serial port
        self.aml = b""
        self.pci: dict[int, int] = {}


def attach_devices(machine: Machine, kernel: Prepared | None) -> Attached:
    """Make the devices of the configuration and place them. ConfigError where one can't be.

    Without `kernel`, which nobody needs to tell of them any more, the configuration names the transport.
    """
    attached = Attached()
    acpi = machine.config.acpi
    transport = machine.config.transport
    if kernel is not None and transport == "auto":
        builtin = kernel.contains(BY_CMDLINE) or (acpi and kernel.contains(BY_ACPI))
        transport = "mmio" if builtin or not kernel.is_linux else "pci"
    machine.transport = transport
    for config in machine.config.devices:
        device = config.create()
        number = sum(other.KIND == device.KIND for other in machine.devices.values())
        device.name = f"{device.KIND}{number}"
        machine.devices[device.name] = device       # from here on close() gives it back
        if transport == "mmio":
            address, gsi = _place_mmio(machine, device)
            if kernel is not None:
                _announce(attached, address, gsi)
        else:
            from hv.machine.attach_pci import place_pci

            place_pci(machine, device)
        if not device.OUTSIDE:
            _serve(machine, device)
        if (port := device.guest_console) is not None:
            port.sink = machine.console.write
            machine.console.connect(port, port.resize)
            attached.console = VIRTIO_CONSOLE
    if transport == "mmio" and acpi and kernel is not None and kernel.contains(BY_ACPI):
        attached.words.clear()      # one announcement: a second one would find the registers taken
    elif transport == "pci":
        from hv.machine.attach_pci import finish_pci

        attached.aml += finish_pci(machine)
        attached.pci = machine.pci.interrupts if machine.pci else {}
    return attached


def _place_mmio(machine: Machine, device: VirtioDevice) -> tuple[int, int]:
    """Where its registers are, and its interrupt."""
    index = machine.mmio_slots
    if index >= MMIO_MOST:
        raise ConfigError(f"more than {MMIO_MOST} virtio-mmio devices", "use fewer")
    machine.mmio_slots += 1
    gsis = GSIS_ACPI if machine.config.acpi else GSIS
    address, gsi = VIRTIO_MMIO + index * LENGTH, gsis[index % len(gsis)]
    line = machine.own_fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    machine.vm.irqfd(line, gsi)
    transport = VirtioMmio(device, lambda: os.eventfd_write(line, 1))
    machine.mmio.add(transport, address, LENGTH)
    join(machine, device, transport)
    for number, fd in enumerate(device.kick_fds):
        machine.vm.ioeventfd(fd, address + QUEUE_NOTIFY, 4, match=number)
    return address, gsi


def _announce(attached: Attached, address: int, gsi: int) -> None:
    index = (address - VIRTIO_MMIO) // LENGTH
    attached.words.append(b"virtio_mmio.device=4K@%#x:%d" % (address, gsi))
    attached.aml += aml.device(
        f"VR{index:02X}", aml.name("_HID", aml.string("LNRO0005")), aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.memory32(address, LENGTH), aml.interrupt(gsi))))


def join(machine: Machine, device: VirtioDevice, interrupts: Interrupts) -> None:
    """Give the device guest RAM, a thread's loop, its interrupts, and an event descriptor per queue."""
    device.attach(machine.memory, _io(machine, device.OWN_THREAD), interrupts)
    device.kick_fds = [machine.own_fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in device.queues]


def _io(machine: Machine, own: bool) -> Io:
    """The loop of the thread that serves the device: all machines', where there is one, or one of the machine's own."""
    if machine.io is not None:
        return machine.io
    if not own:
        for shared, thread in machine.io_threads:
            if shared:
                return thread.loop
    thread = IoThread(machine.device_failed)
    machine.io_threads.append((not own, thread))
    return thread.loop


def _serve(machine: Machine, device: VirtioDevice) -> None:
    """Have the device's thread wait for the driver's notifications.

    Edge triggered, the eventfds need not be read: each notification is an event of its own (man 7 epoll).
    """
    for index, fd in enumerate(device.kick_fds):
        device.io.add(fd, EPOLLIN | EPOLLET, _server(device, index))


def _server(device: VirtioDevice, index: int) -> Callable[[int], None]:
    serve = device.serve
    return lambda events: serve(index)


def close_devices(machine: Machine) -> None:
    """End the threads, then close the devices and all descriptors. The vCPUs have ended."""
    for _, thread in machine.io_threads:
        thread.stop()
    machine.io_threads.clear()
    if machine.io is not None:
        machine.io.close()
    for device in machine.devices.values():
        device.close()
        for queue in device.queues:
            queue.reset()       # lets go of guest RAM
    for fd in machine.owned_fds:
        os.close(fd)
    machine.owned_fds.clear()
