"""Port I/O and MMIO routing: an address becomes a device and an offset.

Ports are a flat table, one entry per port, because the vCPU loop looks there on every port exit. MMIO ranges are few
and wide: a sorted list, with the range hit last tried first. What nobody claims reads as all ones, as on a PC where no
device drives the bus, and is counted.

Driven by tests/unit/test_bus.py.
"""

from __future__ import annotations

__all__ = ["MmioBus", "PioBus"]

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.base import Device
    from hv.memory.guest import GuestMemory

    Read = Callable[[int, int], int]
    Write = Callable[[int, int, int], None]

PORTS = 0x10000
_COUNTED_PORTS = 64     # unclaimed ports counted one by one; a guest that tries them all costs no more


class PioBus:
    """The 64 Ki I/O ports.

    `ports` maps a port to (read, write, offset, wide). An access of two or four bytes goes whole to a
    device added as `wide`, and byte by byte over consecutive ports to all others, as the ISA bus does it.
    """

    def __init__(self) -> None:
        self.ports: dict[int, tuple[Read, Write, int, bool]] = {}
        self.devices: list[tuple[int, int, Device]] = []
        self.unclaimed = 0
        self.unclaimed_ports: dict[int, int] = {}

    def add(self, device: Device, base: int, length: int, *, wide: bool = False, first: int = 0) -> None:
        """Place `device` at ports [base, base+length), the lowest being its offset `first`.

        ConfigError where another one is, or beyond port 0xffff.
        """
        if length < 1 or base < 0 or base + length > PORTS:
            raise ConfigError(f"ports {base:#x} to {base + length - 1:#x} are not in the I/O space")
        taken = [port for port in range(base, base + length) if port in self.ports]
        if taken:
            raise ConfigError(f"port {taken[0]:#x} belongs to another device", "choose another port")
        for offset in range(length):
            self.ports[base + offset] = (device.read, device.write, first + offset, wide)
        self.devices.append((base, length, device))

    def read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        entry = self.ports.get(port)
        if entry is not None and (size == 1 or entry[3]):
            return entry[0](entry[2], size)
        if size > 1:
            return sum((self.read(port + i & 0xFFFF, 1) & 0xFF) << 8 * i for i in range(size))
        self._count(port)
        return 0xFF

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        entry = self.ports.get(port)
        if entry is not None and (size == 1 or entry[3]):
            entry[1](entry[2], size, value)
        elif size > 1:
            for i in range(size):
                self.write(port + i & 0xFFFF, 1, value >> 8 * i & 0xFF)
        else:
            self._count(port)

    def _count(self, port: int) -> None:
        self.unclaimed += 1
        counts = self.unclaimed_ports
        if port in counts or len(counts) < _COUNTED_PORTS:
            counts[port] = counts.get(port, 0) + 1


class MmioBus:
    """Devices in guest-physical memory, outside RAM.

    A guest may move PCI devices about while other processors use theirs, so a change makes a new map and
    puts it in the old one's place: whoever is looking something up goes on with the map it has.
    """

    def __init__(self) -> None:
        self.unclaimed = 0
        self.ram: GuestMemory | None = None     # where accesses to RAM may come here (hv/machine/ramslots.py)
        self._map = _Map([])

    @property
    def devices(self) -> list[tuple[int, int, Device]]:
        """(base, length, device), by address."""
        return self._map.devices

    def add(self, device: Device, base: int, length: int) -> None:
        """Place `device` at [base, base+length). ConfigError where another one is."""
        if length < 1 or base < 0:
            raise ConfigError(f"MMIO range {base:#x}+{length:#x} is empty")
        for start, size, _ in self._map.devices:
            if base < start + size and start < base + length:
                raise ConfigError(f"MMIO range {base:#x}+{length:#x} overlaps {start:#x}+{size:#x}")
        self._map = _Map(sorted([*self._map.devices, (base, length, device)], key=lambda row: row[0]))

    def remove(self, base: int) -> None:
        """Take away the device placed at `base`. Nothing happens where there is none."""
        self._map = _Map([row for row in self._map.devices if row[0] != base])

    def read(self, address: int, size: int) -> int:
        """A load of 1 to 8 bytes."""
        hit = self._map.find(address, size)
        if hit is None:
            if self.ram is not None and self.ram.contains(address, size):
                return int.from_bytes(self.ram.read(address, size), "little")
            self.unclaimed += 1
            return (1 << 8 * size) - 1
        return hit[2].read(address - hit[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        """A store of 1 to 8 bytes."""
        hit = self._map.find(address, size)
        if hit is not None:
            hit[2].write(address - hit[0], size, value)
        elif self.ram is not None and self.ram.contains(address, size):
            self.ram.write(address, value.to_bytes(size, "little"))
        else:
            self.unclaimed += 1


class _Map:
    """The devices at one moment; only `last`, a short cut, changes."""

    __slots__ = ("devices", "last", "starts")

    def __init__(self, devices: list[tuple[int, int, Device]]) -> None:
        self.devices = devices
        self.starts = [row[0] for row in devices]
        self.last: tuple[int, int, Device] | None = None

    def find(self, address: int, size: int) -> tuple[int, int, Device] | None:
        hit = self.last
        if hit is None or not hit[0] <= address < hit[0] + hit[1]:
            if not self.starts:
                return None
            from bisect import bisect_right  # a machine without MMIO devices needs none

            at = bisect_right(self.starts, address) - 1
            if at < 0:
                return None
            hit = self.devices[at]
            if address >= hit[0] + hit[1]:
                return None
            self.last = hit
        return hit if address + size <= hit[0] + hit[1] else None    # one that ends beyond the device is nobody's
