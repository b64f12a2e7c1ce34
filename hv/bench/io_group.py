"""What the groups of `pyhv bench io` share: the work, ways to do it, rounds, tables, programs that may be missing.

Driven by tests/kvm/test_bench_io.py.
"""

from __future__ import annotations

__all__ = ["AMOUNTS", "MIB", "QUICK", "Group", "Run", "background", "program"]

import os
import shutil
import subprocess
import time
from contextlib import contextmanager

from hv.bench.harness import Case, say, table
from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
# How much of each: MiB, requests at depth 32 and 1, segments, packets, bytes, FUSE requests, MiB each way.
AMOUNTS = {"sequential": 1024, "random": 60000, "single": 2000, "segments": 8000, "round-trips": 1000,
           "console": 8 * MIB, "metadata": 16000, "listings": 480, "bulk": 1024, "stream": 1024}
QUICK = {name: amount // 20 for name, amount in AMOUNTS.items()} | {"stream": 64}
_START_SECONDS = 10.0   # for a program until its socket is there


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


def program(package: str, *names: str) -> str | None:
    """The first of `names` (or paths) that is installed. Where none is, that is said, with the package that has it."""
    for name in names:
        if found := shutil.which(name):
            return found
    say(f"no {os.path.basename(names[0])} here, its figures are left out (Debian: apt-get install {package})")
    return None


@contextmanager
def background(command: list[str], socket: Path) -> Iterator[None]:
    """A program that listens at `socket`, while the block runs."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as child:
        try:
            end = time.monotonic() + _START_SECONDS
            while not socket.exists():
                if child.poll() is not None or time.monotonic() > end:
                    child.kill()
                    assert child.stderr is not None
                    last = child.stderr.read()[-300:].decode(errors="replace").strip()
                    raise HvError(f"{os.path.basename(command[0])} does not start: {last or 'no message'}")
                time.sleep(0.002)
            yield
        finally:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
            socket.unlink(missing_ok=True)
