"""Idle clones of one snapshot in this process: says how they do in a line of JSON, then waits for its input's end.

    python3 hv/bench/snapshot_clones.py FOLDER COUNT FIRST WATCH [GROUP]

COUNT machines, clones FIRST and on; their processors' wake-ups are counted for WATCH seconds. GROUP is a cgroup's
folder, of which the process becomes a member first. Run by hv/bench/snapshot_density.py in an interpreter without site
packages, as a program that only does this would be.
"""

from __future__ import annotations

__all__ = ["main"]

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.machine.machine import Machine

_SETTLE = 3.0           # s until what the guests do because they were restored is done


def main(folder: str, count: int, first: int, watch: float, group: str = "") -> None:
    """Restore, start, look, say."""
    if group:
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write("0")
    from hv.snapshot.clone import distinct
    from hv.snapshot.format import Snapshot
    from hv.snapshot.restore import restore

    snapshot = Snapshot(folder)
    config, name = snapshot.part("config"), snapshot.part("id", kind=str)
    began = time.perf_counter()
    if count == 1:
        with restore(snapshot, recipe=distinct(config, first, name)) as machine:
            machine.start()
            spent = time.perf_counter() - began
            _look([machine], watch, spent, machine.wait)
            return

    from hv.machine.fleet import Host

    with Host() as host:
        began = time.perf_counter()
        for number in range(first, first + count):
            machine = restore(snapshot, loop=host.loop, io=host.io, recipe=distinct(config, number, name))
            host.adopt(f"clone.{number}", machine)
            machine.start()
        spent = (time.perf_counter() - began) / count
        _look(list(host.machines.values()), watch, spent, time.sleep)


def _look(machines: list[Machine], watch: float, spent: float, wait: Callable[[float], object]) -> None:
    from hv.plainjson import dumps

    wait(_SETTLE + len(machines) / 100)
    before = [_waits(vcpu.tid) for machine in machines for vcpu in machine.vcpus]
    wait(watch)
    after = [_waits(vcpu.tid) for machine in machines for vcpu in machine.vcpus]
    found = {"running": sum(machine.running() for machine in machines), "restore_ms": spent * 1e3,
             "wakes_per_s": [(b - a) / watch for a, b in zip(before, after, strict=True)]}
    print(dumps(found), flush=True)
    sys.stdin.read()        # nothing happens meanwhile that a loop would have to serve


def _waits(tid: int) -> int:
    """How often a thread has gone to sleep so far."""
    with open(f"/proc/self/task/{tid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))


if __name__ == "__main__":
    sys.path[:] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), *sys.path[1:]]
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
