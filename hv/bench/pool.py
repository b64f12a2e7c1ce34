"""What a pool and a fleet cost: how long a take lasts, and what an idle machine more takes of memory and wake-ups.

Functions for `pyhv bench snapshot`; by hand

    python3 -m hv.bench.pool SNAPSHOT [N]

Kernel memory is told by a memory cgroup of version 1, where it can be made (memory.kmem.usage_in_bytes,
Documentation/admin-guide/cgroup-v1/memory.rst); the rest by /proc.
"""

from __future__ import annotations

__all__ = ["Footprint", "footprint", "take_times"]

import gc
import os
import sys
import time

from hv.bench.harness import Series
from hv.machine.fleet import Host
from hv.snapshot.format import Snapshot
from hv.snapshot.pool import Pool, clone_recipe
from hv.snapshot.restore import restore

_GROUPS = "/sys/fs/cgroup/memory"
_SETTLE = 15.0          # s in which clones come to rest
_PAUSE = 0.05           # s between two takes
_PATIENCE = 10.0        # s for a taken machine to enter the guest


def take_times(snapshot: Snapshot, rounds: int = 100, ready: int = 8) -> tuple[list[float], list[float]]:
    """Milliseconds until take() has returned, and until the machine's processor enters the guest, `rounds` times."""
    returned, entered = [], []
    with Pool(snapshot, ready) as pool:
        for _ in range(rounds):
            start = time.perf_counter_ns()
            machine = pool.take()
            returned.append((time.perf_counter_ns() - start) / 1e6)
            end = time.monotonic() + _PATIENCE
            while not machine.vcpus[0].first_entry_ns and time.monotonic() < end:
                time.sleep(0.0002)
            entered.append((machine.vcpus[0].first_entry_ns - start) / 1e6)
            time.sleep(_PAUSE)
            machine.stop()
    return returned, entered


class Footprint:
    """KiB of each clone: `pss` beyond guest RAM it has written, `dirty` RAM it has written, `kernel` memory (-1 where
    it can't be told); descriptors and threads; seconds between two `wakes` of one, ours included.
    """

    def __init__(self, count: int, values: dict[str, float]) -> None:
        self.count = count
        self.pss, self.dirty, self.kernel = values["pss"], values["dirty"], values["kernel"]
        self.descriptors, self.threads, self.wakes = values["descriptors"], values["threads"], values["wakes"]

    def line(self) -> str:
        """For people."""
        return (f"{self.count} idle clones in one process, each: {self.pss:.0f} KiB of PSS beyond {self.dirty:.0f} KiB "
                f"that its guest wrote, {self.kernel:.0f} KiB of the kernel's, {self.descriptors:.1f} descriptors, "
                f"{self.threads:.1f} threads, woken once in {self.wakes:.1f} s")


def footprint(snapshot: Snapshot, count: int = 200, watched: float = 30.0) -> Footprint:
    """`count` clones in this process, at rest."""
    group = _Group()
    try:
        with Host() as host:
            _add(host, snapshot, 0)     # loads what is loaded once
            host.close_one("0")
            gc.collect()
            time.sleep(1)
            before = _memory() | {"kernel": group.kernel(), **_counts()}
            for number in range(1, count + 1):
                _add(host, snapshot, number)
            time.sleep(_SETTLE)
            gc.collect()
            after = _memory() | {"kernel": group.kernel(), **_counts()}
            switches = _switches()
            time.sleep(watched)
            woken = _switches() - switches - 1      # the last one is this thread's
        each = {key: (after[key] - before[key]) / count for key in before}
        if after["kernel"] < 0:
            each["kernel"] = -1
        each["wakes"] = watched * count / woken if woken > 0 else float("inf")
        return Footprint(count, each)
    finally:
        group.remove()


def _add(host: Host, snapshot: Snapshot, number: int) -> None:
    machine = restore(snapshot, loop=host.loop, io=host.io, recipe=clone_recipe(snapshot, number))
    host.adopt(str(number), machine)
    machine.start()


class _Group:
    """A memory cgroup of this process's own; without root, none."""

    def __init__(self) -> None:
        self._path = f"{_GROUPS}/pyhv-bench-{os.getpid()}"
        try:
            os.mkdir(self._path)
            self._move(self._path)
        except OSError:
            self._path = ""

    def kernel(self) -> float:
        """KiB of kernel memory."""
        try:
            with open(f"{self._path}/memory.kmem.usage_in_bytes") as file:
                return int(file.read()) / 1024
        except OSError:
            return -1

    def remove(self) -> None:
        """Back to where we were."""
        if self._path:
            self._move(_GROUPS)
            for _ in range(100):
                try:
                    os.rmdir(self._path)
                    break
                except OSError:
                    time.sleep(0.05)        # threads that have just ended are still in it

    def _move(self, path: str) -> None:
        with open(f"{path}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))


def _memory() -> dict[str, float]:
    """KiB of this process: private pages of memory files that were written, all other PSS."""
    found = {"pss": 0.0, "dirty": 0.0}
    ours = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if line[0] in "0123456789abcdef":
                ours = line.rstrip().endswith("/memory")
            elif line.startswith("Pss:"):
                found["pss"] += int(line.split()[1])
            elif ours and line.startswith("Private_Dirty:"):
                found["dirty"] += int(line.split()[1])
    found["pss"] -= found["dirty"]
    return found


def _counts() -> dict[str, float]:
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def _switches() -> int:
    """How often the threads of this process have gone to sleep."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))
    return total


def main(folder: str, count: int) -> None:
    """Print both."""
    snapshot = Snapshot(folder)
    for what, times in zip(("take() returned after", "its processor ran after"), take_times(snapshot), strict=True):
        series = Series(times)
        print(f"{what} {series.median:.2f} ms (median), {series.quantile(0.99):.2f} ms (p99) of {len(times)}")
    print(footprint(snapshot, count).line())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200)
