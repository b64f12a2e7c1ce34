"""Every small guest on the real KVM, as a user boots it: what it prints and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from framework.run import boot, needs_kvm, no_traceback

pytestmark = needs_kvm


@pytest.mark.parametrize(("guest", "options", "last"), [
    ("tiny", (), b"hello from the guest"),
    ("real", (), b"powering off"),
    ("ring3", (), b"ring3: ok"),
    ("timer", (), b"timer: ok"),
    ("timer", ("--no-acpi",), b"timer: ok"),
    ("smp", ("--cpus", "1"), b"smp: ok"),
    ("smp", ("--cpus", "4"), b"smp: ok"),
    ("smp", ("--cpus", "3", "--no-acpi"), b"smp: ok"),
    ("memtest", (), b"memtest: 127 MiB ok, each 4096 bytes"),
    ("memtest", ("--backing", "memfd", "--memory", "32M"), b"memtest: 31 MiB ok"),
    ("memtest", ("--hugepages", "thp", "--ksm", "--memory", "32M"), b"memtest: 31 MiB ok"),
    ("memtest", ("--prefault", "--memory", "32M"), b"memtest: 31 MiB ok"),
    ("memtest", ("--memory", "8G", "--cmdline", "step=1048576"), b"memtest: 8191 MiB ok"),
])
def test_guest_powers_off(guest: str, options: tuple[str, ...], last: bytes) -> None:
    done = boot(f"guest:{guest}", "--debug-exit", *options)
    assert done.returncode == 0, done.stderr.decode()
    assert last in done.stdout
    no_traceback(done)


def test_smp_starts_every_processor() -> None:
    done = boot("guest:smp", "--cpus", "4")
    assert b"4 processors by the ACPI" in done.stdout
    assert b"800 additions by 4 processors" in done.stdout
    assert b"3 interrupts between processors" in done.stdout


def test_multiboot_hands_over_line_map_and_modules(tmp_path: Path) -> None:
    for name, content in (("first", bytes(range(200))), ("second", b"\x01" * 5000)):
        (tmp_path / name).write_bytes(content)
    done = boot("guest:multiboot", "--cmdline", "some words", "--module", f"{tmp_path}/first,its words",
                "--module", f"{tmp_path}/second", "--debug-exit")
    out = done.stdout.decode()
    assert done.returncode == 0, out
    assert "command line: some words" in out
    assert f'module 0: 200 bytes, sum {sum(range(200))}, "its words"' in out
    assert 'module 1: 5000 bytes, sum 5000, ""' in out
    assert "multiboot: ok" in out


@pytest.mark.parametrize(("words", "code", "reason"), [
    ("off", 0, b""),
    ("reset", 0, b""),
    ("i8042", 0, b""),
    ("debugexit=0", 1, b""),
    ("debugexit=5", 11, b""),
    ("debugexit=127", 255, b""),
    ("triple", 134, b"crash: triple fault on vCPU 0"),
    ("badinsn", 134, b"crash: KVM gave up"),
    ("unmapped", 134, b"crash: "),
    ("halt", 0, b"halt: every processor sleeps with interrupts off"),
    ("sleep --timeout 2", 124, b"timeout: 2 s"),
    ("spin --timeout 2", 124, b"timeout: 2 s"),
])
def test_exit_codes(words: str, code: int, reason: bytes) -> None:
    line, *options = words.split()
    done = boot("guest:fault", "--debug-exit", "--cmdline", line, *options)
    assert done.returncode == code, done.stderr.decode()
    assert reason in done.stderr
    no_traceback(done)


def test_debug_exit_is_off_unless_given() -> None:
    done = boot("guest:fault", "--cmdline", "debugexit=5")
    assert done.returncode == 134                   # it goes on, and dies by its own triple fault


def test_debug_exit_on_another_port() -> None:
    assert boot("guest:fault", "--debug-exit=0x501", "--cmdline", "debugexit=5").returncode == 134


def test_flood_is_printed_whole() -> None:
    done = boot("guest:fault", "--cmdline", "flood=3000")
    assert done.returncode == 0
    assert done.stdout.count(b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n") == 3000


def test_pasting_64_kib_loses_nothing() -> None:
    data = bytes((7 * at) % 250 + 5 for at in range(65536))
    done = boot("guest:echo", stdin=data + b"\x04")
    assert f"echo: 65536 bytes, sum {sum(data)}" in done.stdout.decode()


def test_typed_bytes_come_back_in_order() -> None:
    data = bytes(0x20 + at % 90 for at in range(4000))
    done = boot("guest:echo", "--cmdline", "echo", stdin=data + b"\x04")
    assert data in done.stdout


def test_demo_looks_around_and_takes_commands() -> None:
    done = boot("guest:demo", "--cpus", "2", stdin=b"help\rcpus\rpeek 0x100000\rnonsense\ruser\roff\r")
    out = done.stdout.decode()
    assert done.returncode == 0
    for expected in ("128 MiB of RAM", "2 found, 2 running", "16550A with FIFOs", "ACPI tables: FACP APIC",
                     "primes below a million: 78498", "00100000  04 00 00 00", "nonsense: no such command",
                     "2 system calls by syscall and 1 by int 0x80"):
        assert expected in out, expected
    assert "(bad checksum)" not in out
    assert out.count("hello from ring 3") == 2


@pytest.mark.parametrize(("command", "code"), [("reboot", 0), ("crash", 134), ("off", 0)])
def test_demo_ends_as_told(command: str, code: int) -> None:
    assert boot("guest:demo", stdin=command.encode() + b"\r").returncode == code


def test_demo_ends_by_itself_where_nobody_types() -> None:
    done = boot("guest:demo", "--cmdline", "idle=1")
    assert done.returncode == 0
    assert b"nobody types" in done.stdout


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzzing_guest_does_no_harm(seed: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = boot("guest:fuzz", "--cmdline", f"count=100000 seed={seed}", "--json", str(report), timeout=120)
    no_traceback(done)
    assert done.returncode == 0, done.stderr.decode()
    assert b"fuzz: 100000 accesses survived" in done.stdout
    assert json.loads(report.read_text())["unclaimed_mmio"] > 1000      # counted, not lost


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_fuzzing_everything_ends_in_a_known_way(seed: int) -> None:
    done = boot("guest:fuzz", "--cmdline", f"count=100000 seed={seed} all", "--debug-exit", timeout=60)
    no_traceback(done)
    assert done.returncode in (0, 124, 134) or done.returncode % 2 == 1, done.stderr.decode()
    assert done.returncode != 70 and done.returncode >= 0, done.stderr.decode()


def test_trace_names_what_happens() -> None:
    done = boot("guest:tiny", "--trace", "io,insn")
    lines = done.stderr.decode()
    assert re.search(r"cpu0 insn  rip=0x[0-9a-f]+ start\+0x[0-9a-f]+: mov ecx, 0x15", lines)
    assert re.search(r"cpu0 io .*0x0604 <- 0x3400 .*start\+0x1b: out dx, ax", lines)
    assert b"hello from the guest" in done.stdout


def test_trace_of_mmio_and_msr() -> None:
    done = boot("guest:fuzz", "--cmdline", "count=200", "--trace", "mmio,msr")
    lines = done.stderr.decode()
    assert re.search(r"cpu0 mmio ", lines)
    assert re.search(r"cpu0 msr   0xc0000080 <- 0x", lines)


def test_trace_knows_functions(tmp_path: Path) -> None:
    symbols = tmp_path / "System.map"
    symbols.write_text("0000000000100000 t note\n0000000000100018 T the_start\n")
    done = boot("guest:tiny", "--trace", "io", "--symbols", str(symbols))
    assert b"the_start" in done.stderr


def test_stats_and_profile_and_json(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = boot("guest:demo", "--cmdline", "idle=1", "--stats", "--profile", "--json", str(report))
    text = done.stderr.decode()
    assert "KVM_EXIT_IO" in text and "outside KVM_RUN" in text
    assert "profile: " in text
    data = json.loads(report.read_text())
    phases = data["phases"]
    order = ["process_start", "vm_created", "kernel_loaded", "first_entry", "first_console_byte", "end"]
    assert [phases[name] for name in order] == sorted(phases[name] for name in order)
    assert (data["outcome"]["reason"], data["outcome"]["exit_code"]) == ("poweroff", 0)
    assert data["exits"]
