"""Restoring: from a process that lives on, beside a C program; from the command line, beside containers and QEMU.

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["restore_groups"]

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from hv.bench.container import make_bundle, make_peers
from hv.bench.figures import Aim, Figure, Group, Run, measure
from hv.bench.harness import launcher, say, spawn
from hv.bench.snapshot_guest import Conversation, Guests, compiled, first_answer, over_vsock
from hv.bench.snapshot_replay import entry_of, record_restore
from hv.errors import HvError
from hv.guests import path as guest_path
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

QEMU = "qemu-system-x86_64"
MICROVM = ("-M", "microvm,x-option-roms=off,isa-serial=on,acpi=off", "-accel", "kvm", "-nodefaults", "-no-user-config",
           "-nographic", "-no-reboot", "-m", "64", "-serial", "stdio")
_PAUSE = 0.03           # s: the kernel takes the last VM apart, on the time of the next one's system calls
_TIMES = 2              # restores, one after the other; the last counts
_MIGRATE = 20.0         # s


def restore_groups(guests: Guests, rounds: int) -> list[Group]:
    """Measured."""
    groups, runs = [], []
    for make in (_warm, _whole_process):
        group, more = make(guests)
        groups.append(group)
        runs += more
    say(f"restoring: {rounds} rounds of {len(runs)} programs")
    peers = _containers(guests.place, groups[1], runs)
    try:
        measure(runs, rounds)
    finally:
        for peer in peers:
            if peer.elsewhere:
                peer.elsewhere.close()
    return groups


def _warm(guests: Guests) -> tuple[Group, list[Run]]:
    entry = Figure("pyhv: first instruction", "ms", Aim(8))
    kept = Figure("pyhv, state in memory: first instruction", "ms", Aim(8), Aim(2, "ratio"))
    console = Figure("pyhv: first answer at the console", "ms")
    vsock = Figure("pyhv: first answer over vsock", "ms")
    figures = [entry, kept, console, vsock]
    snapshot = Snapshot(guests.idle)
    runs = [Run(lambda: [_timed(guests.idle, None)], entry), Run(lambda: [_timed(snapshot, None)], kept),
            Run(lambda: [_timed(guests.idle, lambda talk: talk.ask(b"?", b"!"))], console),
            Run(lambda: [_timed(guests.idle, lambda talk: over_vsock(guests.vsock))], vsock)]
    program, base = compiled("restore", guests.place), None
    if program is not None:
        record = guests.place / "record"
        record_restore(guests.idle, record)
        base = Figure("C program: first instruction", "ms")
        command = [program, str(record), f"{guests.idle}/memory", str(_TIMES)]
        figures.append(base)
        runs.append(Run(lambda: [_last(command)], base))
    text = ("A Linux guest with 256 MiB and a socket device, from a process that has restored before: to the processor "
            "entering it, and to its program's answer to a byte. The C program (hv/bench/restore.c) makes the same "
            "ioctls with the same arguments, and has no devices. `State in memory`: state.json was read before, as a "
            "pool does it.")
    return Group("restore", "Restore from a process that lives on", text, figures, base), runs


def _timed(snapshot: Snapshot | str, until: Callable[[Conversation], None] | None) -> float:
    """ms from the snapshot, or its folder's name, to the entry, or to where `until` returns.

    It is done twice, as by the C program, and the second time counts.
    """
    for _ in range(_TIMES):
        time.sleep(_PAUSE)
        spent = _once(snapshot, until)
    return spent


def _once(snapshot: Snapshot | str, until: Callable[[Conversation], None] | None) -> float:
    start = time.perf_counter_ns()
    with restore(snapshot) as machine:
        if until is None:
            machine.start()
            return (entry_of(machine) - start) / 1e6
        talk = Conversation(machine)
        machine.start()
        until(talk)
        return (time.perf_counter_ns() - start) / 1e6


def _last(command: list[str]) -> float:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise HvError(f"{os.path.basename(command[0])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(done.stdout.split()[-1]) / 1e3


def _whole_process(guests: Guests) -> tuple[Group, list[Run]]:
    command = [*launcher(), "snapshot", "restore"]
    figures: list[Figure] = []
    runs: list[Run] = []

    def add(name: str, sample: Callable[[], tuple[float, float]]) -> None:
        pair = Figure(f"{name}: first answer", "ms"), Figure(f"{name}: to its end", "ms")
        figures.extend(pair)
        runs.append(Run(sample, *pair))

    add("pyhv snapshot restore, Linux", lambda: first_answer([*command, guests.idle], b"?", b"!", end=b"q"))
    add("pyhv snapshot restore, tiny guest", lambda: first_answer([*command, guests.tiny], b"x", b"x", end=b"\x04"))
    state = guests.place / "qemu.state"
    if qemu := _qemu(state):
        add("QEMU microvm -incoming, tiny guest", lambda: first_answer(
            [*qemu, "-incoming", f"exec:cat {state}"], b"x", b"x", again=True, end=b"\x04"))
    python = Figure("the bare interpreter", "ms", vm=False)
    figures.append(python)
    bare = spawn([sys.executable, "-I", "-S", "-E", "-c", "pass"])
    runs.append(Run(lambda: [bare()], python))
    text = ("Whole processes, from the fork: to the guest's answer to a byte that is typed ahead, and to the end; "
            "Linux ends by restarting, the tiny guest (guests/echo, 64 MiB) by powering off. Containers run busybox "
            "`true` with all namespaces, default mounts, limits and filter, to their end. QEMU restores what it wrote "
            "with `migrate`; what is typed before it is there gets lost, so that is typed each millisecond.")
    return Group("restore", "Restore from the command line", text, figures), runs


def _containers(place: Path, group: Group, runs: list[Run]) -> list[Any]:
    """runc and crun into the group; to be closed afterwards."""
    if os.geteuid():
        say("not root: runc and crun are left out")
        return []
    bundle = make_bundle(place)
    peers = [peer for peer in make_peers(place) if peer.name != "pyhv-runtime"]
    for peer in peers:
        figure = Figure(f"{peer.name} run, busybox true", "ms", vm=False)
        sample = peer.sample("run", "--bundle", str(bundle), f"pyhv-bench-{os.getpid()}")
        runs.append(Run(lambda sample=sample: [sample()], figure))      # type: ignore[misc]
        group.figures.append(figure)
        if peer.name == "runc":
            group.base = figure
            group.figures[0].aims = (Aim(1, "ratio"),)
    return peers


def _qemu(state: Path) -> list[str] | None:
    """A command to which `-incoming` is added; the guest's state is in the file `state` then."""
    found = shutil.which(QEMU)
    if found is None:
        say(f"no {QEMU} here, its figures are left out (Debian: apt-get install qemu-system-x86)")
        return None
    command = [found, *MICROVM, "-kernel", guest_path("echo"), "-append", "echo"]
    path = f"{state}.qmp"
    with subprocess.Popen([*command, "-qmp", f"unix:{path},server=on,wait=off"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as child:
        try:
            assert child.stdout is not None
            seen = b""
            while b"echo: ready" not in seen:
                data = child.stdout.read(4096)
                if not data:
                    raise HvError("its guest does not boot")
                seen += data
            _save_qemu(path, f"exec:cat > {state}")
        except (OSError, HvError, ValueError) as error:
            say(f"{QEMU} can't save a guest here ({error}), its figures are left out")
            return None
        finally:
            child.kill()
    return command


def _save_qemu(path: str, uri: str) -> None:
    """By QEMU's monitor protocol: a greeting, then a line for each command, with events between the answers."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rw") as lines:
        sock.settimeout(_MIGRATE)
        sock.connect(path)
        lines.readline()

        def ask(command: str, **arguments: str) -> Any:
            lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            lines.flush()
            while True:
                reply = json.loads(lines.readline())
                if "error" in reply:
                    raise HvError(str(reply["error"].get("desc")))
                if "return" in reply:
                    return reply["return"]

        ask("qmp_capabilities")
        ask("migrate", uri=uri)
        end = time.monotonic() + _MIGRATE
        while (status := ask("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > end:
                raise HvError(f"migrate: {status}")
            time.sleep(0.02)
