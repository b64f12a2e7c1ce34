"""From a kernel file to guest memory: which boot protocol it gets, and its entry state.

`prepare` looks at the file and needs no guest; `Prepared.load` then writes it, its command line, initrd or modules and
the firmware tables into memory.

    protocol    image                   entered in          finds its information through
    linux64     bzImage, ELF vmlinux    64-bit mode         RSI: boot_params            (boot.rst)
    pvh         ELF with a PVH note     32-bit mode         RBX: hvm_start_info         (pvh.pandoc)
    multiboot   Multiboot 1             32-bit mode         RBX: multiboot information
    flat        anything small          real mode           nothing
"""

from __future__ import annotations

__all__ = ["PROTOCOLS", "Prepared", "prepare"]

from hv.boot.elf import Elf
from hv.boot.entry import LONG64, PROT32, EntryState
from hv.boot.image import BZIMAGE, FLAT, MULTIBOOT, sniff
from hv.errors import ConfigError, ImageError, StateError
from hv.memory.layout import BOOT_STACK, CMDLINE, CMDLINE_MAX, KERNEL_START, LOW_RAM_END, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.memory.guest import GuestMemory

    Image = bytes | mmap

LINUX64, PVH, MULTIBOOT1, REAL = "linux64", "pvh", "multiboot", "flat"
PROTOCOLS = (LINUX64, PVH, MULTIBOOT1, REAL)
LINUX_BANNER = b"Linux version "        # init/version.c, linux_banner


