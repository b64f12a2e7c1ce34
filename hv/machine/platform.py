"""The fixed devices of every machine: where each sits and which interrupt it drives.

    port                device                      GSI
    0x020-21, 0x0A0-A1  PIC (in KVM)
    0x040-43, 0x061     PIT (in KVM, see pit.py)    0 (2 on the IOAPIC)
    0x060, 0x064        i8042, reset only
    0x070-71            CMOS clock
    0x080               POST code
    0x092               fast reset
    0x0F4               debug exit, if asked for
    none                generation ID's event       3 (hv/boot/acpi.py, hv/snapshot/vmgenid.py)
    0x3F8-3FF           16550A serial port, COM1    4
    0x600-60B           ACPI power management       9
    0xCF9               reset control

hv/boot/acpi.py and hv/boot/mptable.py tell the guest of them.
"""

from __future__ import annotations

__all__ = ["GENERATION_GSI", "add_devices"]

from hv.devices.bus import MmioBus, PioBus
from hv.devices.irq import IrqLine
from hv.devices.legacy.acpi_pm import LENGTH, AcpiPm
from hv.devices.legacy.i8042 import I8042
from hv.devices.legacy.ports import DebugExit, PostPort, ResetControl, SystemControlA
from hv.devices.legacy.rtc import Rtc
from hv.devices.legacy.uart import Uart
from hv.machine.console import Console
from hv.machine.pit import BASE as PIT_PORT
from hv.machine.pit import LENGTH as PIT_PORTS
from hv.machine.pit import SPEAKER as SPEAKER_PORT
from hv.machine.pit import LazyPit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

COM1_PORT, COM1_GSI = 0x3F8, 4
ACPI_PM_PORT, SCI_GSI = 0x600, 9
GENERATION_GSI = 3


def add_devices(machine: Machine) -> None:
    """Make the buses, the console and the fixed devices."""

    def reset() -> None:
        machine.stop("reset", "the guest reset the machine")

    def power_off() -> None:
        machine.stop("poweroff", "the guest powered off")

    def debug_exit(code: int) -> None:
        machine.stop("debug-exit", f"the guest ended with {code}", code=code)

    line = machine.vm.irq_line
    machine.pio = pio = PioBus()
    machine.mmio, machine.console = MmioBus(), Console()
    uart = Uart(IrqLine(line, COM1_GSI), machine.console.write)
    machine.console.connect(uart)
    pio.add(uart, COM1_PORT, 8)
    pit = machine.pit = LazyPit(machine.vm)
    pio.add(pit, PIT_PORT, PIT_PORTS)
    pio.add(pit, SPEAKER_PORT, 1, first=SPEAKER_PORT - PIT_PORT)
    keyboard = I8042(reset)
    pio.add(keyboard, 0x60, 1)
    pio.add(keyboard, 0x64, 1, first=4)
    rtc, post, reset_control = Rtc(machine.config.memory), PostPort(), ResetControl(reset)
    pio.add(rtc, 0x70, 2)
    pio.add(post, 0x80, 1)
    pio.add(SystemControlA(reset), 0x92, 1)
    machine.power = AcpiPm(IrqLine(line, SCI_GSI), power_off)
    pio.add(machine.power, ACPI_PM_PORT, LENGTH, wide=True)
    pio.add(reset_control, 0xCF9, 1)
    if machine.config.debug_exit is not None:
        pio.add(DebugExit(debug_exit), machine.config.debug_exit, 1, wide=True)
    machine.platform = {"uart": uart, "keyboard": keyboard, "rtc": rtc, "post": post, "power": machine.power,
                        "reset_control": reset_control}
