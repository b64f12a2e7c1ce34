"""The memory map that every protocol hands over in its own wrapping (ACPI 6.4, 15: types)."""

from __future__ import annotations

__all__ = ["ACPI", "RAM", "RESERVED", "memory_map", "place_below"]

from hv.errors import ImageError
from hv.memory.layout import ACPI_START, EBDA_START, KERNEL_START, LOW_RAM_END, PAGE_SIZE, VGA_HOLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

RAM, RESERVED, ACPI = 1, 2, 3


def memory_map(memory: GuestMemory, reserved: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(gpa, bytes, type) in address order, without overlaps.

    Conventional memory up to the EBDA, the BIOS area, all RAM above 1 MiB; `reserved` ranges are cut out.
    """
    rows = [(0, EBDA_START, RAM), (EBDA_START, VGA_HOLE - EBDA_START, RESERVED),
            (ACPI_START, KERNEL_START - ACPI_START, RESERVED)]
    for region in memory.regions:
        start = max(region.gpa, KERNEL_START)
        if start < region.gpa + region.size:
            rows.append((start, region.gpa + region.size - start, RAM))
    for gpa, size in reserved:
        rows = [piece for row in rows for piece in _cut(row, gpa, size)] + [(gpa, size, RESERVED)]
    return _joined(sorted(rows))


def _joined(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one type become one row: kernels search the map often."""
    joined: list[tuple[int, int, int]] = []
    for start, size, kind in rows:
        if joined and joined[-1][2] == kind and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + size, kind)
        else:
            joined.append((start, size, kind))
    return joined


def _cut(row: tuple[int, int, int], gpa: int, size: int) -> list[tuple[int, int, int]]:
    start, length, kind = row
    end = start + length
    pieces = [(start, min(end, gpa) - start, kind), (max(start, gpa + size), end - max(start, gpa + size), kind)]
    return [piece for piece in pieces if piece[1] > 0]


def place_below(memory: GuestMemory, size: int, limit: int, floor: int, taken: list[tuple[int, int]], what: str) -> int:
    """The highest page-aligned address below `limit` and 4 GiB where `size` bytes fit above `floor`.

    ImageError where they don't fit.
    """
    top = min(limit, memory.size, LOW_RAM_END)
    at = (top - size) & ~(PAGE_SIZE - 1)
    for gpa, length in sorted(taken, reverse=True):
        if at < gpa + length and gpa < at + size:
            at = (gpa - size) & ~(PAGE_SIZE - 1)
    if at < floor:
        raise ImageError(f"{what} of {size} bytes does not fit between the kernel's end ({floor:#x}) and {top:#x}",
                         f"give the guest more than {(floor + size >> 20) + 1} MiB with --memory")
    return at
