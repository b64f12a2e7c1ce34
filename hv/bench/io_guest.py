"""The bench guest (guests/bench) under pyhv and under QEMU: commands, and what it printed.

Driven by tests/kvm/test_bench_guest.py.
"""

from __future__ import annotations

__all__ = ["parse", "pyhv_command", "qemu_command", "run_guest", "words"]

import os
import re
import shutil
import subprocess

from hv.bench.harness import launcher
from hv.errors import HvError
from hv.guests import path as guest_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

MEMORY = 64                     # MiB of guest RAM
QEMU = "qemu-system-x86_64"
_MICROVM = ("-M", "microvm,x-option-roms=off,isa-serial=on,acpi=off", "-accel", "kvm", "-nodefaults",
            "-no-user-config", "-nographic", "-no-reboot", "-m", str(MEMORY), "-serial", "stdio",
            "-global", "virtio-mmio.force-legacy=false")
_TIMEOUT = 120
_LINE = re.compile(rb"bench: ([a-z-]+) (.*=.*)")

Values = dict[str, dict[str, int]]


def words(amounts: dict[str, int], *names: str) -> str:
    """What the guest's command line says of its work."""
    return " ".join(f"{name}={amounts[name]}" for name in names)


def pyhv_command(work: str, *options: str) -> list[str]:
    """The guest under pyhv."""
    return [*launcher(), "boot", guest_path("bench"), "--memory", f"{MEMORY}M", "--timeout", str(_TIMEOUT - 10),
            "--quiet", "--cmdline", work, *options]


def qemu_command(work: str, *options: str) -> list[str] | None:
    """The guest under QEMU, if that is installed."""
    found = shutil.which(QEMU)
    return [found, *_MICROVM, "-kernel", guest_path("bench"), "-append", work, *options] if found else None


def run_guest(command: list[str], output: Path | None = None) -> Values:
    """Run a guest to its end; what it prints goes to the file `output`, or through a pipe."""
    try:
        with open(output or os.devnull, "wb") as file:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file if output else subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise HvError(f"the benchmark guest under {os.path.basename(command[0])} hangs") from None
    text = output.read_bytes() if output else done.stdout
    if b"bench: done" not in text:
        last = (text[-300:] + b"\n" + done.stderr[-300:]).decode(errors="replace").strip()
        raise HvError(f"the benchmark guest under {os.path.basename(command[0])} failed: {last}")
    return parse(text)


def parse(output: bytes) -> Values:
    """The bench guest's lines: {test: {name: number}}."""
    found: Values = {}
    for name, rest in _LINE.findall(output):
        found[name.decode()] = {key: int(value) for key, _, value in
                                (word.partition("=") for word in rest.decode().split()) if value.isdigit()}
    return found
