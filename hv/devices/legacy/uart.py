"""16550A UART: FIFOs, interrupts, modem lines, loopback (National Semiconductor PC16550D data sheet).

Transmission takes no time: the transmitter is always empty, so a byte goes to `sink` as it is written.
Reception is paced by the guest: `feed` takes no more than the FIFO has room for and `on_room` tells when
it has room again, so nothing overruns. It takes nothing before the guest listens, by enabling the receive
interrupt or by polling, and what the guest clears from the FIFO or leaves there when it stops listening is
given back through `on_return`: a kernel does both when it opens the port, and what was typed before must not
be lost. A guest that once raised RTS and dropped it again gets nothing until it raises it.

Left out on purpose: baud rate timing, parity and framing errors, DMA mode, and the OUT2 gate of the PC's
interrupt line, which small guests forget. Driven by tests/unit/test_uart.py and tests/linux/test_linux.py.
"""

from __future__ import annotations

__all__ = ["Uart"]

from _thread import allocate_lock

from hv.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.irq import IrqLine

# register offsets (data sheet, table II); RBR/THR and IER give way to the divisor while LCR_DLAB is set
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDA, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RDA, IIR_LINE, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
TRIGGERS = (1, 4, 8, 14)        # FCR bits 7:6
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
LSR_DATA, LSR_OVERRUN, LSR_THRE, LSR_IDLE = 0x01, 0x02, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_TERI = 0x04
CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD     # the host's side is always there
FIFO_SIZE = 16
POLLING = 256       # reads of LSR in a row, with nothing sent between, by which a guest shows that it polls for input

_BYTES = tuple(bytes((value,)) for value in range(256))


