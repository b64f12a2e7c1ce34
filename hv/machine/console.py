"""The guest's serial console, seen from the host: what it printed, what is typed to it, who listens.

Bytes the guest prints come from vCPU threads; input may come from any thread. The last HISTORY bytes are
kept for programs that look for text. Driven by tests/kvm/test_machine.py.
"""

from __future__ import annotations

__all__ = ["Console"]

from _thread import allocate_lock
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.legacy.uart import Uart

HISTORY = 1 << 20
_POLL = 0.002           # s between looks of wait_for: a guest prints slower than this
PANIC = b"Kernel panic - not syncing"       # kernel/panic.c, panic()


class Console:
    """Joins one UART to any number of sinks and to typed input."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.printed = 0                    # bytes printed so far, also those fallen out of `output`
        self.first_byte_at = 0.0            # monotonic seconds, 0 before the first
        self.panicked = False
        self.watch: Callable[[bytes], None] | None = None     # sees each complete line
        self._line = bytearray()
        self._sinks: list[Callable[[bytes], None]] = []
        self._pending = bytearray()
        self._lock = allocate_lock()
        self._uart: Uart | None = None
        self.on_drained: Callable[[], None] | None = None

    def connect(self, uart: Uart) -> None:
        """Let input flow into `uart`."""
        self._uart = uart
        uart.on_room = self._pump
        uart.on_return = self._unsend

    def add_sink(self, sink: Callable[[bytes], None]) -> None:
        """Call sink(bytes) with all that the guest prints from now on, in a vCPU's thread."""
        self._sinks.append(sink)

    def write(self, data: bytes) -> None:
        """The guest printed `data`."""
        if not self.printed:
            self.first_byte_at = monotonic()
        self.printed += len(data)
        output = self.output
        output += data
        if len(output) > 2 * HISTORY:
            del output[:-HISTORY]
        for sink in self._sinks:
            sink(data)
        line = self._line
        line += data
        if data[-1:] == b"\n" or len(line) > 4096:
            if PANIC in line:
                self.panicked = True
            if self.watch is not None:
                self.watch(bytes(line))
            line.clear()

    def send(self, data: bytes) -> None:
        """Type `data`; what the UART has no room for waits."""
        with self._lock:
            self._pending += data
        self._pump()

    def _unsend(self, data: bytes) -> None:
        """The UART gives back what the guest did not read."""
        with self._lock:
            self._pending[:0] = data

    @property
    def waiting(self) -> int:
        """Bytes typed that the guest has not taken yet."""
        return len(self._pending)

    def _pump(self) -> None:
        with self._lock:
            if self._pending and self._uart is not None:
                taken = self._uart.feed(bytes(self._pending[:64]))
                del self._pending[:taken]
            drained = not self._pending
        if drained and self.on_drained is not None:
            self.on_drained()

    def wait_for(self, text: bytes, timeout: float, *, start: int = 0, alive: Callable[[], bool] | None = None) -> int:
        """Wait until the guest has printed `text` after byte `start`; returns the position after it.

        TimeoutError after `timeout` seconds, or at once when alive() turns false without it.
        """
        end = monotonic() + timeout
        while True:
            running = alive is None or alive()
            skipped = self.printed - len(self.output)
            at = self.output.find(text, max(0, start - skipped))
            if at >= 0:
                return at + skipped + len(text)
            if not running or monotonic() > end:
                tail = bytes(self.output[-200:])
                why = f"after {timeout} s" if running else "when the guest ended"
                raise TimeoutError(f"{text!r} was not printed {why}; the last output is {tail!r}")
            sleep(_POLL)
