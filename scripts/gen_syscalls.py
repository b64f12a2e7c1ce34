#!/usr/bin/env python3
"""Write hv/container/seccomp/syscalls.txt: names and numbers of system calls, from the installed kernel headers.

    scripts/gen_syscalls.py            write it
    scripts/gen_syscalls.py --check    say what would differ, exit 1 if anything does

x86_64, x86 and x32 come from linux-libc-dev's asm/unistd_*.h; aarch64 from asm-generic/unistd.h with the choices of
arch/arm64/include/uapi/asm/unistd.h. What is newer than the headers is in NEWER: since Linux 5.1 a new call has
one number for all architectures. A run with older headers loses nothing that the file has, and says so.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "hv/container/seccomp/syscalls.txt"
INCLUDE = "/usr/include/x86_64-linux-gnu"
COLUMNS = ("x86_64", "x86", "x32", "aarch64")
ARM64 = ("RENAMEAT", "NEW_STAT", "SET_GET_RLIMIT", "TIME32_SYSCALLS", "SYS_CLONE3", "MEMFD_SECRET")
X32_BIT = 0x40000000

# arch/x86/entry/syscalls/syscall_64.tbl of Linux 6.19; the same in syscall_32.tbl and scripts/syscall.tbl
NEWER = {
    "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455,
    "futex_requeue": 456, "statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460,
    "lsm_list_modules": 461, "mseal": 462, "setxattrat": 463, "getxattrat": 464, "listxattrat": 465,
    "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469, "listns": 470,
}
NEWER_X86_64 = {"uretprobe": 335, "uprobe": 336}
HEAD = """# System calls by name and architecture, written by scripts/gen_syscalls.py; - not there, x32 without bit 30
# name {columns}
"""


def macros(*arguments: str) -> dict[str, str]:
    """The __NR macros that a header defines."""
    text = subprocess.run(["cc", "-E", "-dM", *arguments, "-"], input="", capture_output=True, text=True,
                          timeout=60, check=True).stdout
    return dict(re.findall(r"^#define (__NR\w+) (.+)$", text, re.M))


def numbers(table: dict[str, str]) -> dict[str, int]:
    """Names to numbers, with __NR3264_x and (__X32_SYSCALL_BIT + n) understood."""
    found = {}
    for macro, value in table.items():
        if not macro.startswith("__NR_") or macro in ("__NR_syscalls", "__NR_arch_specific_syscall"):
            continue
        while value in table:
            value = table[value]
        digits = re.fullmatch(r"\(?(?:__X32_SYSCALL_BIT \+ )?(\d+)\)?", value)
        if digits:
            found[macro[len("__NR_"):]] = int(digits[1])
    return found


def collect() -> dict[str, dict[str, int]]:
    tables = {arch: numbers(macros("-include", f"{INCLUDE}/asm/unistd_{file}.h"))
              for arch, file in (("x86_64", "64"), ("x86", "32"), ("x32", "x32"))}
    tables["aarch64"] = numbers(macros(*(f"-D__ARCH_WANT_{name}" for name in ARM64),
                                       "-include", "/usr/include/asm-generic/unistd.h"))
    for arch, table in tables.items():
        for name, number in (NEWER | (NEWER_X86_64 if arch in ("x86_64", "x32") else {})).items():
            if table.setdefault(name, number) != number:
                raise SystemExit(f"{arch}: {name} is {table[name]} in the headers, {number} here")
    return tables


def read(text: str) -> dict[str, dict[str, int]]:
    tables: dict[str, dict[str, int]] = {arch: {} for arch in COLUMNS}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, *row = line.split()
            for arch, number in zip(COLUMNS, row, strict=True):
                if number != "-":
                    tables[arch][name] = int(number)
    return tables


def write(tables: dict[str, dict[str, int]]) -> str:
    names = sorted({name for table in tables.values() for name in table})
    rows = [" ".join([name, *(str(tables[arch].get(name, "-")) for arch in COLUMNS)]) for name in names]
    return HEAD.format(columns=" ".join(COLUMNS)) + "\n".join(rows) + "\n"


def main() -> int:
    before = read(OUT.read_text()) if OUT.exists() else {arch: {} for arch in COLUMNS}
    after = collect()
    for arch in COLUMNS:
        for name, number in before[arch].items():
            if name not in after[arch]:
                print(f"{arch}: these headers do not have {name}; kept", file=sys.stderr)
                after[arch][name] = number
    if "--check" in sys.argv[1:]:
        wrong = [f"{arch}: {name} {before[arch].get(name)} -> {number}" for arch in COLUMNS
                 for name, number in after[arch].items() if before[arch].get(name) != number]
        print("\n".join(wrong), end="\n" if wrong else "")
        return bool(wrong)
    OUT.write_text(write(after))
    print(f"{OUT}: " + ", ".join(f"{len(after[arch])} {arch}" for arch in COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