class Uart(Device):
    """One serial port: eight byte-wide registers. `sink(bytes)` gets what the guest sends."""

    __slots__ = ("_divisor", "_fcr", "_flow", "_ier", "_irq", "_lcr", "_lock", "_lsr", "_mcr", "_msr", "_polls",
                 "_returning", "_rx", "_scr", "_sink", "_thre_pending", "on_return", "on_room")

    def __init__(self, irq: IrqLine, sink: Callable[[bytes], None]) -> None:
        self._irq = irq
        self._sink = sink
        self._lock = allocate_lock()
        self.on_room: Callable[[], None] | None = None
        self.on_return: Callable[[bytes], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Power-on state (data sheet, table I)."""
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = self._lsr = 0
        self._msr = CONNECTED
        self._divisor = 12          # 9600 baud, what firmware leaves behind
        self._rx = bytearray()
        self._returning = False
        self._thre_pending = False
        self._polls = 0
        self._flow = False          # True once the guest has shown that it drives RTS
        self._irq.set(False)

    # the guest's side -----------------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        """THR, IER, FCR, LCR, MCR, SCR; the status registers ignore writes."""
        if offset == DATA and not self._lcr & LCR_DLAB:
            if self._mcr & MCR_LOOP:
                self._receive(value)
            else:
                if self._polls < POLLING:
                    self._polls = 0
                self._sink(_BYTES[value & 0xFF])
            if self._ier & IER_THRE:
                with self._lock:
                    self._thre_pending = True
                    self._update()
            return
        value &= 0xFF
        unread = b""
        with self._lock:
            if offset == DATA:
                self._divisor = self._divisor & 0xFF00 | value
            elif offset == IER and self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0x00FF | value << 8
            elif offset == IER:
                # Enabling the transmitter's interrupt while it is empty raises it at once; Linux tests for this
                # (drivers/tty/serial/8250/8250_port.c, serial8250_THRE_test).
                self._thre_pending = bool(value & IER_THRE and (self._thre_pending or not self._ier & IER_THRE))
                if self._ier & ~value & IER_RDA and not self._mcr & MCR_LOOP:
                    unread = self._drop()
                self._ier = value & 0x0F
            elif offset == IIR_FCR:
                if value & FCR_CLEAR_RX or (value ^ self._fcr) & FCR_ENABLE:
                    unread = self._drop()
                self._fcr = value & 0xC9 if value & FCR_ENABLE else 0
            elif offset == LCR:
                self._lcr = value
            elif offset == MCR:
                self._set_mcr(value & 0x1F)
            elif offset == SCR:
                self._scr = value
            self._returning = bool(unread)
            self._update()
        if unread:
            if self.on_return is not None:
                self.on_return(unread)
            self._returning = False     # until now nothing newer could overtake
        if offset in (IER, IIR_FCR, MCR):
            self._room()

    def read(self, offset: int, size: int) -> int:
        """RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR."""
        if offset == LSR:
            with self._lock:
                value = self._lsr | LSR_THRE | LSR_IDLE | (LSR_DATA if self._rx else 0)
                if self._lsr:
                    self._lsr = 0
                    self._update()
            if self._polls < POLLING:
                self._polls += 1
                if self._polls == POLLING:
                    self._room()
            return value
        if offset == DATA and not self._lcr & LCR_DLAB:
            return self._take()
        if offset == IIR_FCR:
            with self._lock:
                cause = self._cause()
                if cause == IIR_THRE:       # reading it is what acknowledges this one
                    self._thre_pending = False
                    self._update()
            return cause | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
        if offset == MSR:
            with self._lock:
                value = self._msr
                self._msr &= 0xF0           # the delta bits count since the last read
                self._update()
            return value
        if offset == DATA:
            return self._divisor & 0xFF
        if offset == IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        return (self._lcr, self._mcr)[offset - LCR] if offset in (LCR, MCR) else self._scr

    # the host's side ------------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """Let the guest receive the head of `data`; how many bytes fitted. Safe from any thread."""
        with self._lock:
            listens = self._ier & IER_RDA or self._polls == POLLING
            if not listens or self._returning or self._mcr & MCR_LOOP or (self._flow and not self._mcr & MCR_RTS):
                return 0
            room = (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._rx)
            taken = data[:max(room, 0)]
            if taken:
                self._rx += taken
                self._update()
            return len(taken)

    # helpers --------------------------------------------------------------------------------------

    def _take(self) -> int:
        with self._lock:
            if not self._rx:
                return 0
            value = self._rx.pop(0)
            empty = not self._rx
            self._update()
        if empty:
            self._room()
        return value

    def _drop(self) -> bytes:
        unread = bytes(self._rx)
        self._rx.clear()
        return unread

    def _room(self) -> None:
        if self.on_room is not None:
            self.on_room()

    def _receive(self, value: int) -> None:
        """Loopback: the transmitter's output is the receiver's input."""
        with self._lock:
            if len(self._rx) < (FIFO_SIZE if self._fcr & FCR_ENABLE else 1):
                self._rx.append(value & 0xFF)
            else:
                self._lsr |= LSR_OVERRUN
            self._update()

    def _set_mcr(self, value: int) -> None:
        self._mcr = value
        if value & MCR_LOOP:
            lines = ((MSR_CTS if value & MCR_RTS else 0) | (MSR_DSR if value & MCR_DTR else 0)
                     | (MSR_RI if value & MCR_OUT1 else 0) | (MSR_DCD if value & MCR_OUT2 else 0))
        else:
            lines = CONNECTED
            self._flow = self._flow or bool(value & MCR_RTS)
        changed = (self._msr ^ lines) & 0xF0
        delta = changed >> 4 & ~MSR_TERI
        if changed & MSR_RI and not lines & MSR_RI:
            delta |= MSR_TERI               # the ring indicator counts on its trailing edge only
        self._msr = lines | self._msr & 0x0F | delta

    def _cause(self) -> int:
        """The IIR's interrupt identification, highest priority first (data sheet, table III)."""
        if self._lsr & LSR_OVERRUN and self._ier & IER_LINE:
            return IIR_LINE
        if self._rx and self._ier & IER_RDA:
            full = not self._fcr & FCR_ENABLE or len(self._rx) >= TRIGGERS[self._fcr >> 6]
            return IIR_RDA if full else IIR_TIMEOUT
        if self._thre_pending and self._ier & IER_THRE:
            return IIR_THRE
        if self._msr & 0x0F and self._ier & IER_MODEM:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        self._irq.set(self._cause() != IIR_NONE)

    # state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Registers and what is in the receive FIFO."""
        with self._lock:
            return {
                "ier": self._ier, "fcr": self._fcr, "lcr": self._lcr, "mcr": self._mcr, "lsr": self._lsr,
                "msr": self._msr, "scr": self._scr, "divisor": self._divisor, "rx": bytes(self._rx),
                "thre_pending": self._thre_pending, "flow": self._flow, "polls": self._polls,
            }

    def load(self, state: dict[str, object]) -> None:
        """Untrusted: every value is cut to what the register can hold."""
        with self._lock:
            for name in ("ier", "fcr", "lcr", "mcr", "lsr", "msr", "scr"):
                setattr(self, "_" + name, int(state[name]) & 0xFF)  # type: ignore[call-overload]
            self._divisor = int(state["divisor"]) & 0xFFFF  # type: ignore[call-overload]
            self._rx = bytearray(bytes(state["rx"])[:FIFO_SIZE])  # type: ignore[call-overload]
            self._thre_pending = bool(state["thre_pending"])
            self._flow = bool(state["flow"])
            self._polls = min(abs(int(state["polls"])), POLLING)  # type: ignore[call-overload]
            self._update()
