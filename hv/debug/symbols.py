"""Function names for guest addresses, from an ELF file's symbol table or a System.map."""

from __future__ import annotations

__all__ = ["Symbols"]

import os
from bisect import bisect_right

from hv.errors import ConfigError

# A kernel runs at its physical addresses until it has made page tables, linked to START_KERNEL_map
# (arch/x86/include/asm/page_64_types.h).
START_KERNEL_MAP = 0xFFFFFFFF80000000
_LOW = 1 << 30
_FUNCTION_KINDS = "TtWw"        # nm(1): text and weak symbols


class Symbols:
    """A sorted table of addresses and names."""

    def __init__(self, names: dict[int, str]) -> None:
        self._starts = sorted(names)
        self._names = [names[start] for start in self._starts]

    @classmethod
    def open(cls, path: str) -> Symbols:
        """Read `path`, an ELF file or a System.map. ConfigError where it is neither."""
        try:
            with open(path, "rb") as file:
                magic = file.read(4)
            return cls(_from_elf(path) if magic == b"\x7fELF" else _from_map(path))
        except OSError as error:
            raise ConfigError(f"symbols {path}: {os.strerror(error.errno or 0)}",
                              "name a vmlinux or System.map") from None

    @classmethod
    def beside(cls, kernel: str | None) -> Symbols:
        """The names that come with `kernel`: its own, or those of the System.map or vmlinux beside it; maybe none."""
        if kernel is None:
            return cls({})
        folder = os.path.dirname(kernel)
        version = os.path.basename(kernel).partition("-")[2]
        for candidate in (kernel, os.path.join(folder, "System.map"), os.path.join(folder, f"System.map-{version}"),
                          os.path.join(folder, "vmlinux")):
            try:
                found = cls.open(candidate)
            except ConfigError:
                continue
            if found:
                return found
        return cls({})

    def __len__(self) -> int:
        return len(self._starts)

    def function(self, address: int) -> tuple[str, int]:
        """(name, start) of the function that `address` is in, ("", 0) where none is known."""
        for candidate in (address, address + START_KERNEL_MAP) if address < _LOW else (address,):
            at = bisect_right(self._starts, candidate) - 1
            if at >= 0 and candidate - self._starts[at] < _LOW:
                return self._names[at], self._starts[at]
        return "", 0

    def name(self, address: int) -> str:
        """`function+0x1a`, or "" where none is known."""
        name, start = self.function(address)
        if not name:
            return ""
        offset = (address if address >= start else address + START_KERNEL_MAP) - start
        return f"{name}+{offset:#x}" if offset else name


def _from_map(path: str) -> dict[int, str]:
    names: dict[int, str] = {}
    with open(path, errors="replace") as file:
        for line in file:
            parts = line.split()
            if len(parts) < 3:
                if names:
                    continue
                return {}
            try:
                if parts[1] in _FUNCTION_KINDS:
                    names.setdefault(int(parts[0], 16), parts[2])
            except ValueError:
                raise ConfigError(f"symbols {path}: neither an ELF file nor a System.map") from None
    return names


def _from_elf(path: str) -> dict[int, str]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    names: dict[int, str] = {}
    with open(path, "rb") as file:
        try:
            table = ELFFile(file).get_section_by_name(".symtab")
            if not isinstance(table, SymbolTableSection):
                return {}
            for symbol in table.iter_symbols():
                code = symbol["st_info"]["type"] in ("STT_FUNC", "STT_NOTYPE") and symbol["st_shndx"] != "SHN_ABS"
                if code and symbol.name:
                    names.setdefault(symbol["st_value"], symbol.name)
        except (ELFError, KeyError, ValueError, AttributeError, UnicodeDecodeError) as error:
            raise ConfigError(f"symbols {path}: {error}", "the ELF file is damaged") from None
    return names
