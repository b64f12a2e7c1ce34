"""`pyhv bench io`: disks, network and console under the bench guest, beside QEMU microvm and plain host calls.

The guest (guests/bench) drives its devices from ring 3, so that on a host that emulates ring 0 the devices are
measured and not the guest's kernel. Every figure comes from whole processes, one after the other, in a new order each
round; the tap, the file and the host's programs are the same for all. Driven by tests/kvm/test_bench_guest.py.
"""

from __future__ import annotations

__all__ = ["bench_io", "parse"]

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hv.bench.harness import Case, launcher, say, table, write_json
from hv.bench.idle import idle
from hv.bench.netpeer import NetPeer
from hv.errors import HvError
from hv.guests import path as guest_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
MEMORY = 64                     # MiB of guest RAM
FILE_MIB = 256                  # small enough for the page cache
# How much of each: MiB, requests at depth 32 and 1, segments, packets, bytes; and a twentieth of that.
AMOUNTS = {"sequential": 1024, "random": 60000, "single": 2000, "segments": 8000, "round-trips": 1000,
           "console": 8 * MIB}
QUICK = {name: amount // 20 for name, amount in AMOUNTS.items()}
_TIMEOUT = 120
_LINE = re.compile(rb"bench: ([a-z-]+) (.*=.*)")
QEMU = ("-M", "microvm,x-option-roms=off,isa-serial=on,acpi=off", "-accel", "kvm", "-nodefaults", "-no-user-config",
        "-nographic", "-no-reboot", "-m", str(MEMORY), "-serial", "stdio", "-global", "virtio-mmio.force-legacy=false")

Values = dict[str, dict[str, int]]


class Run:
    """One way to do a group's work: `name`, and `sample()` that does it once: {measure: value}."""

    def __init__(self, name: str, sample: Callable[[], dict[str, float]]) -> None:
        self.name = name
        self.sample = sample


class Group:
    """Runs that do the same work; `measures` is {measure: (title, unit)}, ratios are to the run named `base`."""

    def __init__(self, measures: dict[str, tuple[str, str]], base: str, runs: list[Run]) -> None:
        self.measures = measures
        self.base = base
        self.runs = runs
        self.cases = {measure: {run.name: Case(run.name, unit, lambda: 0.0) for run in runs}
                      for measure, (_, unit) in measures.items()}

    def round(self, dice: random.Random, keep: bool) -> None:
        """Do every run once."""
        for run in dice.sample(self.runs, len(self.runs)):
            for measure, value in run.sample().items():
                if keep:
                    self.cases[measure][run.name].series.samples.append(value)

    def tables(self) -> list[str]:
        """One for each measure, of the runs that have it."""
        found = []
        for measure, (title, _) in self.measures.items():
            cases = [case for case in self.cases[measure].values() if case.series.samples]
            if cases:
                found.append(table(title, cases, next((case for case in cases if case.name == self.base), None)))
        return found


def bench_io(rounds: int, quick: bool, file: str | None) -> int:
    """Run all groups, print the tables, write the samples to `file`. `quick`: small amounts, to see that it works."""
    amounts = QUICK if quick else AMOUNTS
    dice = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as place, NetPeer() as peer:
        image = Path(place) / "disk.img"
        with open(image, "wb") as out:
            for _ in range(FILE_MIB):
                out.write(os.urandom(MIB))
        groups = [_block(image, amounts), _console(Path(place), amounts)]
        if peer.tap:
            groups.append(_net(peer, amounts))
        else:
            say(f"no network figures: {peer.reason}")
        for number in range(-1, rounds):        # one round to warm up
            say(f"round {max(0, number + 1)} of {rounds}")
            for group in groups:
                group.round(dice, number >= 0)
        at_rest = idle(Path(place), image, peer.tap, peer.words, quick)
    host = (f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, Linux {os.uname().release}, "
            f"Python {sys.version.split()[0]}")
    print(host)
    for group in groups:
        print("\n".join(group.tables()))
    print("\n".join(at_rest.lines()))
    if file is not None:
        cases = [{"group": group.measures[measure][0], "name": case.name, "unit": case.unit, **case.series.data()}
                 for group in groups for measure, row in group.cases.items() for case in row.values()
                 if case.series.samples]
        write_json(file, {"host": host, "idle": at_rest.data(), "cases": cases})
    return 0


def parse(output: bytes) -> Values:
    """The bench guest's lines: {test: {name: number}}."""
    found: Values = {}
    for name, rest in _LINE.findall(output):
        found[name.decode()] = {key: int(value) for key, _, value in
                                (word.partition("=") for word in rest.decode().split()) if value.isdigit()}
    return found


def _run(command: list[str], output: Path | None = None) -> Values:
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


def _pyhv(work: str, *options: str) -> list[str]:
    return [*launcher(), "boot", guest_path("bench"), "--memory", f"{MEMORY}M", "--timeout", str(_TIMEOUT - 10),
            "--quiet", "--cmdline", work, *options]


def _qemu(work: str, *options: str) -> list[str] | None:
    program = shutil.which("qemu-system-x86_64")
    return [program, *QEMU, "-kernel", guest_path("bench"), "-append", work, *options] if program else None


# disks -------------------------------------------------------------------------------------------


def _words(amounts: dict[str, int], *names: str) -> str:
    return " ".join(f"{name}={amounts[name]}" for name in names)


def _block(image: Path, amounts: dict[str, int]) -> Group:
    work = _words(amounts, "sequential", "random", "single")

    def measure(values: Values) -> dict[str, float]:
        return {"sequential": values["sequential"]["bytes"] * 1e3 / values["sequential"]["ns"],
                "random": values["random"]["requests"] * 1e9 / values["random"]["ns"],
                "single": values["single"]["ns"] / 1e3 / values["single"]["requests"]}

    runs = [Run("pyhv", lambda: measure(_run(_pyhv(work, "--disk", f"{image},readonly"))))]
    drive = ("-drive", f"id=d,file={image},format=raw,if=none,readonly=on")
    plain = _qemu(work, *drive, "-device", "virtio-blk-device,drive=d")
    threaded = _qemu(work, *drive, "-object", "iothread,id=t", "-device", "virtio-blk-device,drive=d,iothread=t")
    if plain and threaded:
        runs += [Run("QEMU microvm", lambda: measure(_run(plain))),
                 Run("QEMU microvm, iothread", lambda: measure(_run(threaded)))]
    runs.append(Run("host, one thread of preads", lambda: _host_reads(image, amounts)))
    return Group({"sequential": ("Disk: sequential reads of 1 MiB, 4 in flight, file in the page cache", "MB/s"),
                  "random": ("Disk: random reads of 4 KiB, 32 in flight", "1/s"),
                  "single": ("Disk: random reads of 4 KiB, one at a time", "us")}, "host, one thread of preads", runs)


def _host_reads(image: Path, amounts: dict[str, int]) -> dict[str, float]:
    """The same reads by this process, without a guest."""
    fd = os.open(image, os.O_RDONLY)
    try:
        buffer = [bytearray(MIB)]
        start = time.perf_counter_ns()
        for number in range(amounts["sequential"]):
            os.preadv(fd, buffer, number % FILE_MIB * MIB)
        sequential = time.perf_counter_ns() - start
        dice, small = random.Random(1), [bytearray(4096)]
        offsets = [dice.randrange(FILE_MIB * MIB // 4096) * 4096 for _ in range(amounts["random"])]
        start = time.perf_counter_ns()
        for offset in offsets:
            os.preadv(fd, small, offset)
        each = (time.perf_counter_ns() - start) / len(offsets)
    finally:
        os.close(fd)
    return {"sequential": amounts["sequential"] * MIB * 1e3 / sequential, "random": 1e9 / each, "single": each / 1e3}


# network -----------------------------------------------------------------------------------------


def _net(peer: NetPeer, amounts: dict[str, int]) -> Group:
    work = f"{_words(amounts, 'segments', 'round-trips')} {peer.words}"

    def measure(values: Values) -> dict[str, float]:
        return {"stream": values["stream"]["bytes"] * 8 / values["stream"]["ns"],
                "trip": values["round-trips"]["median-ns"] / 1e3}

    runs = [Run("pyhv", lambda: measure(_run(_pyhv(work, "--net", f"tap={peer.tap}"))))]
    command = _qemu(work, "-netdev", f"tap,id=n,ifname={peer.tap},script=no,downscript=no",
                    "-device", "virtio-net-device,netdev=n")
    if command:
        runs.append(Run("QEMU microvm", lambda: measure(_run(command))))
    return Group({"stream": ("Network: guest to a TCP socket of the host over a tap, segments of 64 KiB", "Gbit/s"),
                  "trip": ("Network: round trip of a small UDP packet, median of a run", "us")}, "QEMU microvm", runs)


# console -----------------------------------------------------------------------------------------


def _console(place: Path, amounts: dict[str, int]) -> Group:
    work = _words(amounts, "console")

    def measure(values: Values) -> dict[str, float]:
        return {"console": values["console"]["bytes"] * 1e3 / values["console"]["ns"]}

    runs = [Run("pyhv", lambda: measure(_run(_pyhv(work, "--console", "virtio"), place / "out")))]
    command = _qemu(work, "-chardev", f"file,id=c,path={place / 'console'}", "-device", "virtio-serial-device",
                    "-device", "virtconsole,chardev=c")
    if command:
        runs.append(Run("QEMU microvm", lambda: measure(_run(command))))
    title = "Console: virtio-console to a file, buffers of 4 KiB"
    return Group({"console": (title, "MB/s")}, "QEMU microvm", runs)
