"""`pyhv bench boot`: start-up, exits and memory, beside QEMU microvm, kvmtool and a minimal C program."""

from __future__ import annotations

__all__ = ["bench_boot"]

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hv.bench.harness import Case, Group, launcher, print_groups, run_rounds, say, spawn, write_json
from hv.errors import ConfigError, HvError
from hv.guests import path as guest_path
from hv.machine.config import MachineConfig
from hv.machine.machine import Machine

MIB = 1 << 20
QEMU_LEANEST = ("-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,acpi=off", "-nodefaults",
                "-no-user-config", "-nographic", "-no-reboot", "-m", "64", "-serial", "stdio")
# mov ecx, N; 1: out 0x80, al; dec ecx; jnz 1b; mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt
_EXIT_LOOP = b"\x66\xb9%b\xe6\x80\x66\x49\x75\xfa\xba\x04\x06\xb8\x00\x34\xef\xf4"
_EXITS = 20000
_INIT_LINE = b"pyhv: init is up"


def bench_boot(rounds: int, linux: bool, file: str | None) -> int:
    """Run all cases, print the tables, write the samples to `file`."""
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as place:
        groups = [_whole_process(), *_inside(Path(place))]
        for _, cases, _ in groups:
            say(f"{', '.join(case.name for case in cases)}: {rounds} rounds")
            run_rounds(cases, rounds)
        if linux:
            group = _linux()
            run_rounds(group[1], max(3, rounds // 5), warm_up=0)
            groups.append(group)
        memory = _memory()
    host = print_groups(groups)
    print(f"Memory of a process with an idle tiny guest: {memory['private_kb'] / 1024:.1f} MiB private, "
          f"{memory['pss_kb'] / 1024:.1f} MiB PSS, of that guest RAM {memory['guest_kb'] / 1024:.1f} MiB")
    if file is not None:
        data = {"host": host, "memory": memory,
                "cases": [{"group": title, "name": case.name, "unit": case.unit, **case.series.data()}
                          for title, cases, _ in groups for case in cases]}
        write_json(file, data)
    return 0


def _whole_process() -> Group:
    tiny = guest_path("tiny")
    pyhv = Case("pyhv boot", "ms", spawn([*launcher(), "boot", tiny, "--memory", "64M"]))
    cases = [pyhv, Case("python3 -I -S -E -c pass", "ms", spawn([sys.executable, "-I", "-S", "-E", "-c", "pass"]))]
    qemu, kvmtool = shutil.which("qemu-system-x86_64"), shutil.which("lkvm") or shutil.which("kvmtool")
    base = None
    if qemu:
        base = Case("QEMU microvm, KVM", "ms", spawn([qemu, *QEMU_LEANEST, "-accel", "kvm", "-kernel", tiny]))
        cases.append(base)
    if kvmtool:
        cases.append(Case("kvmtool", "ms", spawn([kvmtool, "run", "--nodefaults", "-m", "64", "-k", tiny], (0, 1))))
    return "Tiny guest, 64 MiB, whole process", cases, base


def _inside(place: Path) -> list[Group]:
    """Warm Python against C in the same minutes: a whole VM, and one exit."""
    loop = place / "exits.img"
    code = _EXIT_LOOP % _EXITS.to_bytes(4, "little")
    loop.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
    once = place / "once.img"
    once.write_bytes((_EXIT_LOOP % (1).to_bytes(4, "little")).ljust(510, b"\0") + b"\x55\xaa")
    machine = Case("hv.Machine, warm", "ms", lambda: _library(once)[0])
    python_exit = Case("Python", "us", lambda: _library(loop)[1])
    groups: list[Group] = []
    minimal = _minimal(place)
    if minimal is None:
        return [("One VM: create, load, run to exit, close", [machine], None), ("One port exit", [python_exit], None)]
    whole = Case("minimal C, warm", "ms", lambda: float(_output(minimal, once, "2").split()[-1]) / 1e3)
    process = Case("minimal C, whole process", "ms", spawn([minimal, str(once)]))
    groups.append(("One VM: create, load, run to exit, close", [machine, whole, process], process))
    c_exit = Case("C", "us", lambda: float(_output(minimal, loop, "exits")) / 1e3)
    groups.append(("One port exit", [python_exit, c_exit], c_exit))
    return groups


def _library(image: Path) -> tuple[float, float]:
    """(ms for a whole VM, us per port exit)."""
    data = image.read_bytes()
    start = time.perf_counter_ns()
    with Machine(MachineConfig(data, memory=64 * MIB, boot_protocol="flat")) as machine:
        outcome = machine.run()
        ran = machine.phases["end"] - machine.vcpus[0].first_entry_ns
    spent = time.perf_counter_ns() - start
    if outcome.reason != "poweroff":
        raise HvError(f"the benchmark guest ended with {outcome}")
    return spent / 1e6, ran / 1e3 / _EXITS


def _minimal(place: Path) -> str | None:
    program = place / "minimal"
    source = Path(__file__).with_name("minimal.c")
    try:
        subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        say("no C compiler: the minimal C program is left out")
        return None
    return str(program)


def _output(program: str, image: Path, mode: str) -> str:
    return subprocess.run([program, str(image), mode], check=True, capture_output=True, text=True, timeout=60).stdout


def _linux() -> Group:
    from hv.kernels.cache import find
    from hv.kernels.initramfs import busybox

    folder = find("micro")
    if folder is None:
        raise ConfigError("no micro kernel in the cache", "pyhv kernel build micro")
    rootfs = folder / "rootfs.cpio"
    rootfs.write_bytes(busybox())
    command = [*launcher(), "boot", str(folder / "vmlinux"), "--initrd", str(rootfs), "--timeout", "100"]
    case = Case("pyhv boot micro", "s", lambda: _until(command, _INIT_LINE))
    return "Linux, process start to init's first line", [case], None


def _until(command: list[str], text: bytes) -> float:
    """Seconds until `command` has printed `text`."""
    start = time.perf_counter_ns()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as child:
        seen = b""
        try:
            assert child.stdout is not None
            while text not in seen:
                data = os.read(child.stdout.fileno(), 4096)
                if not data:
                    raise HvError(f"{' '.join(command)} ended without printing {text!r}")
                seen += data
            return (time.perf_counter_ns() - start) / 1e9
        finally:
            child.terminate()
            child.wait(10)


def _memory() -> dict[str, int]:
    """kB of a pyhv process whose guest waits: private, PSS, and of that guest RAM."""
    command = [*launcher(), "boot", guest_path("fault"), "--raw-cmdline", "--cmdline", "sleep", "--memory", "64M",
               "--timeout", "20"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        try:
            time.sleep(1)
            rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
            fields = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines() if line.endswith(" kB")}
            guest = 0
            size = 0
            for line in Path(f"/proc/{child.pid}/smaps").read_text().splitlines():
                if line.startswith("Size:"):
                    size = int(line.split()[1])
                elif line.startswith("Rss:") and size == 64 * 1024:
                    guest += int(line.split()[1])
        finally:
            child.terminate()
            child.wait(10)
    private = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"private_kb": private - guest, "pss_kb": fields["Pss"] - guest, "guest_kb": guest}
