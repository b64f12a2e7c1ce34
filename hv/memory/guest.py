"""GuestMemory: all RAM of one guest, reached by guest-physical address, every access checked.

The vm-memory crate's rule is kept: consumers see addresses and bytes, never the mapping itself.
Driven by tests/unit/test_memory.py.
"""

from __future__ import annotations

__all__ = ["GuestMemory"]

from ctypes import addressof, c_char

from hv.errors import ConfigError, GuestError
from hv.memory.layout import MIN_RAM, PAGE_SIZE, ram_ranges
from hv.memory.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap

    from hv.memory.dirty import PageSet

    Buffer = bytes | bytearray | memoryview | mmap


class GuestMemory:
    """`size` bytes of RAM from address 0 up, with the MMIO hole below 4 GiB left out.

    ConfigError where the size is not a whole number of pages, too small, or more than the host has. With `file` it
    begins as that file's content, the ranges one behind the other (see Region).
    """

    def __init__(self, size: int, *, backing: str = "anon", huge: str = "", ksm: bool = False,
                 prefault: bool = False, file: int = -1) -> None:
        if size < MIN_RAM or size % PAGE_SIZE:
            raise ConfigError(f"guest memory of {size} bytes: needs at least {MIN_RAM >> 20} MiB and whole pages",
                              "use --memory 128M or more for Linux")
        total = host_memory()
        if total and size > total:
            raise ConfigError(f"guest memory of {size >> 20} MiB is more than the host has ({total >> 20} MiB)",
                              "ask for less with --memory")
        self.size = size
        self.dirty: PageSet | None = None       # where somebody wants to know, what pyhv writes is noted here
        self.look: Callable[[], None] | None = None     # looks at the file behind it, where there is one
        # told of [gpa, gpa+length) before it is touched, while not all of RAM is KVM's (hv/machine/ramslots.py)
        self.first_use: Callable[[int, int], None] | None = None
        self.regions: tuple[Region, ...] = ()
        offset = 0
        try:
            for gpa, length in ram_ranges(size):
                region = Region(gpa, length, backing=backing, huge=huge, ksm=ksm, prefault=prefault, file=file,
                                file_offset=offset)
                self.regions = (*self.regions, region)
                offset += length
        except BaseException:
            self.close()
            raise

    def _find(self, gpa: int, length: int) -> Region:
        for region in self.regions:
            if region.gpa <= gpa and length >= 0 and gpa + length <= region.gpa + region.size:
                return region
        raise GuestError("not guest RAM", gpa, length)

    def _reach(self, gpa: int, length: int) -> Region:
        region = self._find(gpa, length)
        if (told := self.first_use) is not None:        # another thread may take it away
            told(gpa, length)
        return region

    def contains(self, gpa: int, length: int) -> bool:
        """True where [gpa, gpa+length) lies inside one RAM range."""
        return any(r.gpa <= gpa and length >= 0 and gpa + length <= r.gpa + r.size for r in self.regions)

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view of [gpa, gpa+length), which must lie in one range. Drop it before close()."""
        region = self._reach(gpa, length)
        start = gpa - region.gpa
        return region.view[start:start + length]

    def host_address(self, gpa: int, length: int) -> int:
        """The address in this process where [gpa, gpa+length) is mapped."""
        region = self._reach(gpa, length)
        return region.host + gpa - region.gpa

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of [gpa, gpa+length)."""
        region = self._reach(gpa, length)
        start = gpa - region.gpa
        return bytes(region.view[start:start + length])

    def write(self, gpa: int, data: Buffer) -> None:
        """Copy `data` to `gpa`."""
        source = memoryview(data).cast("B")
        region = self._reach(gpa, len(source))
        start = gpa - region.gpa
        region.view[start:start + len(source)] = source
        if self.dirty is not None:
            self.dirty.mark(gpa, len(source))

    def fill(self, gpa: int, length: int, byte: int = 0) -> None:
        """Set [gpa, gpa+length) to `byte`, a MiB at a time."""
        step = min(length, 1 << 20)
        block = bytes([byte]) * step
        self._find(gpa, length)
        for at in range(gpa, gpa + length, step or 1):
            self.write(at, block[:min(step, gpa + length - at)])

    def discard(self, gpa: int, length: int) -> int:
        """Give the host its pages of [gpa, gpa+length), in one range; how many bytes (Region.discard)."""
        region = self._find(gpa, length)
        if self.dirty is not None:
            self.dirty.mark(gpa, length)
        return region.discard(gpa - region.gpa, length)

    def fetch(self) -> None:
        """Wait until all of it is here: it is (but see hv/snapshot/lazy.py)."""

    def written(self, views: list[memoryview]) -> None:
        """These views of guest RAM were written, or may be; for who tracks that."""
        if self.dirty is not None:
            for view in views:
                self.dirty.mark(self.gpa_of(view), len(view))

    def gpa_of(self, view: memoryview) -> int:
        """Where `view`, of guest RAM, begins. GuestError for any other."""
        host = addressof(c_char.from_buffer(view)) if len(view) else 0
        for region in self.regions:
            if 0 <= host - region.host < region.size:
                return region.gpa + host - region.host
        raise GuestError("not a view of guest RAM")

    def u8(self, gpa: int) -> int:
        """The byte at `gpa`."""
        return self.read(gpa, 1)[0]

    def u16(self, gpa: int) -> int:
        """The little-endian 16-bit word at `gpa`."""
        return int.from_bytes(self.read(gpa, 2), "little")

    def u32(self, gpa: int) -> int:
        """The little-endian 32-bit word at `gpa`."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def u64(self, gpa: int) -> int:
        """The little-endian 64-bit word at `gpa`."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def put8(self, gpa: int, value: int) -> None:
        """Store a byte."""
        self.write(gpa, (value & 0xFF).to_bytes(1, "little"))

    def put16(self, gpa: int, value: int) -> None:
        """Store a 16-bit word."""
        self.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    def put32(self, gpa: int, value: int) -> None:
        """Store a 32-bit word."""
        self.write(gpa, (value & 0xFFFFFFFF).to_bytes(4, "little"))

    def put64(self, gpa: int, value: int) -> None:
        """Store a 64-bit word."""
        self.write(gpa, (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"))

    def close(self) -> None:
        """Unmap all RAM. The VM that uses it must be closed first."""
        regions, self.regions = self.regions, ()
        for region in regions:
            region.close()


def host_memory() -> int:
    """Bytes of RAM in this host (MemTotal), 0 when it can't be told."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
