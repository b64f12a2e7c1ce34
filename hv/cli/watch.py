"""`--trace`, `--stats`, `--profile` and `--json`: attach before the run, report after it."""

from __future__ import annotations

__all__ = ["Watch"]

import json
import os
import time

from hv import __version__
from hv.cli.say import say
from hv.debug.symbols import Symbols
from hv.errors import ConfigError
from hv.guests import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.debug.profile import Profiler
    from hv.machine.machine import Machine, Outcome

INIT_LINE = b"Run /init as init process"        # init/main.c, run_init_process


class Watch:
    """What the user wants to see of one run."""

    def __init__(self, machine: Machine, values: dict[str, object], kernel: str | None) -> None:
        self._machine = machine
        self._values = values
        self._kernel = kernel
        self._init_at = 0
        self._json = -1
        named = values["symbols"]
        if values["trace"] or values["profile"]:
            self._symbols = Symbols.open(str(named)) if named else Symbols.beside(resolve(kernel))
        if values["trace"]:
            from hv.debug.trace import Tracer

            Tracer(machine, str(values["trace"]), say, self._symbols)
        self._profiler: Profiler | None = None
        if values["profile"]:
            from hv.debug.profile import Profiler

            self._profiler = Profiler(machine, _rate(str(values["profile"])))
        if values["stats"] or values["json"]:
            machine.measure = True
        if values["json"]:
            try:    # now, not when the guest has run for an hour
                self._json = os.open(str(values["json"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise ConfigError(f"--json {values['json']}: {os.strerror(error.errno or 0)}",
                                  "name a writable file") from None
            machine.console.watch = self._line

    def report(self, outcome: Outcome) -> None:
        """Print and write what was asked for."""
        if self._profiler is not None:
            say(self._profiler.report(self._symbols))
        if self._values["stats"]:
            from hv.debug.stats import report

            say(report(self._machine))
        if self._json >= 0:
            with os.fdopen(self._json, "w") as file:
                json.dump(self._data(outcome), file, indent=2)
                file.write("\n")

    def _line(self, line: bytes) -> None:
        if not self._init_at and INIT_LINE in line:
            self._init_at = time.perf_counter_ns()

    def _data(self, outcome: Outcome) -> dict[str, object]:
        from hv.debug.stats import collect

        machine = self._machine
        start = _process_start()
        times = {"process_start": start, "machine_created": machine.created_ns, **machine.phases}
        if machine.console.first_byte_at:
            times["first_console_byte"] = int(machine.console.first_byte_at * 1e9)
        if self._init_at:
            times["run_init"] = self._init_at
        data: dict[str, object] = {
            "pyhv": __version__, "kernel": self._kernel or "(built-in)",
            "cmdline": machine.cmdline.decode(errors="replace"),
            "cpus": machine.config.cpus, "memory_bytes": machine.config.memory,
            "clock": "seconds since process start, CLOCK_MONOTONIC; the start itself is known to 10 ms",
            "phases": {name: round((at - start) / 1e9, 6) for name, at in sorted(times.items(), key=lambda i: i[1])},
            "outcome": {"reason": outcome.reason, "detail": outcome.detail, "exit_code": outcome.code},
        }
        return data | collect(machine)


def _rate(text: str) -> float:
    try:
        hz = float(text)
    except ValueError:
        hz = 0.0
    if not 1 <= hz <= 1000:
        raise ConfigError(f"--profile={text}: not a rate", "samples per second, 1 to 1000")
    return hz


def _process_start() -> int:
    """When this process was started, in ns of CLOCK_MONOTONIC (proc(5): starttime, in clock ticks since boot)."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    age = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
    return time.perf_counter_ns() - age
