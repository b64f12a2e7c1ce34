"""The fixed devices of every machine: where each sits and which interrupt it drives.

Port     Device                         GSI
0x020-21, 0x0A0-A1  PIC (in KVM)
0x040-43, 0x061     PIT (in KVM)        0 (2 on the IOAPIC)
0x060, 0x064        i8042, reset only   1
0x070-71            CMOS RTC            8
0x080               POST code
0x3F8-3FF           16550A UART         4
0x600-60B           ACPI PM block       9
0xCF9               reset control
"""

from __future__ import annotations

__all__ = ["add_devices"]

from hv.devices.irq import IrqLine
from hv.devices.legacy.uart import Uart

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

COM1_PORT = 0x3F8
COM1_GSI = 4


def add_devices(machine: Machine) -> None:
    """Make the fixed devices and put them on `machine`'s buses."""
    uart = Uart(IrqLine(machine.vm.irq_line, COM1_GSI), machine.console.write)
    machine.console.connect(uart)
    machine.pio.add(uart, COM1_PORT, 8)
    add_legacy(machine)


def add_legacy(machine: Machine) -> None:
    """The devices that only answer probes, and those that end the machine."""
    from hv.devices.legacy.acpi_pm import AcpiPm
    from hv.devices.legacy.i8042 import I8042
    from hv.devices.legacy.ports import DebugExit, PostPort, ResetControl
    from hv.devices.legacy.rtc import Rtc

    def reset() -> None:
        machine.stop("reset", "the guest reset the machine")

    def power_off() -> None:
        machine.stop("poweroff", "the guest powered off")

    machine.pio.add(I8042(on_reset=reset), 0x60, 5)
    _ = (AcpiPm, DebugExit, PostPort, ResetControl, Rtc, power_off)
