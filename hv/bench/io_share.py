"""Shared folder: the same FUSE requests to our server and to virtiofsd (hv/bench/fuse_load.py), and plain host calls.

Driven by tests/kvm/test_bench_io.py.
"""

from __future__ import annotations

__all__ = ["share_group"]

import os
import time

from hv.bench.fuse_load import BULK, BULK_DEPTH, DEPTH, FuseLoad
from hv.bench.harness import say
from hv.bench.io_group import MIB, Group, Run, background, program
from hv.devices.virtio.fs_config import ShareConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DAEMON = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "virtiofsd")
DAEMON_PACKAGE = "qemu-system-common; virtiofsd from Debian 13 on"
HOST = "host, plain calls"
FILES = 100
_SAMPLE = 64 << 10      # bytes of the big file that are compared
_MEASURES = {"getattr": (f"Shared folder: GETATTR, {DEPTH} in flight", "1/s"),
             "lookup": (f"Shared folder: LOOKUP, {DEPTH} in flight", "1/s"),
             "open": (f"Shared folder: OPEN and RELEASE (two requests), {DEPTH} in flight", "1/s"),
             "readdirplus": (f"Shared folder: READDIRPLUS of {FILES} entries, {DEPTH} in flight", "1/s"),
             "read": (f"Shared folder: READ of 1 MiB, {BULK_DEPTH} in flight, file in the page cache", "MB/s")}


def share_group(place: Path, image: Path, amounts: dict[str, int]) -> Group:
    """A folder in `place` with small files and `image`."""
    folder = place / "files"
    folder.mkdir()
    os.link(image, folder / "big")
    names = [b"file%03d" % number for number in range(FILES - 1)]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(b"small")
    with open(image, "rb") as file:
        expected = file.read(_SAMPLE)

    def sample(config: ShareConfig) -> dict[str, float]:
        with FuseLoad(config.create(), names, b"big") as load:
            found = {"getattr": _rate(load.getattr(amounts["metadata"])),
                     "lookup": _rate(load.lookup(amounts["metadata"])),
                     "open": _rate(load.open(amounts["metadata"])),
                     "readdirplus": _rate(load.readdirplus(amounts["listings"]))}
            if load.bulk == BULK:
                found["read"] = _rate(load.read(amounts["bulk"] * MIB, expected)) / 1e6
            return found

    runs = [Run("pyhv", lambda: sample(ShareConfig(folder)))]
    daemon = program(DAEMON_PACKAGE, *DAEMON)
    if daemon and os.geteuid():
        say("virtiofsd needs root, its figures are left out")
    elif daemon:
        socket = place / "share.sock"
        command = [daemon, "-f", f"--socket-path={socket}", "-o", f"source={folder}"]
        runs.append(Run("virtiofsd", _behind(command, socket, sample)))
    runs.append(Run(HOST, lambda: _host(folder, names, amounts)))
    return Group(_MEASURES, HOST, runs)


def _behind(command: list[str], socket: Path,
            sample: Callable[[ShareConfig], dict[str, float]]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        with background(command, socket):
            return sample(ShareConfig(tag="bench", vhost_user=str(socket)))

    return run


def _rate(found: tuple[int, int]) -> float:
    """So many a second."""
    return found[0] * 1e9 / found[1]


def _host(folder: Path, names: list[bytes], amounts: dict[str, int]) -> dict[str, float]:
    """What a local program would do instead: stat, open and close, scandir with stat, pread."""
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    big = os.open("big", os.O_RDONLY, dir_fd=root)
    try:
        few = names[:DEPTH]
        stats = _timed(lambda name: os.stat(name, dir_fd=root), few, amounts["metadata"])
        opens = _timed(lambda name: os.close(os.open(name, os.O_RDONLY, dir_fd=root)), few, amounts["metadata"] // 2)
        lists = _timed(lambda _: [entry.stat(follow_symlinks=False) for entry in os.scandir(root)], few,
                       amounts["listings"])
        size, buffer = os.fstat(big).st_size, [bytearray(BULK)]
        offsets = [number * BULK % size for number in range(max(1, amounts["bulk"] * MIB // BULK))]
        start = time.perf_counter_ns()
        for offset in offsets:
            os.preadv(big, buffer, offset)
        spent = time.perf_counter_ns() - start
    finally:
        os.close(big)
        os.close(root)
    return {"getattr": stats, "lookup": stats, "open": 2 * opens, "readdirplus": lists,
            "read": len(offsets) * BULK * 1e3 / spent}


def _timed(call: Callable[[bytes], object], names: list[bytes], count: int) -> float:
    rounds = max(1, count // len(names))
    start = time.perf_counter_ns()
    for _ in range(rounds):
        for name in names:
            call(name)
    return _rate((rounds * len(names), time.perf_counter_ns() - start))
