"""Interleaved rounds, and what they say: median, quartiles, extremes, and the ratio to another case."""

from __future__ import annotations

__all__ = ["Case", "Group", "Series", "launcher", "print_groups", "run_rounds", "say", "spawn", "table", "write_json"]

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TIMEOUT = 120      # s for any child


class Series:
    """The samples of one case; the unit is the case's affair."""

    def __init__(self, samples: list[float]) -> None:
        self.samples = samples

    def quantile(self, share: float) -> float:
        """The sample below which `share` of all lie, interpolated."""
        ordered = sorted(self.samples)
        at = share * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    @property
    def median(self) -> float:
        """The middle sample."""
        return self.quantile(0.5)

    def data(self) -> dict[str, object]:
        """For JSON."""
        return {"n": len(self.samples), "median": self.median, "min": min(self.samples), "max": max(self.samples),
                "p25": self.quantile(0.25), "p75": self.quantile(0.75), "samples": self.samples}


class Case:
    """A named measurement: `sample()` makes one, in `unit`."""

    def __init__(self, name: str, unit: str, sample: Callable[[], float]) -> None:
        self.name = name
        self.unit = unit
        self.sample = sample
        self.series = Series([])


Group = tuple[str, list[Case], "Case | None"]      # title, cases, the one that ratios are to


def run_rounds(cases: list[Case], rounds: int, warm_up: int = 1) -> None:
    """Sample every case once per round, in a new random order each round, after `warm_up` rounds thrown away."""
    order = list(cases)
    dice = random.Random(1)
    for number in range(-warm_up, rounds):
        dice.shuffle(order)
        for case in order:
            value = case.sample()
            if number >= 0:
                case.series.samples.append(value)


def spawn(command: list[str], accept: tuple[int, ...] = (0,), errors: bool = True) -> Callable[[], float]:
    """A sample function: milliseconds from starting `command` to its end. HvError where it fails.

    `errors`: it says why; not for a command that leaves processes behind, which would hold that open.
    """

    def sample() -> float:
        start = time.perf_counter_ns()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE if errors else subprocess.DEVNULL, timeout=_TIMEOUT, check=False)
        spent = (time.perf_counter_ns() - start) / 1e6
        if done.returncode not in accept:
            last = (done.stderr or b"").decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise HvError(f"{os.path.basename(command[0])} ended with {done.returncode}: {last[0]}")
        return spent

    return sample


def table(title: str, cases: list[Case], base: Case | None = None) -> str:
    """Lines with median, quartiles and extremes; ratios are to `base`."""
    width = max(len(case.name) for case in cases)
    lines = [title, f"  {'':<{width}}  {'n':>4} {'median':>9} {'p25':>9} {'p75':>9} {'min':>9} {'max':>9}  unit"
             + (f"   ratio to {base.name}" if base else "")]
    for case in cases:
        s = case.series
        row = f"  {case.name:<{width}}  {len(s.samples):>4} " + " ".join(
            f"{value:9.2f}" for value in (s.median, s.quantile(0.25), s.quantile(0.75), min(s.samples), max(s.samples)))
        lines.append(row + f"  {case.unit}" + (f"   {s.median / base.series.median:.2f}" if base else ""))
    return "\n".join(lines)


def print_groups(groups: list[Group]) -> str:
    """Print what host this is and all tables; the former."""
    host = (f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, Linux {os.uname().release}, "
            f"Python {sys.version.split()[0]}")
    print(host)
    for title, cases, base in groups:
        print(table(title, cases, base))
    return host


def say(text: str) -> None:
    """Progress goes to standard error."""
    sys.stderr.write(f"pyhv: {text}\n")


def launcher() -> list[str]:
    """The command `pyhv`, as a user starts it."""
    beside = Path(sys.executable).with_name("pyhv")
    found = str(beside) if beside.exists() else shutil.which("pyhv")
    return [found] if found else [str(Path(__file__).resolve().parents[2] / "bin" / "pyhv")]


def write_json(file: str, data: Mapping[str, object]) -> None:
    """Keep every sample. ConfigError where `file` can't be written."""
    try:
        Path(file).write_text(json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}", "name a writable file") from None
