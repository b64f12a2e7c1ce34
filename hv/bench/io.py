"""`pyhv bench io`: disks, network, console, shared folder and vsock, beside their peers and plain host calls.

The guest (guests/bench) drives disks, network and console from ring 3, so that on a host that emulates ring 0 the
devices are measured and not the guest's kernel. Shared folder and vsock are driven by the mock driver (hv/testing.py),
since their protocols take a kernel's worth of code. Every figure comes from whole runs, one after the other, in a new
order each round; the tap, the files and the host's programs are the same for all.

    io_disk.py, io_net.py, io_share.py, io_vsock.py     the groups          idle.py     what devices cost at rest

Driven by tests/kvm/test_bench_io.py.
"""

from __future__ import annotations

__all__ = ["bench_io"]

import os
import random
import sys
import tempfile
from pathlib import Path

from hv.bench.harness import say, write_json
from hv.bench.idle import idle
from hv.bench.io_disk import disk_group
from hv.bench.io_group import AMOUNTS, MIB, QUICK, program
from hv.bench.io_guest import QEMU
from hv.bench.io_net import console_group, net_group
from hv.bench.io_share import share_group
from hv.bench.io_vsock import vsock_group
from hv.bench.netpeer import NetPeer

FILE_MIB = 256                  # small enough for the page cache


def bench_io(rounds: int, quick: bool, file: str | None) -> int:
    """Run all groups, print the tables, write the samples to `file`. `quick`: small amounts, to see that it works."""
    amounts = QUICK if quick else AMOUNTS
    dice = random.Random(1)
    program("qemu-system-x86", QEMU)
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as name, NetPeer() as peer:
        place = Path(name)
        image = place / "disk.img"
        with open(image, "wb") as out:
            for _ in range(FILE_MIB):
                out.write(os.urandom(MIB))
        groups = [disk_group(image, amounts), console_group(place, amounts), share_group(place, image, amounts),
                  vsock_group(amounts)]
        if peer.tap:
            groups.append(net_group(peer, amounts))
        else:
            say(f"no network figures: {peer.reason}")
        for number in range(-1, rounds):        # one round to warm up
            say(f"round {max(0, number + 1)} of {rounds}")
            for group in groups:
                group.round(dice, number >= 0)
        at_rest = idle(place, image, peer.tap, peer.words, quick)
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
