"""ELF kernels: program headers, the PVH note, and copying segments to their physical addresses.

A strict reader of its own (System V ABI, chapters 4 and 5): every field is checked before it is used, and it
takes a hundred microseconds where a general library takes fifty milliseconds to import.
"""

from __future__ import annotations

__all__ = ["Elf", "Segment"]

from struct import Struct, error

from hv.errors import ImageError
from hv.memory.layout import KERNEL_START, LOW_RAM_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.memory.guest import GuestMemory

EM_386, EM_X86_64 = 3, 62
ET_EXEC, ET_DYN = 2, 3
_TYPES = {1: "an object file", 4: "a core dump"}
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
PHYS32_ENTRY = 18               # XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h): the PVH entry point
_MACHINES = {8: "MIPS", 20: "PowerPC", 21: "PowerPC 64", 22: "S390", 40: "ARM", 183: "AArch64", 243: "RISC-V"}
_PHNUM_MAX = 256
_NOTES_MAX = 1 << 16            # bytes of notes looked at, in all note segments together

# e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum
_HEADER = {1: Struct("<HHIIIIIHHH"), 2: Struct("<HHIQQQIHHH")}
_PROGRAM = {1: Struct("<IIIIIIII"), 2: Struct("<IIQQQQQQ")}


class Segment:
    """One program header. Offsets and sizes in bytes; `paddr` is where it belongs in guest RAM."""

    __slots__ = ("filesz", "kind", "memsz", "offset", "paddr", "vaddr")

    def __init__(self, kind: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int) -> None:
        self.kind = kind
        self.offset = offset
        self.vaddr = vaddr
        self.paddr = paddr
        self.filesz = filesz
        self.memsz = memsz