class Prepared:
    """A kernel file whose format and protocol are settled. `is_linux` decides about default command lines."""

    __slots__ = ("_elf", "_header", "_image", "_loaded", "_name", "is_linux", "protocol")

    def __init__(self, protocol: str, image: Image, name: str, elf: Elf | None = None, header: bytes = b"",
                 is_linux: bool = False) -> None:
        self.protocol = protocol
        self.is_linux = is_linux
        self._image = image
        self._name = name
        self._elf = elf
        self._header = header
        self._loaded = False

    def contains(self, text: bytes) -> bool:
        """Whether `text` stands in the (decompressed) kernel: a driver's name, say. A millisecond per 10 MB."""
        return self._image.find(text) >= 0

    def load(self, memory: GuestMemory, *, cmdline: bytes = b"", initrd: Image | None = None,
             modules: list[tuple[Image, bytes]] | None = None, cpus: int = 1, acpi: bool = True,
             reserved: list[tuple[int, int]] | None = None, aml: bytes = b"",
             pci: dict[int, int] | None = None) -> EntryState:
        """Write everything the kernel needs into `memory`; where it starts.

        `aml` describes devices beyond the fixed ones (hv/boot/acpi.py), `pci` says which interrupt each slot has.
        `reserved` ranges (gpa, bytes) are kept free and shown as reserved. ConfigError or ImageError where something
        does not fit.
        """
        if self._loaded:
            raise StateError(f"{self._name} has been loaded, and let go of", "prepare it again for another machine")
        self._loaded = True
        kept, modules = reserved or [], modules or []
        if self.protocol == REAL:
            from hv.boot.flat import load_flat

            return load_flat(memory, self._image, self._name, kept)
        _write_command_line(memory, cmdline, self._cmdline_max())
        if modules and self.protocol != MULTIBOOT1:
            raise ConfigError(f"--module is for Multiboot kernels, {self._name} is booted by {self.protocol}",
                              "use --initrd")
        if self.protocol == MULTIBOOT1:
            from hv.boot.multiboot import Multiboot

            if initrd is not None:
                modules = [(initrd, b""), *modules]
            _firmware_tables(memory, cpus, acpi, aml, pci)
            return Multiboot(self._image, self._name).load(memory, CMDLINE, modules, kept)
        assert self._elf is not None
        end = self._elf.load(memory, kept)
        rsdp = _firmware_tables(memory, cpus, acpi, aml, pci)
        place = (0, 0) if initrd is None else self._load_initrd(memory, initrd, end, kept)
        self._image = b""       # a decompressed kernel is large; it is in guest memory now
        self._elf.image = b""
        return self._enter_pvh(memory, place, rsdp, kept) if self.protocol == PVH else \
            self._enter_linux64(memory, place, rsdp, kept)

    def _enter_pvh(self, memory: GuestMemory, initrd: tuple[int, int], rsdp: int,
                   reserved: list[tuple[int, int]]) -> EntryState:
        from hv.boot.longmode import write_gdt
        from hv.boot.pvh import write_start_info

        assert self._elf is not None
        entry = self._elf.entry
        modules = [(initrd[0], initrd[1], 0)] if initrd[1] else []
        info = write_start_info(memory, modules=modules, rsdp=rsdp, reserved=reserved)
        write_gdt(memory, long_mode=False)
        return EntryState(PROT32, entry, rbx=info, rsp=BOOT_STACK)

    def _enter_linux64(self, memory: GuestMemory, initrd: tuple[int, int], rsdp: int,
                       reserved: list[tuple[int, int]]) -> EntryState:
        from hv.boot.longmode import write_gdt, write_identity_map
        from hv.boot.params import default_header, write_boot_params

        assert self._elf is not None
        zero_page = write_boot_params(memory, self._header or default_header(), initrd=initrd, rsdp=rsdp,
                                      reserved=reserved)
        write_gdt(memory, long_mode=True)
        write_identity_map(memory)
        return EntryState(LONG64, self._elf.entry, rsi=zero_page, rsp=BOOT_STACK)

    def _load_initrd(self, memory: GuestMemory, initrd: Image, end: int,
                     reserved: list[tuple[int, int]]) -> tuple[int, int]:
        """As high as the kernel allows: below its initrd_addr_max, else anywhere below 4 GiB, else above."""
        from hv.boot.e820 import place_below
        from hv.boot.params import INITRD_ADDR_MAX

        size = len(initrd)
        floor = (end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        limit = self._field(INITRD_ADDR_MAX, 4) + 1 if self._header else 0x80000000
        try:
            at = place_below(memory, size, limit, floor, reserved, "the initrd")
        except ImageError:
            high = memory.regions[-1]
            if high.gpa > KERNEL_START and size <= high.size:
                at = high.gpa + (high.size - size & ~(PAGE_SIZE - 1))
            else:
                at = place_below(memory, size, LOW_RAM_END, floor, reserved, "the initrd")
        memory.write(at, initrd)
        return at, size

    def _cmdline_max(self) -> int:
        from hv.boot.params import CMDLINE_SIZE, LINUX_CMDLINE_MAX

        if self._header:
            return min(self._field(CMDLINE_SIZE, 4), CMDLINE_MAX - 1)

        return LINUX_CMDLINE_MAX if self.is_linux else CMDLINE_MAX - 1

    def _field(self, offset: int, size: int) -> int:
        from hv.boot.params import HEADER

        return int.from_bytes(self._header[offset - HEADER:offset - HEADER + size], "little")


def prepare(image: Image, protocol: str | None = None, name: str = "kernel") -> Prepared:
    """Recognise `image` and settle on `protocol`, or the one that suits it.

    ImageError where the file is damaged or foreign, or does not offer the protocol asked for.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise ConfigError(f"--boot-protocol {protocol}: no such protocol", f"choose from {', '.join(PROTOCOLS)}")
    if not len(image):
        raise ImageError(f"{name}: the file is empty", "it may be a download that failed")
    if protocol == REAL:
        return Prepared(REAL, image, name)
    if protocol == MULTIBOOT1:
        return Prepared(MULTIBOOT1, image, name)
    kind = sniff(image, name)
    if kind in (FLAT, MULTIBOOT):
        if protocol is not None:
            raise ImageError(f"{name}: a {kind} image can't be booted by {protocol}", "leave --boot-protocol out")
        return Prepared(REAL if kind == FLAT else MULTIBOOT1, image, name)
    header = b""
    if kind == BZIMAGE:
        from hv.boot.bzimage import payload_of, setup_header

        header = setup_header(image, name)
        elf = Elf(payload_of(image, header, name), name)
    else:
        elf = Elf(image, name)
    return _prepare_elf(elf, header, protocol, kind, name)


def _prepare_elf(elf: Elf, header: bytes, protocol: str | None, kind: str, name: str) -> Prepared:
    note = elf.pvh_entry()
    # The banner stands in the plain kernel; looking for it takes a millisecond per 10 MB.
    is_linux = kind == BZIMAGE or elf.image.find(LINUX_BANNER) >= 0
    if protocol is None:
        # The 64-bit entry skips the kernel's slow start in 32-bit mode, so Linux gets it where both are there.
        protocol = PVH if note is not None and not is_linux else LINUX64
    if protocol == PVH:
        if note is None:
            raise ImageError(f"{name}: no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)",
                             "build the kernel with CONFIG_PVH=y, or use --boot-protocol linux64")
        if not any(s.paddr <= note < s.paddr + s.memsz for s in elf.loads()):
            raise ImageError(f"{name}: its PVH entry point {note:#x} is in no segment", "the ELF file is damaged")
        elf.entry = note
    elif not elf.is64:
        raise ImageError(f"{name}: a 32-bit ELF file without a Multiboot header or PVH note",
                         "pyhv enters plain ELF kernels in 64-bit mode")
    else:
        elf.entry = elf.physical_entry()
    return Prepared(protocol, elf.image, name, elf, header, is_linux)


def _write_command_line(memory: GuestMemory, cmdline: bytes, most: int) -> None:
    if len(cmdline) > most:
        raise ConfigError(f"the command line has {len(cmdline)} bytes, the kernel takes at most {most}",
                          "shorten --cmdline; --raw-cmdline leaves pyhv's own words out")
    memory.write(CMDLINE, cmdline + b"\0")


def _firmware_tables(memory: GuestMemory, cpus: int, acpi: bool, aml: bytes, pci: dict[int, int] | None) -> int:
    """ACPI and MP tables, as firmware would leave them; the RSDP's address, 0 without ACPI."""
    from hv.boot.mptable import write_mptable

    write_mptable(memory, cpus, pci)
    if not acpi:
        return 0
    from hv.boot.acpi import write_tables

    return write_tables(memory, cpus, aml)
