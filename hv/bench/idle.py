"""What devices cost while nothing happens: processor time and memory of a guest that sleeps, with and without them."""

from __future__ import annotations

__all__ = ["Idle", "idle"]

import os
import subprocess
import time
from pathlib import Path

from hv.bench.harness import launcher
from hv.errors import HvError
from hv.guests import path as guest_path

_RAM_MIB = 64
_WAIT = 20.0        # s for the guest to get to sleep
_WATCHED = 2.0      # s

# What the guest does before it sleeps, so that drivers have used the devices.
_WORK = "idle sequential=4 random=64 console=4096 entropy=4096 round-trips=4"


class Idle:
    """Processes at rest: {what: {"cpu": percent, "kb": private memory without guest RAM}}."""

    def __init__(self, found: dict[str, dict[str, float]]) -> None:
        self.found = found

    def lines(self) -> list[str]:
        """For people."""
        return [f"At rest: {what}: {row['cpu']:.2f} % of a processor, {row['kb'] / 1024:.1f} MiB"
                for what, row in self.found.items()]

    def data(self) -> dict[str, dict[str, float]]:
        """For JSON."""
        return self.found


def idle(place: Path, image: Path, tap: str, words: str, quick: bool = False) -> Idle:
    """Measure without devices, with each of them (unless `quick`), and with all.

    `words`: what the guest must know of the network behind `tap`, which may be "".
    """
    seconds = 1.0 if quick else _WATCHED
    found = {"no devices": _measure([], words, seconds)}
    share = place / "share"
    share.mkdir(exist_ok=True)
    asked = [["--disk", f"{image},readonly"], ["--console", "virtio"], ["--rng"], ["--balloon"],
             ["--vsock", f"{place / 'vsock'},cid=4242"], ["--share", str(share)]]
    if tap:
        asked.append(["--net", f"tap={tap}"])
    if not quick:
        for options in asked:
            found[options[0]] = _measure(options, words, seconds)
    found["all devices"] = _measure([word for options in asked for word in options], words, seconds)
    return Idle(found)


def _measure(options: list[str], words: str, seconds: float) -> dict[str, float]:
    command = [*launcher(), "boot", guest_path("bench"), "--memory", f"{_RAM_MIB}M", "--timeout", "60", "--quiet",
               "--cmdline", f"{_WORK} {words}", *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            seen = b""
            end = time.monotonic() + _WAIT
            assert child.stdout is not None
            while b"bench: done" not in seen:
                data = os.read(child.stdout.fileno(), 1 << 16)
                seen += data
                if not data or time.monotonic() > end:
                    raise HvError(f"the guest did not come to rest: {seen[-300:].decode(errors='replace').strip()}")
            time.sleep(1)
            before = _spent_ns(child.pid)
            time.sleep(seconds)
            spent = _spent_ns(child.pid) - before
            return {"cpu": 100 * spent / 1e9 / seconds, "kb": float(_private_kb(child.pid))}
        finally:
            child.terminate()
            child.wait(10)


def _spent_ns(pid: int) -> int:
    """What all its threads have run (Documentation/scheduler/sched-stats.rst); finer than the ticks of `stat`."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _private_kb(pid: int) -> int:
    """Private memory without guest RAM, the one mapping of its size."""
    total = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1])
        elif line.startswith("Private_") and size != _RAM_MIB * 1024:
            total += int(line.split()[1])
    return total
