"""Multiboot 1 kernels: command line, memory map, modules (Multiboot Specification 0.6.96)."""

from __future__ import annotations

__all__ = ["Multiboot"]

from struct import pack

from hv.boot.e820 import memory_map
from hv.boot.elf import Elf
from hv.boot.entry import PROT32, EntryState
from hv.boot.image import ELF_MAGIC, multiboot_header
from hv.boot.longmode import write_gdt
from hv.errors import ImageError
from hv.memory.layout import BOOT_STACK, CMDLINE, KERNEL_START, LOW_RAM_END, MODULES_INFO, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.memory.guest import GuestMemory

BOOTLOADER_MAGIC = 0x2BADB002           # 3.2: EAX at entry
# header flags, 3.1.2: bits 0-15 must be understood
WANTS_PAGE_ALIGNED, WANTS_MEMORY, WANTS_VIDEO, HAS_ADDRESSES = 1, 2, 4, 1 << 16
UNDERSTOOD = WANTS_PAGE_ALIGNED | WANTS_MEMORY | WANTS_VIDEO
# information flags, 3.3
INFO_MEMORY, INFO_CMDLINE, INFO_MODS, INFO_MMAP, INFO_NAME = 1, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_LOADER_NAME = MODULES_INFO + 0x180
_MODULE_LIST = MODULES_INFO + 0x200     # 16 bytes each
_MAP = MODULES_INFO + 0x1000            # 24 bytes each
_STRINGS = MODULES_INFO + 0x2000        # module command lines
_STRINGS_END = CMDLINE
MODULES_MAX = (_MAP - _MODULE_LIST) // 16
_ROWS_MAX = (_STRINGS - _MAP) // 24


class Multiboot:
    """A kernel with a Multiboot header. ImageError where the header demands or claims what can't be."""

    __slots__ = ("_at", "_image", "_name", "elf")

    def __init__(self, image: bytes | mmap, name: str) -> None:
        at = multiboot_header(image)
        if at is None:
            raise ImageError(f"{name}: no Multiboot header in its first 8 KiB", "choose another --boot-protocol")
        flags = int.from_bytes(image[at + 4:at + 8], "little")
        if flags & 0xFFFF & ~UNDERSTOOD:
            raise ImageError(f"{name}: its Multiboot header demands unknown features ({flags & 0xFFFF:#x})",
                             "bits 0 to 2 are understood")
        self._image, self._name, self._at = image, name, at
        self.elf: Elf | None = None
        if flags & HAS_ADDRESSES:       # they count, even in an ELF file (3.1.2)
            self._addresses()
        elif image[:4] == ELF_MAGIC:
            self.elf = Elf(image, name)
            self.elf.entry = self.elf.physical_entry()
        else:
            raise ImageError(f"{name}: neither an ELF file nor load addresses in its Multiboot header")

    def load(self, memory: GuestMemory, cmdline_at: int, modules: list[tuple[bytes | mmap, bytes]],
             reserved: list[tuple[int, int]]) -> EntryState:
        """Load the kernel and its modules; EBX points to the information structure."""
        if self.elf is not None:
            end, entry = self.elf.load(memory, reserved), self.elf.entry
        else:
            entry, end = self._load_raw(memory, reserved)
        count = _load_modules(memory, modules, end, self._name, reserved)
        rows = memory_map(memory, reserved)[:_ROWS_MAX]
        table = b"".join(pack("<IQQI", 20, gpa, size, kind) for gpa, size, kind in rows)
        memory.write(_MAP, table)
        memory.write(_LOADER_NAME, b"pyhv\0")
        lower = rows[0][1]      # the map's first row starts at 0
        upper = min(memory.size, LOW_RAM_END) - KERNEL_START
        info = pack("<19I", INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_NAME, lower >> 10,
                    upper >> 10, 0, cmdline_at, count, _MODULE_LIST, 0, 0, 0, 0, len(table), _MAP, 0, 0, 0,
                    _LOADER_NAME, 0, 0)
        memory.write(MODULES_INFO, info)
        write_gdt(memory, long_mode=False)
        return EntryState(PROT32, entry, rsp=BOOT_STACK, rax=BOOTLOADER_MAGIC, rbx=MODULES_INFO)

    def _addresses(self) -> tuple[int, int, int, int, int]:
        """The address fields of the header (3.1.3): (gpa, bytes, offset in the file, end with bss, entry)."""
        image, at, name = self._image, self._at, self._name
        if at + 32 > len(image):
            raise ImageError(f"{name}: its Multiboot header is cut off", "it may be a download that failed")
        header, start, load_end, bss_end, entry = (
            int.from_bytes(image[at + i:at + i + 4], "little") for i in (12, 16, 20, 24, 28))
        offset = at - (header - start)
        size = load_end - start if load_end else len(image) - offset
        if header < start or offset < 0 or size <= 0 or offset + size > len(image):
            raise ImageError(f"{name}: the load addresses of its Multiboot header do not match the file",
                             "the file is damaged")
        return start, size, offset, max(bss_end, start + size), entry

    def _load_raw(self, memory: GuestMemory, reserved: list[tuple[int, int]]) -> tuple[int, int]:
        start, size, offset, end, entry = self._addresses()
        clash = start < KERNEL_START or any(start < gpa + length and gpa < end for gpa, length in reserved)
        if clash or not memory.contains(start, end - start) or not start <= entry < end:
            raise ImageError(f"{self._name}: it wants to be loaded at {start:#x} to {end:#x} and entered at {entry:#x}",
                             f"it must lie in RAM from {KERNEL_START:#x} up; perhaps --memory is too small")
        source = memoryview(self._image)
        try:
            memory.write(start, source[offset:offset + size])
        finally:
            source.release()
        return entry, end


def _load_modules(memory: GuestMemory, modules: list[tuple[bytes | mmap, bytes]], end: int, name: str,
                  reserved: list[tuple[int, int]]) -> int:
    """Modules go page aligned behind the kernel; how many there are."""
    if len(modules) > MODULES_MAX:
        raise ImageError(f"{name}: {len(modules)} modules, at most {MODULES_MAX} can be passed")
    strings, at = _STRINGS, end
    for number, (data, words) in enumerate(modules):
        at = (at + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        for gpa, size in sorted(reserved):
            if at < gpa + size and gpa < at + len(data):
                at = (gpa + size + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        if at + len(data) > LOW_RAM_END or not memory.contains(at, len(data)):
            raise ImageError(f"module {number} of {len(data)} bytes does not fit behind the kernel at {at:#x}",
                             "give the guest more with --memory")
        if strings + len(words) + 1 > _STRINGS_END:
            raise ImageError(f"the command lines of the modules take more than {_STRINGS_END - _STRINGS} bytes")
        memory.write(at, data)
        memory.write(strings, words + b"\0")
        memory.write(_MODULE_LIST + 16 * number, pack("<IIII", at, at + len(data), strings, 0))
        strings += len(words) + 1
        at += len(data)
    return len(modules)
