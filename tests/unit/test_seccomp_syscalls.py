"""The table of system calls: against its generator, and against libseccomp's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from framework.seccomp import ARCHES, X32_BIT, libseccomp

from hv.container.seccomp.syscalls import ARCHITECTURES, IPC, SOCKETCALL, TABLE, read_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_generator_agrees():
    if not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists():
        pytest.skip("no kernel headers (apt-get install linux-libc-dev)")
    spec = importlib.util.spec_from_file_location("gen_syscalls", ROOT / "scripts/gen_syscalls.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    kept = generator.read(Path(TABLE).read_text())
    assert generator.write(kept) == Path(TABLE).read_text()
    for arch, table in generator.collect().items():
        # newer headers may know more, never something else
        assert {name: table[name] for name in table if name in kept[arch]} == \
            {name: kept[arch][name] for name in table if name in kept[arch]}


def test_numbers_are_unique_and_known_ones_right():
    table = read_table()
    assert table["read"] == ["0", "3", "0", "63"]
    assert table["execve"] == ["59", "11", "520", "221"]
    assert table["seccomp"] == ["317", "354", "317", "277"]
    for column in range(4):
        numbers = [row[column] for row in table.values() if row[column] != "-"]
        assert len(numbers) == len(set(numbers)) > 300


@pytest.mark.skipif(libseccomp() is None, reason="libseccomp.so.2 is not installed")
def test_libseccomp_knows_the_same_numbers():
    library, checked = libseccomp(), 0
    for arch, architecture in ARCHITECTURES.items():
        for name, row in read_table().items():
            theirs = library.seccomp_syscall_resolve_name_arch(ARCHES[arch], name.encode())
            if row[architecture.column] == "-" or theirs < 0:
                continue        # newer than the library, or one of i386's that it numbers for itself
            assert theirs == int(row[architecture.column]) | architecture.bit, (arch, name)
            checked += 1
    assert checked > 1400


@pytest.mark.skipif(libseccomp() is None, reason="libseccomp.so.2 is not installed")
def test_libseccomp_multiplexes_the_same_calls():
    resolve = libseccomp().seccomp_syscall_resolve_name_arch
    for table, base in ((SOCKETCALL, -100), (IPC, -200)):
        for name, number in table.items():
            assert resolve(ARCHES["SCMP_ARCH_X86"], name.encode()) == base - number
    assert ARCHITECTURES["SCMP_ARCH_X32"].bit == X32_BIT
