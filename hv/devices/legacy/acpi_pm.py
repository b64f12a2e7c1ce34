"""The ACPI fixed hardware: PM1 event and control registers, power-management timer (ACPI 6.4, 4.8.3).

Offset 0: PM1 status and enable, 4: PM1 control, 8: timer. hv/boot/acpi.py tells the guest where they are.
The machine is in ACPI mode from the start (SCI_EN reads 1, there is no SMI command port). Driven by
tests/unit/test_legacy.py.
"""

from __future__ import annotations

__all__ = ["AcpiPm"]

from time import monotonic_ns

from hv.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.irq import IrqLine

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
LENGTH = 12
POWER_BUTTON = 1 << 8           # PWRBTN_STS and PWRBTN_EN
SCI_EN = 1 << 0
SLEEP_ENABLE = 1 << 13          # SLP_EN; SLP_TYP is bits 12:10
SOFT_OFF = 5                    # the SLP_TYP that the DSDT's _S5 names
TIMER_HZ = 3_579_545
_NS_MASK = (1 << 63) - 1


class AcpiPm(Device):
    """Twelve ports. `on_power_off` is called when the guest enters S5."""

    __slots__ = ("_control", "_enable", "_irq", "_on_power_off", "_skipped_ns", "_status")

    def __init__(self, irq: IrqLine, on_power_off: Callable[[], None]) -> None:
        self._irq = irq
        self._on_power_off = on_power_off
        self._status = self._enable = self._control = 0
        self._skipped_ns = 0            # time that the timer did not see

    def press_power_button(self) -> None:
        """Ask the guest's operating system to shut down. Nothing happens where it does not listen."""
        self._status |= POWER_BUTTON
        self._update()

    def skip(self, ns: int) -> None:
        """The timer stood still for so long."""
        self._skipped_ns += ns

    def read(self, offset: int, size: int) -> int:
        """Any width: the registers are one little-endian block."""
        if offset >= TIMER:
            value = self._timer_ns() * TIMER_HZ // 1_000_000_000 & 0xFFFFFFFF
            return value >> 8 * (offset - TIMER) & ((1 << 8 * size) - 1)
        block = self._status | self._enable << 16 | (self._control | SCI_EN) << 32
        return block >> 8 * offset & ((1 << 8 * size) - 1)

    def _timer_ns(self) -> int:
        return monotonic_ns() - self._skipped_ns

    def write(self, offset: int, size: int, value: int) -> None:
        """Status bits are cleared by writing 1."""
        for at in range(offset, offset + size):
            self._write_byte(at, value >> 8 * (at - offset) & 0xFF)
        self._update()
        if offset <= CONTROL + 1 < offset + size and self._control & SLEEP_ENABLE:
            self._control &= ~SLEEP_ENABLE      # write-only
            if self._control >> 10 & 7 == SOFT_OFF:
                self._on_power_off()

    def reset(self) -> None:
        """Power-on state."""
        self._status = self._enable = self._control = 0
        self._update()

    def _write_byte(self, offset: int, value: int) -> None:
        shift = 8 * (offset & 1)
        if offset < ENABLE:
            self._status &= ~(value << shift)
        elif offset < CONTROL:
            self._enable = self._enable & ~(0xFF << shift) | value << shift
        elif offset < CONTROL + 2:
            self._control = self._control & ~(0xFF << shift) | value << shift

    def _update(self) -> None:
        self._irq.set(bool(self._status & self._enable & POWER_BUTTON))

    def state(self) -> dict[str, object]:
        """The three registers, and the timer in ns."""
        return {"status": self._status, "enable": self._enable, "control": self._control, "timer_ns": self._timer_ns()}

    def load(self, state: dict[str, object]) -> None:
        """Untrusted: cut to 16 bits."""
        self._status = int(state["status"]) & 0xFFFF  # type: ignore[call-overload]
        self._enable = int(state["enable"]) & 0xFFFF  # type: ignore[call-overload]
        self._control = int(state["control"]) & 0xFFFF  # type: ignore[call-overload]
        self._skipped_ns = monotonic_ns() - (int(state["timer_ns"]) & _NS_MASK)  # type: ignore[call-overload]
        self._update()
