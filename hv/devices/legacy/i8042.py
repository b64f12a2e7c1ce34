"""The keyboard controller, as far as kernels need it to reset the machine (IBM PC/AT technical reference; OSDev).

No keyboard and no mouse: the status register reads 0, never 0xff, or Linux polls it 65,536 times
(drivers/input/serio/i8042.c, i8042_flush). Driven by tests/unit/test_legacy.py.
"""

from __future__ import annotations

__all__ = ["I8042"]

from hv.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DATA, STATUS = 0, 4             # ports 0x60 and 0x64
PULSE_RESET = 0xFE              # command: pulse output line 0, which is the processor's reset
WRITE_OUTPUT_PORT = 0xD1        # command: the next data byte is the output port; bit 0 clear resets
OUTPUT_RESET_N = 1


class I8042(Device):
    """Ports 0x60 and 0x64: offsets 0 and 4."""

    __slots__ = ("_expect_output", "_on_reset")

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._expect_output = False

    def read(self, offset: int, size: int) -> int:
        """Both buffers are empty and no data ever waits."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Only the two ways to reset count."""
        if offset == STATUS:
            self._expect_output = value == WRITE_OUTPUT_PORT
            if value == PULSE_RESET:
                self._on_reset()
        elif offset == DATA and self._expect_output:
            self._expect_output = False
            if not value & OUTPUT_RESET_N:
                self._on_reset()

    def reset(self) -> None:
        """Forget a half-given command."""
        self._expect_output = False

    def state(self) -> dict[str, object]:
        """Whether an output-port byte is expected."""
        return {"expect_output": self._expect_output}

    def load(self, state: dict[str, object]) -> None:
        """Take it over."""
        self._expect_output = bool(state["expect_output"])
