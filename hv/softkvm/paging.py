"""Walking a guest's page tables in software (SDM 3A, chapter 4): linear addresses for completed instructions.

Tables are the guest's: an entry that points outside RAM is a page fault, never an error of ours.
"""

from __future__ import annotations

__all__ = ["PageFault", "copy_in", "copy_out", "tables", "walk"]

from hv.memory.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_x86 import Sregs
    from hv.memory.guest import GuestMemory

CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_LMA = 1 << 10
PRESENT, WRITE, USER, LARGE = 1, 2, 4, 1 << 7
ADDRESS = 0x000FFFFFFFFFF000
FAULT_PRESENT, FAULT_WRITE, FAULT_USER = 1, 2, 4        # error code bits (SDM 3A, 4.7)


class PageFault(Exception):
    """The access faults: CR2 and the error code the guest is to see."""

    def __init__(self, address: int, code: int) -> None:
        super().__init__(f"page fault at {address:#x}")
        self.address = address
        self.code = code


def walk(memory: GuestMemory, sregs: Sregs, linear: int, *, write: bool = False) -> int:
    """The guest-physical address of `linear`, with the permissions of the current privilege level. PageFault else."""
    if not sregs.cr0 & CR0_PG:
        return linear & 0xFFFFFFFF
    user = sregs.cs.dpl == 3
    code = (FAULT_WRITE if write else 0) | (FAULT_USER if user else 0)
    if sregs.efer & EFER_LMA:
        levels, width = (5 if sregs.cr4 & CR4_LA57 else 4), 9
    else:
        levels, width = (3, 9) if sregs.cr4 & CR4_PAE else (2, 10)
    size = 8 if width == 9 else 4
    table = sregs.cr3 & (ADDRESS if levels > 3 else 0xFFFFFFE0 if levels == 3 else 0xFFFFF000)
    allowed = WRITE | USER
    for level in range(levels, 0, -1):
        shift = 12 + width * (level - 1)
        at = table + (linear >> shift & (1 << width) - 1) * size
        if not memory.contains(at, size):
            raise PageFault(linear, code)
        entry = memory.u64(at) if size == 8 else memory.u32(at)
        if not entry & PRESENT:
            raise PageFault(linear, code)
        if level < 3 or levels > 3:         # PAE's four top entries carry no permissions
            allowed &= entry
        large = entry & LARGE and level > 1 and (size == 8 or sregs.cr4 & CR4_PSE) and level < 4
        if level == 1 or large:
            page = (1 << shift) - 1
            base = entry & (ADDRESS if size == 8 else 0xFFFFF000) & ~page
            if (user and not allowed & USER) or (write and not allowed & WRITE and (user or sregs.cr0 & CR0_WP)):
                raise PageFault(linear, code | FAULT_PRESENT)
            return base | linear & page
        table = entry & (ADDRESS if size == 8 else 0xFFFFF000)
    raise AssertionError("a walk ends at level 1")


def tables(memory: GuestMemory, sregs: Sregs, linear: int) -> list[int]:
    """Where the entries stand that a walk for `linear` uses, top level first; up to the first that is not present."""
    places: list[int] = []

    class _Noting:
        contains = staticmethod(memory.contains)

        @staticmethod
        def u64(at: int) -> int:
            places.append(at)
            return memory.u64(at)

        @staticmethod
        def u32(at: int) -> int:
            places.append(at)
            return memory.u32(at)

    try:
        walk(_Noting, sregs, linear)    # type: ignore[arg-type]
    except PageFault:
        pass
    return places


def copy_in(memory: GuestMemory, sregs: Sregs, linear: int, length: int) -> bytes:
    """`length` bytes at `linear`. PageFault where a page is missing or is not RAM."""
    data = b""
    while len(data) < length:
        at = linear + len(data) & 0xFFFFFFFFFFFFFFFF
        size = min(length - len(data), PAGE_SIZE - (at & PAGE_SIZE - 1))
        gpa = walk(memory, sregs, at)
        if not memory.contains(gpa, size):
            raise PageFault(at, 0)
        data += memory.read(gpa, size)
    return data


def copy_out(memory: GuestMemory, sregs: Sregs, linear: int, data: bytes) -> None:
    """Store `data` at `linear`; nothing is written when any of its pages faults."""
    pieces = []
    done = 0
    while done < len(data):
        at = linear + done & 0xFFFFFFFFFFFFFFFF
        size = min(len(data) - done, PAGE_SIZE - (at & PAGE_SIZE - 1))
        gpa = walk(memory, sregs, at, write=True)
        if not memory.contains(gpa, size):
            raise PageFault(at, FAULT_WRITE)
        pieces.append((gpa, data[done:done + size]))
        done += size
    for gpa, piece in pieces:
        memory.write(gpa, piece)
