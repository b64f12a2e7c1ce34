"""MSI-X: a table of messages, one for each interrupt vector (PCI Local Bus Specification 3.0, 6.8.2).

A vector is an event descriptor. While the vector may be delivered, the descriptor is connected to the interrupt
controller, so that whoever writes to it, a device here or a process outside, raises the message without passing through
this code. While it is masked the descriptor is not connected and simply keeps count: that is the pending bit. Connected
again, it is delivered. Driven by tests/unit/test_pci.py.
"""

from __future__ import annotations

__all__ = ["Line", "Msix"]

from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class Line(Protocol):
        """A vector's event descriptor, and its way to the interrupt controller."""

        fd: int

        def connect(self, address: int, data: int) -> bool:
            """Writes to `fd` send this message from now on; those of before that none took, too. False: it can't."""

        def disconnect(self) -> None:
            """Writes to `fd` are kept."""

        def pending(self) -> bool:
            """Whether a write waits; asked only while not connected."""
else:
    Line = object

CAPABILITY = 0x11           # identifier (appendix H)
MOST_VECTORS = 2048         # 6.8.2
ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14        # message control (6.8.2.3)
CONTROL_WRITABLE = (ENABLE | FUNCTION_MASK).to_bytes(2, "little")
ENTRY = 16                  # message address, upper address, data, vector control (6.8.2.6-9)
_CONTROL, _MASKED = 12, 1
_APIC = 0xFEE               # bits 31:20 of the address of an interrupt message (SDM 3A, 11.11.1)


class Msix:
    """The table of `lines`, all masked at first. `fault` is told what the guest does wrong."""

    def __init__(self, lines: Sequence[Line], fault: Callable[[str], None]) -> None:
        self.lines = lines
        self._fault = fault
        self._lock = allocate_lock()        # vCPU threads
        self._table = bytearray(ENTRY * len(lines))
        for vector in range(len(lines)):
            self._table[vector * ENTRY + _CONTROL] = _MASKED
        self._sent: list[tuple[int, int] | None] = [None] * len(lines)      # the message each line is connected to
        self.enabled = False
        self._function_masked = False

    def capability(self, table: int, pending: int) -> bytes:
        """The capability's body: message control, and where in BAR 0 the table and the pending bits are (6.8.2.3-5)."""
        return b"".join((value.to_bytes(size, "little") for value, size in
                         ((len(self.lines) - 1, 2), (table, 4), (pending, 4))))

    def control(self, value: int) -> None:
        """Software wrote the message control."""
        enabled, masked = bool(value & ENABLE), bool(value & FUNCTION_MASK)
        with self._lock:
            if (enabled, masked) != (self.enabled, self._function_masked):
                self.enabled, self._function_masked = enabled, masked
                for vector in range(len(self.lines)):
                    self._update(vector)

    def read_table(self, offset: int, size: int) -> int:
        """Double or quad words, aligned (6.8.2)."""
        if not self._in_table(offset, size):
            return 0
        return int.from_bytes(self._table[offset:offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Double or quad words, aligned (6.8.2). An entry takes effect while it is not masked."""
        if not self._in_table(offset, size):
            return
        vector = offset // ENTRY
        with self._lock:
            self._table[offset:offset + size] = value.to_bytes(size, "little")
            self._table[vector * ENTRY + _CONTROL:(vector + 1) * ENTRY] = bytes(
                (self._table[vector * ENTRY + _CONTROL] & _MASKED, 0, 0, 0))        # the others are reserved
            self._update(vector)

    def read_pending(self, offset: int, size: int) -> int:
        """The pending bits (6.8.2.10), one for each vector."""
        value = 0
        with self._lock:
            for bit in range(8 * size):
                vector = 8 * offset + bit
                if vector < len(self.lines) and self._sent[vector] is None and self.lines[vector].pending():
                    value |= 1 << bit
        return value

    def close(self) -> None:
        """Disconnect all."""
        self.control(0)

    def _in_table(self, offset: int, size: int) -> bool:
        if size in (4, 8) and not offset % size and offset + size <= len(self._table):
            return True
        self._fault(f"an access of {size} bytes at {offset:#x} of the MSI-X table")
        return False

    def _update(self, vector: int) -> None:
        """Connect or disconnect a line as table and control say. With the lock held."""
        entry = self._table[vector * ENTRY:(vector + 1) * ENTRY]
        wanted = None
        if self.enabled and not self._function_masked and not entry[_CONTROL] & _MASKED:
            wanted = (int.from_bytes(entry[0:8], "little"), int.from_bytes(entry[8:12], "little"))
        if wanted == self._sent[vector]:
            return
        line = self.lines[vector]
        if wanted is not None and (wanted[0] >> 20 != _APIC or not line.connect(*wanted)):
            self._fault(f"MSI-X vector {vector}: no interrupt message goes to {wanted[0]:#x}")
            wanted = None
        if wanted is None and self._sent[vector] is not None:
            line.disconnect()
        self._sent[vector] = wanted

    def state(self) -> dict[str, object]:
        """The table, and which vectors are pending."""
        with self._lock:
            return {"table": bytes(self._table),
                    "pending": [vector for vector, line in enumerate(self.lines)
                                if self._sent[vector] is None and line.pending()]}

    def load(self, state: dict[str, object]) -> list[int]:
        """Take the table over and return the vectors to raise again. ValueError for a table of another size."""
        table = bytes(state["table"])  # type: ignore[call-overload]
        if len(table) != len(self._table):
            raise ValueError(f"an MSI-X table of {len(table)} bytes, not {len(self._table)}")
        for offset in range(0, len(table), 4):
            self.write_table(offset, 4, int.from_bytes(table[offset:offset + 4], "little"))
        waiting: list[int] = state["pending"]  # type: ignore[assignment]
        return [vector for vector in map(int, waiting) if 0 <= vector < len(self.lines)]
