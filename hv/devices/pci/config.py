"""The configuration space of one PCI function, type 0 (PCI Local Bus Specification 3.0, chapter 6).

256 bytes and a mask of the same size that says which bits software may write: identity and capabilities are constant,
a BAR's low bits are fixed at 0, which is how software learns its size (6.2.5.1). One memory BAR of 32 bits is enough
here. Left out on purpose: I/O BARs, the expansion ROM, power management, bus mastering as a condition for DMA.
Driven by tests/unit/test_pci.py.
"""

from __future__ import annotations

__all__ = ["ConfigSpace"]

SIZE = 256

# header: 6.1, figure 6-1
VENDOR, DEVICE, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
CACHE_LINE, BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM = 0x0C, 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
FIRST_CAPABILITY = 0x40

# command (6.2.2) and status (6.2.3)
MEMORY, MASTER, INTX_OFF = 1 << 1, 1 << 2, 1 << 10
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4

INTA = 1


class ConfigSpace:
    """Identity, command, BAR 0 and capabilities of a function. `pin` 1 is INTA, 0 none; `line` a hint for software."""

    __slots__ = ("_data", "_mask", "_next", "_tail", "bar_size")

    def __init__(self, vendor: int, device: int, class_code: int, *, revision: int = 1,
                 subsystem: tuple[int, int] = (0, 0), pin: int = 0, line: int = 0) -> None:
        self._data = bytearray(SIZE)
        self._mask = bytearray(SIZE)        # 1: software may write the bit
        self._next, self._tail = FIRST_CAPABILITY, CAPABILITIES
        self.bar_size = 0
        for offset, size, value in ((VENDOR, 2, vendor), (DEVICE, 2, device), (REVISION, 1, revision),
                                    (CLASS, 3, class_code), (SUBSYSTEM_VENDOR, 2, subsystem[0]),
                                    (SUBSYSTEM, 2, subsystem[1]), (INTERRUPT_LINE, 1, line), (INTERRUPT_PIN, 1, pin)):
            self.put(offset, size, value)
        self._writable(COMMAND, 2, MEMORY | MASTER | INTX_OFF if pin else MASTER)
        self._writable(CACHE_LINE, 1, 0xFF)
        self._writable(INTERRUPT_LINE, 1, 0xFF if pin else 0)

    # what the device says ----------------------------------------------------------------------------

    def add_bar(self, size: int, address: int) -> None:
        """BAR 0: `size` bytes of memory (a power of 2), at `address` for now; nothing answers before MEMORY is set."""
        self.bar_size = size
        self.put(BAR0, 4, address)
        self._writable(BAR0, 4, ~(size - 1) & 0xFFFFFFFF)

    def add_capability(self, identifier: int, body: bytes, writable: bytes = b"") -> int:
        """Append to the list (6.7) and return where it stands. `body` follows the identifier and the link."""
        at = self._next
        size = 2 + len(body)
        if at + size > SIZE:
            raise OverflowError("the capabilities outgrow the configuration space")
        self._data[at] = identifier
        self._data[at + 2:at + size] = body
        self._mask[at + 2:at + 2 + len(writable)] = writable
        self._data[self._tail] = at
        self.put(STATUS, 2, STATUS_CAPABILITIES)
        self._tail = at + 1
        self._next = at + size + 3 & ~3
        return at

    def put(self, offset: int, size: int, value: int) -> None:
        """Set a field, whatever software may write."""
        self._data[offset:offset + size] = value.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """A field."""
        return int.from_bytes(self._data[offset:offset + size], "little")

    @property
    def command(self) -> int:
        """The command register."""
        return self.get(COMMAND, 2)

    @property
    def memory(self) -> int | None:
        """Where BAR 0 answers; None while memory decoding is off."""
        return self.get(BAR0, 4) if self.bar_size and self.command & MEMORY else None

    # what software does ------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Any part of the space; all ones for an access that is not 1, 2 or 4 bytes inside one double word."""
        if not _proper(offset, size):
            return (1 << 8 * size) - 1
        return self.get(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Change the bits that may be written."""
        if _proper(offset, size):
            mask = int.from_bytes(self._mask[offset:offset + size], "little")
            self.put(offset, size, self.get(offset, size) & ~mask | value & mask)

    # state -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """All 256 bytes."""
        return {"bytes": bytes(self._data)}

    def load(self, state: dict[str, object]) -> None:
        """Take over the bits that software may write; the rest is this device's own. ValueError for a wrong size."""
        saved = bytes(state["bytes"])  # type: ignore[call-overload]
        if len(saved) != SIZE:
            raise ValueError(f"a configuration space of {len(saved)} bytes")
        for offset in range(SIZE):
            self.write(offset, 1, saved[offset])

    def _writable(self, offset: int, size: int, bits: int) -> None:
        self._mask[offset:offset + size] = bits.to_bytes(size, "little")


def _proper(offset: int, size: int) -> bool:
    return size in (1, 2, 4) and 0 <= offset < SIZE and (offset & 3) + size <= 4
