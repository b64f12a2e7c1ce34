"""Disks: the bench guest's reads of a file in the page cache, in process and by vhost-user; QEMU's; plain host calls.

Behind vhost-user is the same qemu-storage-daemon for pyhv and for QEMU. Driven by tests/kvm/test_bench_io.py.
"""

from __future__ import annotations

__all__ = ["disk_group"]

import os
import random
import time

from hv.bench.io_group import MIB, Group, Run, background, program
from hv.bench.io_guest import MEMORY, pyhv_command, qemu_command, run_guest, words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hv.bench.io_guest import Values

DAEMON, DAEMON_PACKAGE = "qemu-storage-daemon", "qemu-system-common"
HOST = "host, one thread of preads"
_MEASURES = {"sequential": ("Disk: sequential reads of 1 MiB, 4 in flight, file in the page cache", "MB/s"),
             "random": ("Disk: random reads of 4 KiB, 32 in flight", "1/s"),
             "single": ("Disk: random reads of 4 KiB, one at a time", "us")}


def disk_group(image: Path, amounts: dict[str, int]) -> Group:
    """All ways to read `image`, a whole number of MiB."""
    work = words(amounts, "sequential", "random", "single")
    drive = ("-drive", f"id=d,file={image},format=raw,if=none,readonly=on")
    ways = {"pyhv": pyhv_command(work, "--disk", f"{image},readonly"),
            "QEMU microvm": qemu_command(work, *drive, "-device", "virtio-blk-device,drive=d"),
            "QEMU microvm, iothread": qemu_command(work, *drive, "-object", "iothread,id=t",
                                                   "-device", "virtio-blk-device,drive=d,iothread=t")}
    runs = [Run(name, _sample(command)) for name, command in ways.items() if command]
    if daemon := program(DAEMON_PACKAGE, DAEMON):
        socket = image.with_name("disk.sock")
        served = [daemon, "--blockdev", f"driver=file,node-name=d,filename={image},read-only=on",
                  "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket}"]
        ways = {"pyhv, vhost-user": pyhv_command(work, "--disk", f"vhost-user={socket}"),
                "QEMU microvm, vhost-user": qemu_command(
                    work, "-object", f"memory-backend-memfd,id=m,size={MEMORY}M,share=on",
                    "-machine", "memory-backend=m", "-chardev", f"socket,id=c,path={socket}",
                    "-device", "vhost-user-blk,chardev=c,num-queues=1")}
        runs += [Run(name, _sample(command, served, socket)) for name, command in ways.items() if command]
    runs.append(Run(HOST, lambda: _host_reads(image, amounts)))
    return Group(_MEASURES, HOST, runs)


def _sample(command: list[str], served: list[str] | None = None,
            socket: Path | None = None) -> Callable[[], dict[str, float]]:
    """What the guest found, with the program `served` behind `socket`, if any."""

    def sample() -> dict[str, float]:
        if served is None or socket is None:
            return _values(run_guest(command))
        with background(served, socket):
            return _values(run_guest(command))

    return sample


def _values(values: Values) -> dict[str, float]:
    return {"sequential": values["sequential"]["bytes"] * 1e3 / values["sequential"]["ns"],
            "random": values["random"]["requests"] * 1e9 / values["random"]["ns"],
            "single": values["single"]["ns"] / 1e3 / values["single"]["requests"]}


def _host_reads(image: Path, amounts: dict[str, int]) -> dict[str, float]:
    """The same reads by this process, without a guest."""
    fd = os.open(image, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        buffer = [bytearray(MIB)]
        start = time.perf_counter_ns()
        for number in range(amounts["sequential"]):
            os.preadv(fd, buffer, number * MIB % size)
        sequential = time.perf_counter_ns() - start
        dice, small = random.Random(1), [bytearray(4096)]
        offsets = [dice.randrange(size // 4096) * 4096 for _ in range(amounts["random"])]
        start = time.perf_counter_ns()
        for offset in offsets:
            os.preadv(fd, small, offset)
        each = (time.perf_counter_ns() - start) / len(offsets)
    finally:
        os.close(fd)
    return {"sequential": amounts["sequential"] * MIB * 1e3 / sequential, "random": 1e9 / each, "single": each / 1e3}
