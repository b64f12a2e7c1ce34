"""The host bridge: bus 0, reached by configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2).

    port 0xCF8      CONFIG_ADDRESS: enable, bus, device, function, register; answers to double words only
    port 0xCFC-CFF  CONFIG_DATA: the register that is selected

It also decides what answers in the memory window: where software puts a BAR, there the function's registers appear on
the MMIO bus, unless the place is outside the window or taken. BARs have addresses from the start, as firmware would
leave them, so that a kernel without a resource allocator need only switch memory decoding on.

Port 0xCF9, between the two, is the reset control (hv/devices/legacy/ports.py). Left out on purpose: other buses,
functions beyond 0, mechanism #2, MMCONFIG. Driven by tests/unit/test_pci.py.
"""

from __future__ import annotations

__all__ = ["Function", "HostBridge"]

from _thread import allocate_lock

from hv.devices.base import Device
from hv.devices.pci.config import ConfigSpace
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.bus import MmioBus

ADDRESS_PORT, DATA_PORT = 0xCF8, 0xCFC
ADDRESS, DATA = 0, 4        # offsets, as the ports lie behind one another
SLOTS = 32                  # devices of a bus (3.2.2.3.2)
ENABLE = 1 << 31

# Red Hat's generic host bridge (docs/specs/pci-ids.rst of QEMU); class 06.00.00 (PCI 3.0, appendix D)
VENDOR, DEVICE, CLASS = 0x1B36, 0x0008, 0x060000


class Function(Device):
    """A PCI function: a configuration space, and registers in memory where its BAR says (Device.read, Device.write)."""

    __slots__ = ("space",)

    def __init__(self, space: ConfigSpace) -> None:
        self.space = space

    def config_read(self, offset: int, size: int) -> int:
        """Software reads the configuration space."""
        return self.space.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Software writes it."""
        self.space.write(offset, size, value)

    def moved(self, base: int | None) -> None:
        """The registers answer at `base` from now on; None: nowhere."""


class HostBridge(Device):
    """The bus. `plug` puts functions on it; software finds the bridge itself at slot 0."""

    def __init__(self, mmio: MmioBus, start: int, end: int) -> None:
        self._mmio = mmio
        self._start, self._end, self._free = start, end, start
        self._address = 0
        self._lock = allocate_lock()        # several vCPUs: one access at a time
        self._places: dict[int, int] = {}   # slot -> where its BAR answers
        self.slots: list[Function] = [Function(ConfigSpace(VENDOR, DEVICE, CLASS, revision=0))]
        self.conflicts = 0                  # BARs that software put where they can't be

    def plug(self, function: Function, bar_size: int) -> int:
        """Put `function` into the next slot, its BAR into the window; the slot. ConfigError where all are taken."""
        base = self._free + bar_size - 1 & ~(bar_size - 1)
        if len(self.slots) >= SLOTS or base + bar_size > self._end:
            raise ConfigError(f"more than {SLOTS - 1} PCI devices", "use fewer, or --transport mmio")
        function.space.add_bar(bar_size, base)
        self._free = base + bar_size
        self.slots.append(function)
        return len(self.slots) - 1

    # ports -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """CONFIG_ADDRESS as a double word, CONFIG_DATA in any width."""
        if offset == ADDRESS and size == 4:
            return self._address
        with self._lock:
            function = self._selected(offset)
            if function is None or (offset & 3) + size > 4:
                return (1 << 8 * size) - 1      # master abort: nobody drives the bus (3.2.2.3.4)
            return function.config_read((self._address & 0xFC) + (offset & 3), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """CONFIG_ADDRESS as a double word, CONFIG_DATA in any width."""
        if offset == ADDRESS and size == 4:
            self._address = value & 0x80FFFFFC
            return
        with self._lock:
            function = self._selected(offset)
            if function is not None and (offset & 3) + size <= 4:
                function.config_write((self._address & 0xFC) + (offset & 3), size, value)
                self._remap()

    def _selected(self, offset: int) -> Function | None:
        address = self._address
        slot = address >> 11 & 0x1F
        if offset < DATA or not address & ENABLE or address & 0xFF0700 or slot >= len(self.slots):
            return None         # disabled, another bus, another function, an empty slot
        return self.slots[slot]

    def _remap(self) -> None:
        """Have the MMIO bus follow the BARs."""
        wanted = {slot: function.space.memory for slot, function in enumerate(self.slots)}
        for slot, base in list(self._places.items()):
            if wanted[slot] != base:
                self._mmio.remove(base)
                del self._places[slot]
                self.slots[slot].moved(None)
        for slot, place in wanted.items():
            if place is None or slot in self._places:
                continue
            function = self.slots[slot]
            size = function.space.bar_size
            try:
                if not self._start <= place <= self._end - size:
                    raise ConfigError("outside the window")
                self._mmio.add(function, place, size)
            except ConfigError:
                self.conflicts += 1     # it answers nowhere, until software finds a better place
                continue
            self._places[slot] = place
            function.moved(place)

    # state -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """The address register; functions keep their own."""
        return {"address": self._address}

    def load(self, state: dict[str, object]) -> None:
        """Take it over, once the functions have loaded theirs."""
        self._address = int(state["address"]) & 0x80FFFFFC  # type: ignore[call-overload]
        with self._lock:
            self._remap()
