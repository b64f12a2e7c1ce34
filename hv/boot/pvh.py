"""The PVH boot ABI: a 32-bit entry with struct hvm_start_info in EBX (xen/docs/misc/pvh.pandoc;
xen/include/public/arch-x86/hvm/start_info.h, version 1)."""

from __future__ import annotations

__all__ = ["write_start_info"]

from struct import pack

from hv.boot.e820 import memory_map
from hv.memory.layout import CMDLINE, PAGE_SIZE, PVH_INFO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

MAGIC = 0x336EC578              # "xEn3" with the high bit of the E set
_INFO_SIZE = 56
_MODULES = PVH_INFO + 64        # struct hvm_modlist_entry, 32 bytes each
_MEMORY_MAP = PVH_INFO + 0x400  # struct hvm_memmap_table_entry, 24 bytes each
MODULES_MAX = (_MEMORY_MAP - _MODULES) // 32
_ROWS_MAX = (PVH_INFO + PAGE_SIZE - _MEMORY_MAP) // 24


def write_start_info(memory: GuestMemory, *, modules: list[tuple[int, int, int]], rsdp: int,
                     reserved: list[tuple[int, int]]) -> int:
    """Write the block for `modules` of (gpa, bytes, gpa of its command line or 0); its address, for RBX.

    The command line stands at CMDLINE already.
    """
    rows = memory_map(memory, reserved)[:_ROWS_MAX]
    for i, (gpa, size, words) in enumerate(modules[:MODULES_MAX]):
        memory.write(_MODULES + 32 * i, pack("<QQQQ", gpa, size, words, 0))
    for i, (gpa, size, kind) in enumerate(rows):
        memory.write(_MEMORY_MAP + 24 * i, pack("<QQII", gpa, size, kind, 0))
    memory.write(PVH_INFO, pack("<IIIIQQQQII", MAGIC, 1, 0, len(modules[:MODULES_MAX]), _MODULES, CMDLINE, rsdp,
                                _MEMORY_MAP, len(rows), 0))
    return PVH_INFO
