"""The balloon in real Linux guests: what the host gets back is seen in this process's proportional set size."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, initrd, kernel, skip_without_build_tools
from framework.run import ROOT, needs_kvm

from hv.boot.cpio import Archive
from hv.devices.virtio.balloon import Balloon, BalloonConfig

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

MIB = 1 << 20


def pss() -> int:
    """MiB of memory that are this process's, the guest's RAM among it (man 5 proc, smaps_rollup)."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) >> 10


def until(condition: Callable[[], bool], timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


class Guest(Shell):
    """A guest with a balloon, and a program that uses memory."""

    def __init__(self, folder: Path, balloon: BalloonConfig, memory: int = 128 * MIB, **options: object) -> None:
        program = folder / "touch-memory"
        subprocess.run(["gcc", "-static", "-O2", "-o", program, ROOT / "guests/linux/touch-memory.c"], check=True,
                       timeout=60)
        more = Archive()
        more.add_file("bin/touch-memory", program.read_bytes(), 0o755)
        super().__init__(kernel("micro") / "vmlinux", devices=(balloon,), initrd=initrd() + more.finish(),
                         memory=memory, timeout=600, **options)

    @property
    def balloon(self) -> Balloon:
        device = self.machine.devices["balloon0"]
        assert isinstance(device, Balloon)
        return device

    def resize(self, size: int) -> None:
        self.balloon.set_target(size)
        until(lambda: self.balloon.actual == size)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One whose RAM is all there from the start, as if the guest had touched all of it."""
    skip_without_build_tools()
    config = BalloonConfig(size="4M", free_page_reporting=False)
    with Guest(tmp_path_factory.mktemp("balloon"), config, prefault=True) as guest:
        guest.booted()
        yield guest
        assert guest.balloon.driven and not guest.balloon.faults, guest.balloon.fault_texts


def test_the_first_size_is_reached(guest: Guest) -> None:
    until(lambda: guest.balloon.actual == 4 * MIB)


def test_inflating_gives_memory_back(guest: Guest) -> None:
    before, free = pss(), guest.balloon.statistics(wait=30)["free"]
    guest.resize(64 * MIB)
    assert 56 <= before - pss() <= 62           # 60 MiB more than before
    assert 55 * MIB <= free - guest.balloon.statistics(wait=30)["free"] <= 65 * MIB


def test_statistics_are_those_the_guest_shows(guest: Guest) -> None:
    numbers = guest.balloon.statistics(wait=30)
    shown = {line.split()[0]: int(line.split()[1]) << 10 for line in guest.run("cat /proc/meminfo").splitlines()
             if line.count(" kB")}
    assert numbers["total"] == shown["MemTotal:"]
    assert abs(numbers["free"] - shown["MemFree:"]) < 4 * MIB
    assert abs(numbers["available"] - shown["MemAvailable:"]) < 4 * MIB
    assert 0 < numbers["caches"] < numbers["total"]


def test_out_of_memory_deflates_rather_than_kills(guest: Guest) -> None:
    free = guest.balloon.statistics(wait=30)["free"]
    size = guest.balloon.actual + (free - 8 * MIB) // MIB * MIB
    guest.resize(size)
    assert "touched 12 MiB\nended with 0\n" in guest.run("touch-memory 12; echo ended with $?", timeout=200)
    assert "oom-kill" not in guest.run("dmesg | tail -20")
    assert guest.balloon.actual <= size - 2 * MIB


def test_deflated_memory_is_the_guests_again(guest: Guest) -> None:
    guest.resize(0)
    assert "touched 8 MiB" in guest.run("touch-memory 8", timeout=200)
    assert guest.balloon.statistics(wait=30)["free"] > 80 * MIB


def test_an_idle_balloon_does_nothing(guest: Guest) -> None:
    guest.run("true")
    device = guest.balloon
    calls: list[int] = []
    notified = device.notified
    device.notified = lambda index: (calls.append(index), notified(index))[1]       # type: ignore[method-assign]
    time.sleep(2)
    del device.notified     # type: ignore[method-assign]
    assert not calls


def test_what_the_guest_frees_is_reported_and_leaves(tmp_path: Path) -> None:
    """Linux reports blocks of 4 MiB, two seconds after there are any, while 128 MiB and more are free."""
    skip_without_build_tools()
    with Guest(tmp_path, BalloonConfig(), memory=256 * MIB) as guest:
        guest.booted()
        before = pss()
        guest.machine.console.send(b"touch-memory 32 1\n")
        guest.wait_for(b"touched 32 MiB", timeout=200)
        full = pss()
        assert full - before >= 26
        guest.wait_for(b"pyhv# ")
        until(lambda: pss() <= full - 16, timeout=60)
        assert guest.balloon.discarded and not guest.balloon.faults
        assert "touched 4 MiB" in guest.run("touch-memory 4")       # reported memory is the guest's to use again
