"""Single ports: POST codes, the two reset ports, the debug exit. Driven by tests/unit/test_legacy.py."""

from __future__ import annotations

__all__ = ["DebugExit", "PostPort", "ResetControl", "SystemControlA"]

from hv.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RESET_CPU = 0x04        # port 0xCF9 bit 2: a rising edge resets (Intel PCH data sheet, RST_CNT)
FAST_RESET = 0x01       # port 0x92 bit 0 (PS/2 system control port A)
FAST_A20 = 0x02         # port 0x92 bit 1: always open here


class PostPort(Device):
    """Port 0x80: the last power-on self-test code. Linux also writes it to pass a microsecond."""

    __slots__ = ("code",)

    def __init__(self) -> None:
        self.code = 0

    def read(self, offset: int, size: int) -> int:
        """The last code written."""
        return self.code

    def write(self, offset: int, size: int, value: int) -> None:
        """Note the code."""
        self.code = value

    def state(self) -> dict[str, object]:
        """The code."""
        return {"code": self.code}

    def load(self, state: dict[str, object]) -> None:
        """Take it over."""
        self.code = int(state["code"]) & 0xFF  # type: ignore[call-overload]


class ResetControl(Device):
    """Port 0xCF9; also the ACPI reset register (hv/boot/acpi.py)."""

    __slots__ = ("_on_reset", "_value")

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """The last value written."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """A rising RST_CPU resets."""
        rising = value & ~self._value & RESET_CPU
        self._value = value & 0xFF
        if rising:
            self._on_reset()

    def reset(self) -> None:
        """Clear it."""
        self._value = 0

    def state(self) -> dict[str, object]:
        """The last value written."""
        return {"value": self._value}

    def load(self, state: dict[str, object]) -> None:
        """Take it over."""
        self._value = int(state["value"]) & 0xFF  # type: ignore[call-overload]


class SystemControlA(Device):
    """Port 0x92: fast A20, which is always on, and fast reset."""

    __slots__ = ("_on_reset",)

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """A20 is open."""
        return FAST_A20

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 0 resets."""
        if value & FAST_RESET:
            self._on_reset()


class DebugExit(Device):
    """isa-debug-exit, as QEMU has it (docs/system/, hw/misc/debugexit.c): a write of v ends with (v << 1) | 1."""

    __slots__ = ("_on_exit",)

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End; the process's exit code keeps eight bits."""
        self._on_exit((value << 1 | 1) & 0xFF)
