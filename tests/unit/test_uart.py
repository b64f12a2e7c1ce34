"""The 16550A against its data sheet: FIFOs, interrupt causes and priorities, loopback, and no byte lost."""

from __future__ import annotations

import random

from framework.fakes import FakeIrq
from hypothesis import given
from hypothesis import strategies as st

from hv.devices.legacy.uart import Uart
from hv.machine.console import Console

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7


def make() -> tuple[Uart, FakeIrq, bytearray]:
    irq, out = FakeIrq(), bytearray()
    return Uart(irq.line, out.extend), irq, out


def test_what_is_written_comes_out_and_the_transmitter_is_always_empty():
    uart, irq, out = make()
    for byte in b"hello":
        uart.write(DATA, 1, byte)
    assert bytes(out) == b"hello"
    assert uart.read(LSR, 1) == 0x60
    assert irq.levels == []


def test_received_bytes_raise_the_line_until_read():
    uart, irq, _ = make()
    uart.write(IER, 1, 1)
    assert uart.feed(b"ab") == 1            # without FIFO it holds one
    assert irq.level and uart.read(IIR, 1) == 0x04
    assert uart.read(LSR, 1) == 0x61
    assert uart.read(DATA, 1) == ord("a")
    assert not irq.level and uart.read(IIR, 1) == 0x01


def test_fifo_holds_sixteen_and_tells_trigger_from_timeout():
    uart, irq, _ = make()
    uart.write(FCR, 1, 0x81)                # enable, trigger at 8
    uart.write(IER, 1, 1)
    assert uart.feed(bytes(range(7))) == 7
    assert uart.read(IIR, 1) == 0xCC        # below the trigger: character timeout
    assert uart.feed(bytes(range(20))) == 9
    assert uart.read(IIR, 1) == 0xC4
    assert [uart.read(DATA, 1) for _ in range(16)] == [*range(7), *range(9)]
    assert not irq.level


def test_transmitter_interrupt_comes_on_enabling_and_after_each_byte_and_reading_iir_clears_it():
    uart, irq, _ = make()
    uart.write(IER, 1, 2)
    assert irq.level and uart.read(IIR, 1) == 0x02
    assert not irq.level and uart.read(IIR, 1) == 0x01
    uart.write(DATA, 1, 0x41)
    assert irq.level
    assert irq.levels == [True, False, True]    # an edge each time: the PIC needs one


def test_receive_goes_before_transmit():
    uart, _, _ = make()
    uart.write(IER, 1, 3)
    uart.feed(b"x")
    assert uart.read(IIR, 1) == 0x04
    uart.read(DATA, 1)
    assert uart.read(IIR, 1) == 0x02


def test_loopback_joins_transmitter_to_receiver_and_lines_to_lines():
    uart, _, out = make()
    uart.write(MCR, 1, 0x1A)                # loop, OUT2, RTS
    assert uart.read(MSR, 1) & 0xF0 == 0x90
    uart.write(FCR, 1, 1)
    uart.write(DATA, 1, 0x55)
    assert uart.read(LSR, 1) & 1 and uart.read(DATA, 1) == 0x55
    assert not out
    for _ in range(17):
        uart.write(DATA, 1, 1)
    assert uart.read(LSR, 1) & 2            # overrun, told once
    assert not uart.read(LSR, 1) & 2
    uart.write(MCR, 1, 0)
    assert uart.read(MSR, 1) & 0xF0 == 0xB0


def test_modem_changes_are_remembered_until_read():
    uart, irq, _ = make()
    uart.write(IER, 1, 8)
    uart.write(MCR, 1, 0x10)                # all lines drop
    assert irq.level and uart.read(IIR, 1) == 0x00
    assert uart.read(MSR, 1) == 0x0B        # DCTS, DDSR, DDCD; the ring indicator was low before
    assert uart.read(MSR, 1) == 0x00 and not irq.level


def test_divisor_latch_hides_data_and_interrupt_enable():
    uart, _, out = make()
    uart.write(LCR, 1, 0x83)
    uart.write(DATA, 1, 0x01)
    uart.write(IER, 1, 0x02)
    assert (uart.read(DATA, 1), uart.read(IER, 1)) == (0x01, 0x02)
    uart.write(LCR, 1, 0x03)
    assert uart.read(IER, 1) == 0 and not out
    uart.write(SCR, 1, 0x5A)
    assert uart.read(SCR, 1) == 0x5A


def test_input_waits_until_the_guest_listens():
    uart, _, _ = make()
    assert uart.feed(b"x") == 0
    for _ in range(256):
        uart.read(LSR, 1)                   # a guest that polls
    assert uart.feed(b"x") == 1


def test_rts_dropped_stops_the_flow():
    uart, _, _ = make()
    uart.write(IER, 1, 1)
    uart.write(MCR, 1, 2)
    uart.write(MCR, 1, 0)
    assert uart.feed(b"x") == 0
    uart.write(MCR, 1, 2)
    assert uart.feed(b"x") == 1


def test_opening_the_port_as_linux_does_loses_nothing_typed_before():
    uart, _, _ = make()
    console = Console()
    console.connect(uart)
    console.send(b"typed early\n")
    uart.write(IER, 1, 0x0F)                # autoconfig tries which bits stick
    uart.write(IER, 1, 0)
    for value in (1, 7, 0):                 # startup clears the FIFOs, then reads the data register for luck
        uart.write(FCR, 1, value)
    uart.read(DATA, 1)
    uart.write(FCR, 1, 1)
    uart.write(MCR, 1, 0x0B)
    uart.write(IER, 1, 5)
    seen = bytearray()
    while uart.read(LSR, 1) & 1:
        seen.append(uart.read(DATA, 1))
    assert bytes(seen) == b"typed early\n"


def test_64_kib_pass_without_loss():
    uart, irq, _ = make()
    console = Console()
    console.connect(uart)
    uart.write(FCR, 1, 0xC1)
    uart.write(IER, 1, 1)
    data = random.Random(1).randbytes(64 << 10)
    console.send(data)
    seen = bytearray()
    while uart.read(LSR, 1) & 1:
        assert irq.level
        seen.append(uart.read(DATA, 1))
    assert bytes(seen) == data and console.waiting == 0


def test_state_moves_to_another_uart():
    uart, _, _ = make()
    uart.write(FCR, 1, 1)
    uart.write(IER, 1, 1)
    uart.feed(b"abc")
    other, irq, _ = make()
    other.load(uart.state())
    assert irq.level and [other.read(DATA, 1) for _ in range(3)] == list(b"abc")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 255)), max_size=200))
def test_no_access_confuses_it(accesses):
    uart, _, _ = make()
    for write, offset, value in accesses:
        if write:
            uart.write(offset, 1, value)
        else:
            assert 0 <= uart.read(offset, 1) <= 255
        uart.feed(b"zz")