class Elf:
    """A parsed executable. ImageError where a header lies; `image` is read again only by `load`."""

    __slots__ = ("_name", "entry", "image", "is64", "segments")
    entry: int

    def __init__(self, image: bytes | mmap, name: str = "kernel") -> None:
        self.image = image
        self._name = name
        if len(image) < 52:
            raise self._bad("the ELF header is cut off")
        kind, order = image[4], image[5]
        if image[:4] != b"\x7fELF" or kind not in (1, 2) or order != 1:
            raise self._bad("not a little-endian ELF file", "pyhv runs x86-64 guests")
        self.is64 = kind == 2
        try:
            fields = _HEADER[kind].unpack_from(image, 16)
        except error:
            raise self._bad("the ELF header is cut off") from None
        machine, self.entry, phoff, phentsize, phnum = fields[1], fields[3], fields[4], fields[8], fields[9]
        if machine not in (EM_386, EM_X86_64):
            raise self._bad(f"an ELF file for {_MACHINES.get(machine, f'machine {machine}')}",
                            "pyhv runs x86-64 guests")
        if fields[0] not in (ET_EXEC, ET_DYN):
            raise self._bad(f"{_TYPES.get(fields[0], f'an ELF file of type {fields[0]}')}, not an executable",
                            "name the linked kernel, such as vmlinux")
        layout = _PROGRAM[kind]
        if phentsize != layout.size or not 0 < phnum <= _PHNUM_MAX or phoff + phnum * phentsize > len(image):
            raise self._bad(f"its {phnum} program headers at {phoff:#x} are not all in the file")
        self.segments: list[Segment] = []
        for at in range(phoff, phoff + phnum * phentsize, phentsize):
            values = layout.unpack_from(image, at)
            if self.is64:
                what, _, offset, vaddr, paddr, filesz, memsz, _ = values
            else:
                what, offset, vaddr, paddr, filesz, memsz, _, _ = values
            if what == PT_INTERP:
                raise self._bad("a program for an operating system, not a kernel", "name a kernel, such as vmlinux")
            if what not in (PT_LOAD, PT_NOTE):
                continue
            if offset + filesz > len(image):
                raise self._bad(f"a segment of {filesz} bytes at offset {offset:#x} reaches beyond the file",
                                "it may be a download that failed")
            if what == PT_LOAD and memsz < filesz:
                raise self._bad(f"a segment holds {filesz} bytes but takes only {memsz} in memory")
            self.segments.append(Segment(what, offset, vaddr, paddr, filesz, memsz))

    def loads(self) -> list[Segment]:
        """The segments that go to memory, empty ones left out."""
        return [segment for segment in self.segments if segment.kind == PT_LOAD and segment.memsz]

    def pvh_entry(self) -> int | None:
        """The 32-bit entry point of the PVH boot ABI, None where the file has no such note."""
        left = _NOTES_MAX
        for segment in self.segments:
            if segment.kind == PT_NOTE:
                notes = bytes(self.image[segment.offset:segment.offset + min(segment.filesz, left)])
                left -= len(notes)
                entry = _find_note(notes, b"Xen\0", PHYS32_ENTRY)
                if entry is not None:
                    return entry
        return None

    def physical_entry(self) -> int:
        """e_entry as a physical address: vmlinux has it so already, others may be linked high."""
        loads = self.loads()
        if any(s.paddr <= self.entry < s.paddr + s.memsz for s in loads):
            return self.entry
        for s in loads:
            if s.vaddr <= self.entry < s.vaddr + s.memsz:
                return self.entry - s.vaddr + s.paddr
        raise self._bad(f"its entry point {self.entry:#x} is in no segment")

    def load(self, memory: GuestMemory, reserved: list[tuple[int, int]]) -> int:
        """Copy every segment into `memory`; the end of the highest one.

        ImageError where one is not in RAM below the hole (entry needs the identity map, modules and start info
        behind the kernel 32-bit addresses), or touches what the loader itself needs below 1 MiB or `reserved`.
        """
        loads = self.loads()
        if not loads:
            raise self._bad("it has no segment to load")
        taken = [(0, KERNEL_START), *reserved]
        for segment in loads:
            start, end = segment.paddr, segment.paddr + segment.memsz
            if not memory.contains(start, segment.memsz):
                raise self._bad(f"a segment at {start:#x} to {end:#x} is not in guest RAM",
                                "give the guest more with --memory" if end < 1 << 40 else "")
            if end > LOW_RAM_END:
                raise self._bad(f"a segment at {start:#x} to {end:#x} lies above {LOW_RAM_END:#x}",
                                "link the kernel lower")
            for low, size in taken:
                if start < low + size and low < end:
                    raise self._bad(f"a segment at {start:#x} to {end:#x} overlaps the boot data at {low:#x}",
                                    f"link the kernel at {KERNEL_START:#x} or above")
        ranges = sorted((segment.paddr, segment.paddr + segment.memsz) for segment in loads)
        for (_, end), (start, _) in zip(ranges, ranges[1:], strict=False):  # noqa: RUF007 - itertools is not loaded yet
            if start < end:
                raise self._bad(f"a segment at {start:#x} overlaps another, which ends at {end:#x}")
        source = memoryview(self.image)
        try:
            for segment in loads:
                memory.write(segment.paddr, source[segment.offset:segment.offset + segment.filesz])
        finally:
            source.release()
        return max(segment.paddr + segment.memsz for segment in loads)

    def _bad(self, what: str, hint: str = "") -> ImageError:
        return ImageError(f"{self._name}: {what}", hint or "the ELF file is damaged")


def _find_note(notes: bytes, owner: bytes, kind: int) -> int | None:
    """The first descriptor of that owner and type as an integer (System V ABI, "Note Section")."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, found = (int.from_bytes(notes[at + i:at + i + 4], "little") for i in (0, 4, 8))
        name_end = at + 12 + (name_size + 3 & ~3)
        if name_end + size > len(notes):
            return None
        if found == kind and notes[at + 12:at + 12 + name_size] == owner and size in (4, 8):
            return int.from_bytes(notes[name_end:name_end + size], "little")
        at = name_end + (size + 3 & ~3)
    return None
