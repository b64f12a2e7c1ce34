"""The guest's console, seen from the host: what it printed, what is typed to it, who listens.

A console of the guest is a `ConsolePort`: the UART, or a virtio port (hv/devices/virtio/console_port.py). More than one
may print here; what is typed goes to the one connected last. Bytes the guest prints come from vCPU threads and I/O
threads; input may come from any thread. The last HISTORY bytes are kept for programs that look for text. Driven by
tests/kvm/test_machine.py and tests/kvm/test_virtio_console.py.
"""

from __future__ import annotations

__all__ = ["Console"]

from _thread import allocate_lock
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class ConsolePort(Protocol):
        """Where typed input goes."""

        on_room: Callable[[], None] | None              # to be called when feed() can take more
        on_return: Callable[[bytes], None] | None       # to be called with what the guest did not read

        def feed(self, data: bytes) -> int:
            """Let the guest receive the head of `data`; how much there was room for. Safe from any thread."""

HISTORY = 1 << 20
_PIECE = 4096           # typed input passed on at once
_POLL = 0.002           # s between looks of wait_for: a guest prints slower than this
_LINE_MOST = 4096
PANIC = b"Kernel panic - not syncing"       # kernel/panic.c, panic()


class Console:
    """Joins the guest's console to any number of sinks and to typed input."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.printed = 0                    # bytes printed so far, also those fallen out of `output`
        self.first_byte_at = 0.0            # monotonic seconds, 0 before the first
        self.panicked = False
        self.watch: Callable[[bytes], None] | None = None     # sees each complete line
        self._line = bytearray()
        self._sinks: list[Callable[[bytes], None]] = []
        self._pending = bytearray()
        self._lock = allocate_lock()        # of what is typed
        self._printing = allocate_lock()    # of what is printed
        self._port: ConsolePort | None = None
        self._resize: Callable[[int, int], None] | None = None
        self.on_drained: Callable[[], None] | None = None

    def connect(self, port: ConsolePort, resize: Callable[[int, int], None] | None = None) -> None:
        """Let input flow into `port`, and the terminal's size to `resize`, where the guest can learn of it."""
        self._port = port
        self._resize = resize
        port.on_room = self._pump
        port.on_return = self._unsend

    @property
    def has_size(self) -> bool:
        """Whether the guest can learn of the terminal's size."""
        return self._resize is not None

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest of the terminal's size; a serial port has no way to. Not from signal handlers."""
        if self._resize is not None:
            self._resize(columns, rows)

    def add_sink(self, sink: Callable[[bytes], None]) -> None:
        """Call sink(bytes) with all that the guest prints from now on, in the thread that brings it."""
        self.follow(sink, 0)

    def follow(self, sink: Callable[[bytes], None], history: int) -> bytes:
        """add_sink, and up to `history` bytes of what was printed before: together they lack and repeat nothing."""
        with self._printing:
            self._sinks = [*self._sinks, sink]
            return bytes(self.output[max(0, len(self.output) - history):])

    def remove_sink(self, sink: Callable[[bytes], None]) -> None:
        """Undo add_sink; a call may be under way still."""
        with self._printing:
            self._sinks = [other for other in self._sinks if other != sink]

    def write(self, data: bytes) -> None:
        """The guest printed `data`."""
        with self._printing:        # two consoles may print at once
            if not self.printed:
                self.first_byte_at = monotonic()
            self.printed += len(data)
            output = self.output
            output += data
            if len(output) > 2 * HISTORY:
                del output[:-HISTORY]
            sinks = self._sinks     # a list that is replaced, never changed: see follow()
        for sink in sinks:
            sink(data)
        line = self._line
        line += data
        if b"\n" in data or len(line) > _LINE_MOST:
            end = line.rfind(b"\n") + 1 or len(line)
            lines = bytes(line[:end])
            del line[:end]
            if PANIC in lines:
                self.panicked = True
            if self.watch is not None:
                for text in lines.splitlines(keepends=True):
                    self.watch(text)

    def send(self, data: bytes) -> None:
        """Type `data`; what the guest has no room for waits."""
        with self._lock:
            self._pending += data
        self._pump()

    def _unsend(self, data: bytes) -> None:
        """The port gives back what the guest did not read."""
        with self._lock:
            self._pending[:0] = data

    @property
    def waiting(self) -> int:
        """Bytes typed that the guest has not taken yet."""
        return len(self._pending)

    def _pump(self) -> None:
        with self._lock:
            while self._pending and self._port is not None:
                piece = bytes(self._pending[:_PIECE])
                taken = self._port.feed(piece)
                del self._pending[:taken]
                if taken < len(piece):
                    break
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
