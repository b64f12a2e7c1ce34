"""CMOS real-time clock (Motorola MC146818A data sheet; IBM PC/AT technical reference for the RAM beyond 0x0E).

The time is the host's UTC plus what the guest set. Left out on purpose: alarm, periodic and update-ended
interrupts (kernels find their timers elsewhere) and the update-in-progress window, which lets every read be
consistent. Driven by tests/unit/test_legacy.py.
"""

from __future__ import annotations

__all__ = ["Rtc"]

from time import gmtime, time

from hv.devices.base import Device

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
STATUS_A, STATUS_B, STATUS_C, STATUS_D = 10, 11, 12, 13
CENTURY = 0x32              # where ACPI's FADT and most firmware put it
B_24_HOURS, B_BINARY, B_SET = 0x02, 0x04, 0x80
A_32768_HZ = 0x26           # divider for the usual crystal, 1024 Hz periodic rate
D_VALID = 0x80              # RAM and time are valid: the battery is good
PM = 0x80                   # in the hours register, 12-hour mode

_CLOCK = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)


class Rtc(Device):
    """Two ports: index (0) and data (1). `memory` in bytes goes where firmware would note it."""

    __slots__ = ("_index", "_offset", "_ram")

    def __init__(self, memory: int = 0) -> None:
        self._ram = bytearray(128)
        self._offset = 0
        below_4g, above_4g = min(memory, 0xC0000000), max(0, memory - 0xC0000000)
        extended = min(max(0, below_4g - (1 << 20)) >> 10, 0xFFFF)          # KiB above 1 MiB
        beyond_16m = min(max(0, below_4g - (16 << 20)) >> 16, 0xFFFF)       # 64 KiB units
        for at, value, size in ((0x15, 640, 2), (0x17, extended, 2), (0x30, extended, 2), (0x34, beyond_16m, 2),
                                (0x5B, above_4g >> 16 & 0xFFFFFF, 3)):
            self._ram[at:at + size] = value.to_bytes(size, "little")
        self.reset()

    def reset(self) -> None:
        """The index and the interrupt enables; time and RAM live on the battery."""
        self._index = 0
        self._ram[STATUS_A] = A_32768_HZ
        self._ram[STATUS_B] = B_24_HOURS
        self._ram[STATUS_D] = D_VALID

    def read(self, offset: int, size: int) -> int:
        """The register the index names; the index itself is write-only."""
        if offset == 0:
            return 0xFF
        index = self._index
        if index in _CLOCK and not self._ram[STATUS_B] & B_SET:
            return self._clock(index)
        return 0 if index == STATUS_C else self._ram[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 7 of the index is the NMI mask and not kept."""
        if offset == 0:
            self._index = value & 0x7F
            return
        index, ram = self._index, self._ram
        value &= 0xFF
        if index == STATUS_B:
            if value & ~ram[STATUS_B] & B_SET:
                for register in _CLOCK:             # freeze what a read would show now
                    ram[register] = self._clock(register)
            ram[STATUS_B], before = value, ram[STATUS_B]
            if before & ~value & B_SET:
                self._set_time()
        elif index == STATUS_A:
            ram[STATUS_A] = value & 0x7F            # bit 7 is read-only
        elif index not in (STATUS_C, STATUS_D):
            ram[index] = value
            if index in _CLOCK and not ram[STATUS_B] & B_SET:
                for register in _CLOCK:
                    if register != index:
                        ram[register] = self._clock(register)
                self._set_time()

    def _clock(self, index: int) -> int:
        now = gmtime(int(time()) + self._offset)
        if index == HOURS and not self._ram[STATUS_B] & B_24_HOURS:
            return self._encode((now.tm_hour + 11) % 12 + 1) | (PM if now.tm_hour >= 12 else 0)
        return self._encode({
            SECONDS: min(now.tm_sec, 59), MINUTES: now.tm_min, HOURS: now.tm_hour, WEEKDAY: (now.tm_wday + 1) % 7 + 1,
            DAY: now.tm_mday, MONTH: now.tm_mon, YEAR: now.tm_year % 100, CENTURY: now.tm_year // 100}[index])

    def _set_time(self) -> None:
        """Take the clock registers over as the time; nonsense (month 13) is ignored."""
        from calendar import timegm

        ram = self._ram
        hours = ram[HOURS]
        if ram[STATUS_B] & B_24_HOURS:
            hour = self._decode(hours)
        else:
            hour = self._decode(hours & ~PM) % 12 + (12 if hours & PM else 0)
        second, minute, day, month = (self._decode(ram[index]) for index in (SECONDS, MINUTES, DAY, MONTH))
        year = self._decode(ram[CENTURY]) * 100 + self._decode(ram[YEAR])
        if second < 60 and minute < 60 and hour < 24 and 1 <= day <= 31 and 1 <= month <= 12 and 1970 <= year < 3000:
            self._offset = timegm((year, month, day, hour, minute, second, 0, 0, 0)) - int(time())

    def _encode(self, value: int) -> int:
        return value if self._ram[STATUS_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._ram[STATUS_B] & B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def state(self) -> dict[str, object]:
        """Index, RAM and the offset from the host's time, s."""
        return {"index": self._index, "ram": bytes(self._ram), "offset": self._offset}

    def load(self, state: dict[str, object]) -> None:
        """Untrusted: cut to size."""
        self._index = int(state["index"]) & 0x7F  # type: ignore[call-overload]
        self._ram = bytearray(bytes(state["ram"])[:128].ljust(128, b"\0"))  # type: ignore[call-overload]
        self._offset = max(-(1 << 40), min(1 << 40, int(state["offset"])))  # type: ignore[call-overload]
