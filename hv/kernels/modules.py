"""Kernel modules for an initramfs: found by name in a kernel's modules folder, in the order in which they load.

What a module needs it says itself, in its .modinfo section (`depends=`, which modpost wrote there from the symbols it
uses), so this works with and without depmod's modules.dep, which a package that was unpacked but not installed lacks.
Compressed modules are stored plain: not every kernel undoes that. Left out on purpose: aliases, soft dependencies,
options. Driven by tests/unit/test_initramfs.py.
"""

from __future__ import annotations

__all__ = ["modules"]

from pathlib import Path

from hv.boot.decompress import expand
from hv.errors import ConfigError, ImageError

_MOST = 256 << 20       # bytes of one module
_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


def modules(folder: str, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """(name, content) of the modules called `names` and of what they need, each behind what it needs.

    Modules that the kernel has built in are left out. ConfigError names a module that is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"--modules {folder}: not a directory", "`pyhv kernel fetch` prints one with modules in it")
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*.ko*")):
        if path.name.endswith(_SUFFIXES):
            files.setdefault(_name(path.name), path)
    builtin = {_name(line.rpartition("/")[2]) for path in root.rglob("modules.builtin")
               for line in path.read_text(errors="replace").splitlines()}
    ordered: dict[str, bytes] = {}

    def add(name: str, wanted_by: tuple[str, ...]) -> None:
        if name in ordered or name in wanted_by or (name in builtin and name not in files):
            return
        if name not in files:
            behind = f", which {wanted_by[-1]} needs" if wanted_by else ""
            raise ConfigError(f"--module {name}{behind}: no {name}.ko under {folder}",
                              "names are those of the files; is it this kernel's folder?")
        content = files[name].read_bytes()
        if not files[name].name.endswith(".ko"):
            content = expand(content, _MOST, files[name].name)
        if not _is_whole(content):
            raise ImageError(f"{files[name]}: no whole ELF file", "it may be a download that failed")
        for needed in depends(content):
            add(needed, (*wanted_by, name))
        ordered[name] = content

    for name in names:
        add(_name(name), ())
    return list(ordered.items())


def depends(module: bytes) -> list[str]:
    """The modules that this one needs, by its .modinfo section: strings `key=value`, each with a NUL behind it."""
    at = module.find(b"\0depends=")
    value = module[at + 9:module.find(b"\0", at + 9)] if at >= 0 else b""
    return [_name(part) for part in value.decode("ascii", "replace").split(",") if part]


def _is_whole(module: bytes) -> bool:
    """Whether the section headers, which stand at the end, are there (ELF64: e_shoff, e_shentsize, e_shnum)."""
    offset, size, count = (int.from_bytes(module[at:at + length], "little")
                           for at, length in ((0x28, 8), (0x3A, 2), (0x3C, 2)))
    return module.startswith(b"\x7fELF") and offset + size * count <= len(module)


def _name(file: str) -> str:
    """A file's module: dashes and underscores are the same to the kernel."""
    return file.partition(".ko")[0].replace("-", "_")
