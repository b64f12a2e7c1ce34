"""The small devices: each way to end the machine, and the clock."""

from __future__ import annotations

import time

import pytest
from framework.fakes import FakeIrq

from hv.devices.legacy.acpi_pm import AcpiPm
from hv.devices.legacy.i8042 import I8042
from hv.devices.legacy.ports import DebugExit, PostPort, ResetControl, SystemControlA
from hv.devices.legacy.rtc import Rtc


def test_i8042_resets_by_pulse_and_by_output_port_and_never_looks_busy():
    resets: list[int] = []
    device = I8042(lambda: resets.append(1))
    assert device.read(4, 1) == 0 and device.read(0, 1) == 0
    device.write(4, 1, 0xD1)
    device.write(0, 1, 0xDF)            # A20 on, reset line high: nothing
    device.write(0, 1, 0x00)            # no command before it: nothing
    assert not resets
    device.write(4, 1, 0xFE)
    device.write(4, 1, 0xD1)
    device.write(0, 1, 0x02)
    assert len(resets) == 2


def test_reset_control_needs_a_rising_edge():
    resets: list[int] = []
    device = ResetControl(lambda: resets.append(1))
    device.write(0, 1, 2)
    assert not resets
    device.write(0, 1, 6)
    device.write(0, 1, 6)
    assert len(resets) == 1 and device.read(0, 1) == 6


def test_port_92_and_post():
    resets: list[int] = []
    fast = SystemControlA(lambda: resets.append(1))
    assert fast.read(0, 1) == 2
    fast.write(0, 1, 2)
    assert not resets
    fast.write(0, 1, 3)
    assert resets
    post = PostPort()
    post.write(0, 1, 0xAB)
    assert (post.code, post.read(0, 1)) == (0xAB, 0xAB)


@pytest.mark.parametrize(("value", "code"), [(0, 1), (1, 3), (0x10, 0x21), (0x7F, 0xFF), (0x80, 1), (0xFFFFFFFF, 0xFF)])
def test_debug_exit_code(value, code):
    codes: list[int] = []
    DebugExit(codes.append).write(0, 4, value)
    assert codes == [code]


def test_acpi_powers_off_in_s5_only():
    off: list[int] = []
    pm = AcpiPm(FakeIrq().line, lambda: off.append(1))
    assert pm.read(4, 2) == 1               # SCI_EN
    pm.write(4, 2, 0x2000)                  # S0
    pm.write(4, 2, 5 << 10)                 # no SLP_EN
    assert not off
    pm.write(4, 2, 5 << 10 | 0x2000)
    assert off
    pm.write(4, 1, 0)
    pm.write(5, 1, 0x34)                    # byte by byte
    assert len(off) == 2


def test_acpi_power_button_interrupts_until_acknowledged():
    irq = FakeIrq()
    pm = AcpiPm(irq.line, lambda: None)
    pm.press_power_button()
    assert not irq.level
    pm.write(2, 2, 0x100)
    assert irq.level and pm.read(0, 2) == 0x100
    pm.write(0, 2, 0x100)
    assert not irq.level


def test_acpi_timer_runs_at_3_58_mhz():
    pm = AcpiPm(FakeIrq().line, lambda: None)
    start, before = pm.read(8, 4), time.monotonic()
    time.sleep(0.02)
    ticks, spent = pm.read(8, 4) - start & 0xFFFFFFFF, time.monotonic() - before
    assert 0.5 < ticks / (spent * 3_579_545) < 1.5


def bcd(value: int) -> int:
    return (value >> 4) * 10 + (value & 15)


def read(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def write(rtc: Rtc, index: int, value: int) -> None:
    rtc.write(0, 1, index)
    rtc.write(1, 1, value)


def test_rtc_shows_the_hosts_time_in_bcd_and_binary():
    rtc = Rtc()
    now = time.gmtime()
    shown = (2000 + bcd(read(rtc, 9)), bcd(read(rtc, 8)), bcd(read(rtc, 7)))
    assert shown in (now[:3], time.gmtime()[:3])
    assert bcd(read(rtc, 0x32)) == 20 and read(rtc, 13) == 0x80 and not read(rtc, 10) & 0x80
    write(rtc, 11, 0x06)
    assert read(rtc, 9) == now.tm_year % 100


def test_rtc_takes_a_new_time_and_survives_nonsense():
    rtc = Rtc()
    write(rtc, 11, 0x86)                    # SET, binary, 24 hours
    for index, value in ((0, 30), (2, 59), (4, 23), (7, 31), (8, 12), (9, 1), (0x32, 20)):
        write(rtc, index, value)
    write(rtc, 11, 0x06)
    assert [read(rtc, index) for index in (2, 4, 7, 8, 9)] == [59, 23, 31, 12, 1]
    write(rtc, 11, 0x04)                    # 12-hour mode
    assert read(rtc, 4) == 0x80 | 11
    write(rtc, 8, 99)                       # no such month: ignored
    assert read(rtc, 8) == 12
    other = Rtc()
    other.load(rtc.state())
    assert read(other, 9) == 1


def test_rtc_notes_the_memory_size():
    rtc = Rtc(8 << 30)
    assert read(rtc, 0x34) | read(rtc, 0x35) << 8 == 0xBF00
    assert read(rtc, 0x5B) | read(rtc, 0x5C) << 8 | read(rtc, 0x5D) << 16 == (5 << 30) >> 16
