#!/usr/bin/env python3
"""Build the small guests: guests/NAME/*.{S,c} and what they use of guests/common become NAME.elf, NAME.bin, or NAME.

    guests/build.py [--out DIR] [NAME...]       all guests into hv/data, where pyhv looks for them

Needs gcc and the binutils that come with it, nothing else. The same sources and compiler give the same
bytes. hv/guests.py runs it on demand, setup.py for wheels; guests/README.md says what each guest is.
"""

from __future__ import annotations

__all__ = ["GUESTS", "BuildError", "build", "file_name", "is_stale"]

import argparse
import os
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(os.path.dirname(HERE), "hv", "data")

# How each guest is put together: the kind of file, and whether it is linked with guests/common.
LONG, PROTECTED, FLAT, BARE = "long mode, PVH", "protected mode, Multiboot", "real mode, flat", "PVH, no library"
PROGRAM = "a Linux program, no library"         # no kernel: it runs in other guests
GUESTS = {
    "agent": PROGRAM,
    "bench": LONG,
    "demo": LONG,
    "echo": LONG,
    "fault": LONG,
    "fuzz": LONG,
    "memtest": LONG,
    "multiboot": PROTECTED,
    "real": FLAT,
    "ring3": LONG,
    "smp": LONG,
    "timer": LONG,
    "tiny": BARE,
}
# What of guests/common a 32-bit guest is linked with; a 64-bit one gets all of it.
COMMON_PROTECTED = ("console.c",)

# A freestanding kernel: no libraries, no floating point or vector registers (nobody saves them), no red
# zone (interrupts use the same stack), nothing that needs a run-time (stack protector, unwind tables, CET).
FLAGS = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic", "-fno-pie",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-strict-aliasing", "-fcf-protection=none",
    "-fno-tree-loop-distribute-patterns", "-ffunction-sections", "-fdata-sections", "-mgeneral-regs-only",
)
LONG_FLAGS = ("-m64", "-mno-red-zone", "-mcmodel=small")
PROGRAM_FLAGS = ("-m64", "-Oz", "-falign-functions=1")
PROTECTED_FLAGS = ("-m32", "-march=i686", "-mregparm=0")
LINK = ("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--gc-sections", "-Wl,-z,noexecstack",
        "-Wl,-z,norelro", "-Wl,--nmagic")


class BuildError(Exception):
    """The compiler is missing or refused a source; the message says which."""


def file_name(name: str) -> str:
    """The file that `name` is built into."""
    return name + {FLAT: ".bin", PROGRAM: ""}.get(GUESTS[name], ".elf")


def is_stale(name: str, out: str = OUT) -> bool:
    """Whether the built file is missing, or older than a source, a header or this script."""
    try:
        built = os.stat(os.path.join(out, file_name(name))).st_mtime_ns
    except OSError:
        return True
    folders = [os.path.join(HERE, name), os.path.join(HERE, "common")]
    sources = [os.path.join(folder, leaf) for folder in folders for leaf in os.listdir(folder)]
    return any(os.stat(path).st_mtime_ns > built for path in [*sources, os.path.abspath(__file__)])


def build(names: list[str] | None = None, out: str = OUT) -> list[str]:
    """Build `names` (all of them by default) into `out`; the paths. BuildError where that fails."""
    if shutil.which("gcc") is None:
        raise BuildError("gcc is missing: the guests are compiled from source (apt-get install gcc)")
    out = os.path.abspath(out)
    os.makedirs(out, exist_ok=True)
    built = []
    with tempfile.TemporaryDirectory(prefix="guests-") as scratch:
        objects: dict[tuple[str, ...], list[str]] = {}
        for name in names or sorted(GUESTS):
            if name not in GUESTS:
                raise BuildError(f"there is no guest {name!r}; there are {', '.join(sorted(GUESTS))}")
            built.append(_build_one(name, out, scratch, objects))
    return built


def _build_one(name: str, out: str, scratch: str, common: dict[tuple[str, ...], list[str]]) -> str:
    kind = GUESTS[name]
    special = {PROTECTED: PROTECTED_FLAGS, PROGRAM: PROGRAM_FLAGS}.get(kind, LONG_FLAGS)
    flags = (*FLAGS, *special, "-I" + os.path.join(HERE, "common"))
    objects = _compile(os.path.join(HERE, name), flags, scratch)
    if kind in (LONG, PROTECTED):
        if flags not in common:
            only = COMMON_PROTECTED if kind == PROTECTED else None
            common[flags] = _compile(os.path.join(HERE, "common"), flags, scratch, only)
        objects += common[flags]
    script = os.path.join(HERE, name, "link.ld")
    if not os.path.exists(script):
        script = os.path.join(HERE, "common", "pvh.ld")
    target = os.path.join(out, file_name(name))
    fresh = f"{target}.{os.getpid()}.new"       # others may build or boot it this moment
    place = ["-s"] if kind == PROGRAM else ["-T", script]
    link = ["gcc", *flags[-1:], "-m32" if kind == PROTECTED else "-m64", *LINK, *place, "-o", fresh, *objects]
    try:
        _run([*link, "-Wl,--oformat=binary"] if kind == FLAT else link)
        os.chmod(fresh, 0o755 if kind == PROGRAM else 0o644)
        os.replace(fresh, target)
    finally:
        if os.path.exists(fresh):
            os.unlink(fresh)
    return target


def _compile(folder: str, flags: tuple[str, ...], scratch: str, only: tuple[str, ...] | None = None) -> list[str]:
    """One object per source, under names that link scripts can tell apart: FOLDER/LEAF.c.o, FOLDER/LEAF.S.o."""
    target = os.path.join(scratch, flags[len(FLAGS)], os.path.basename(folder))
    os.makedirs(target, exist_ok=True)
    objects = []
    for leaf in sorted(os.listdir(folder)):
        if leaf.endswith((".c", ".S")) and (only is None or leaf in only):
            objects.append(os.path.join(target, leaf + ".o"))
            _run(["gcc", *flags, "-c", leaf, "-o", objects[-1]], folder)
    return objects


def _run(command: list[str], folder: str = HERE) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False,
                          env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise BuildError(f"{' '.join(command[:1] + command[-3:])}\n{done.stderr.strip()}")


def main() -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Build the small guests.")
    parser.add_argument("--out", default=OUT, metavar="DIR", help="where to put them (hv/data)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(sorted(GUESTS))} (all)")
    arguments = parser.parse_args()
    try:
        for path in build(arguments.names, arguments.out):
            print(f"{os.path.getsize(path):7} {os.path.relpath(path)}")
    except BuildError as error:
        sys.stderr.write(f"guests/build.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
