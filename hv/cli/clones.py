"""`pyhv snapshot restore NAME --clone N`: N machines of one snapshot in this process, each with its control socket.

Their consoles are had by `pyhv vm console NAME.1`; here stands how many still run. Driven by tests/kvm/test_pool.py.
"""

from __future__ import annotations

__all__ = ["clones"]

import os
from _thread import start_new_thread
from signal import SIGHUP, SIGINT, SIGTERM, signal
from sys import stderr

from hv.cli.boot import VM_COMMANDS
from hv.cli.say import say
from hv.errors import ConfigError, HvError
from hv.machine.control import SUFFIX, folder
from hv.machine.control_names import check_name
from hv.machine.fleet import Host, raise_descriptor_limit
from hv.snapshot.pool import clone_recipe
from hv.snapshot.restore import restore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine, Outcome
    from hv.snapshot.format import Snapshot

MOST = 10_000
# Options that need a terminal, or a run, for one machine.
ALONE = ("control", "no_control", "log", "json", "trace", "stats", "profile", "record_working_set")
ENDS: dict[int, tuple[str, int]] = {SIGINT: ("interrupted", 130), SIGTERM: ("terminated", 143),
                                    SIGHUP: ("hangup", 129)}
QUIET_ENDS = ("poweroff", "reset", "debug-exit", "quit", "interrupted", "terminated", "hangup")


def clones(values: dict[str, Any], snapshot: Snapshot) -> int:
    """Run them until all have ended, or a signal ends them; 0, or the code of the first that went wrong."""
    count = values["clone"]
    if not 1 <= count <= MOST:
        raise ConfigError(f"--clone {count}, possible are 1 to {MOST}", "change --clone")
    for key in ALONE:
        if values.get(key):
            raise ConfigError(f"--clone and --{key.replace('_', '-')} exclude each other",
                              "`pyhv vm` looks after each clone")
    raise_descriptor_limit(count)
    name = check_name(values["name"] or os.path.basename(snapshot.folder))
    options = {"private": not values["shared_disks"], "clock_now": values["clock"] == "now",
               "verify": values["verify"], "backend": values["memory_backend"], "prefetch": values["prefetch"]}
    bad: list[int] = []
    left = [0]

    def ended(which: str, outcome: Outcome | None) -> None:
        left[0] -= 1
        if outcome is not None and outcome.reason not in QUIET_ENDS:
            bad.append(outcome.code)
            if not values["quiet"]:
                say(f"\rpyhv: {which}: {outcome.reason}: {outcome.detail}")
        tell()

    def tell() -> None:
        if not values["quiet"] and stderr.isatty():
            stderr.write(f"\r\x1b[Kpyhv: {left[0]} of {count} run, {name}.1 and on; Ctrl-C ends all ")
            stderr.flush()

    caught: list[int] = []
    strangers: list[tuple[int, Machine]] = []
    with Host(ended) as host:
        for number, (reason, _) in ENDS.items():

            def stop(which: int, frame: object, reason: str = reason) -> None:
                caught.append(which)
                host.loop.call(lambda: host.stop_all(reason, f"signal {which}"))    # a handler may not take locks

            signal(number, stop)
        for index in range(1, count + 1):
            if caught:
                break
            machine = restore(snapshot, loop=host.loop, io=host.io, recipe=clone_recipe(snapshot, index), **options)
            options["verify"] = False       # once is enough
            host.adopt(f"{name}.{index}", machine, control=f"{folder()}/{name}.{index}{SUFFIX}", commands=VM_COMMANDS)
            left[0] += 1
            machine.start()
            if "vsock0" in machine.devices:
                strangers.append((index, machine))
        start_new_thread(_introduce, (strangers, values["quiet"]))
        if caught:
            host.stop_all("quit")           # those that were being made meanwhile
        elif values["quiet"] or not stderr.isatty():
            if not values["quiet"]:
                say(f"pyhv: {count} clones run, {name}.1 to {name}.{count}")
        else:
            tell()
        if values["timeout"] is not None and not host.wait(values["timeout"]):
            host.stop_all("timeout", f"{values['timeout']:g} s")
            bad.append(124)
        host.wait()
    if stderr.isatty() and not values["quiet"]:
        say("")
    return ENDS[caught[0]][1] if caught else bad[0] if bad else 0


def _introduce(strangers: list[tuple[int, Machine]], quiet: bool) -> None:
    """Tell the guests that have an agent who they are. In a thread: a guest takes a quarter of a second for it."""
    from hv.snapshot.clone import introduce

    for index, machine in strangers:
        try:
            told = introduce(machine, index)
        except HvError:
            continue            # it has ended meanwhile
        if told.failed and machine.running() and not quiet:
            say(f"pyhv: clone {index}: {'; '.join(told.failed.values())} - docs/clones.md says what it shares then")
            if not told.agent:
                return          # none of them has one: they are clones
