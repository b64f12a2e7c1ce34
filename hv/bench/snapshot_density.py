"""Many idle VMs: what each costs beyond the memory its guest has changed, and how often it wakes.

A VM's cost is the PSS of its process and what the kernel keeps for it, by the account of a memory cgroup (kmem: KVM's
structures, page tables, stacks, slab); where there can be none, by /proc/meminfo of the whole host.
Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["Amounts", "density_groups"]

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from hv.bench.container import at_rest, make_bundle, make_peers, set_program, settled_kb
from hv.bench.figures import Aim, Figure, Group, Run, measure
from hv.bench.harness import say
from hv.bench.snapshot_guest import Guests
from hv.bench.snapshot_restore import MICROVM, QEMU
from hv.container.cgroups.detect import detect
from hv.errors import HvError
from hv.guests import path as guest_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE = 300.0       # s for a thousand restores, on a software KVM
_REPEATS = 3            # samples of each: one is many VMs


class Amounts:
    """How many of what; `watch` seconds are wake-ups counted for."""

    def __init__(self, clones: int = 200, processes: int = 20, tiny: int = 1000, qemu: int = 5, containers: int = 200,
                 watch: float = 30.0) -> None:
        self.clones, self.processes, self.tiny, self.qemu = clones, processes, tiny, qemu
        self.containers, self.watch = containers, watch


QUICK = Amounts(4, 2, 4, 1, 2, 1.0)


def density_groups(guests: Guests, amounts: Amounts, repeats: int = _REPEATS) -> list[Group]:
    """Measured."""
    cost, wakes, speed, changed = [], [], [], []
    runs = []

    def clones(name: str, folder: str, count: int, processes: int, *aims: Aim) -> None:
        each = Figure(name, "kB", *aims)
        dirty = Figure(name, "kB")
        took = Figure(name, "ms")
        woke = Figure(name, "/5 s", Aim(1))
        cost.append(each)
        changed.append(dirty)
        speed.append(took)
        wakes.append(woke)

        def sample() -> tuple[float, float, float]:
            say(f"{name}: {count * processes} VMs")
            found = _clones(folder, count, processes, amounts.watch)
            woke.samples += [5 * rate for rate in found["wakes_per_s"]]
            return found["cost_kb"], found["guest_kb"], found["restore_ms"]

        runs.append(Run(sample, each, dirty, took))

    clones(f"{amounts.clones} Linux clones, one process", guests.alone, amounts.clones, 1, Aim(1024))
    clones(f"{amounts.processes} Linux clones, a process each", guests.alone, 1, amounts.processes, Aim(6 * 1024))
    clones(f"{amounts.tiny} halted tiny guests, one process", guests.tiny, amounts.tiny, 1)
    if qemu := shutil.which(QEMU):
        figure = Figure(f"{amounts.qemu} QEMU microvm, tiny guest", "kB")
        cost.append(figure)
        runs.append(Run(lambda: [_qemu(qemu, amounts.qemu)], figure))
    peers = _containers(guests.place, amounts.containers, cost, runs)
    try:
        measure(runs, repeats, warm_up=0)
    finally:
        for peer in peers:
            if peer.elsewhere:
                peer.elsewhere.close()
    text = ("Per VM, idle for some seconds: the process's PSS and the kernel's memory for it, without the pages of "
            "guest RAM that the guest has changed since it was restored. Interpreter and shared pages are in it. QEMU's "
            "guest was booted, and all its pages count. Containers sleep, each with its own network namespace; theirs "
            "is PSS and what the whole host's kernel has more.")
    return [Group("density", "Memory of an idle VM", text, cost),
            Group("density", "Pages of guest RAM that an idle clone has changed", "Per VM, of the same.", changed),
            Group("density", "Restoring many, one after the other", "Per VM, while those before it run.", speed),
            Group("density", "How often an idle clone wakes",
                  f"How often a processor's thread went to sleep again, counted for {amounts.watch:g} s and told per "
                  "5 s; a sample is a clone.", wakes)]


class _Account:
    """What the kernel keeps for the processes that join `group`."""

    def __init__(self) -> None:
        layout = detect()
        place = layout.v1.get("memory") or layout.v2
        self.group = f"{place}/pyhv-bench-{os.getpid()}" if place else ""
        try:
            os.mkdir(self.group)
            if self._kb() is None:
                os.rmdir(self.group)
                self.group = ""
        except OSError:
            self.group = ""
        self._before = 0 if self.group else settled_kb()

    def _kb(self) -> int | None:
        try:
            return int(Path(self.group, "memory.kmem.usage_in_bytes").read_text()) // 1024
        except OSError:
            pass
        try:
            stat = dict(line.split() for line in Path(self.group, "memory.stat").read_text().splitlines())
            return int(stat["kernel"]) // 1024
        except (OSError, KeyError):
            return None

    def kb(self) -> int:
        """Now, since it was made."""
        return (self._kb() or 0) if self.group else settled_kb() - self._before

    def __enter__(self) -> _Account:
        return self

    def __exit__(self, *exc: object) -> None:
        end = time.monotonic() + 5
        while self.group and time.monotonic() < end:
            try:
                os.rmdir(self.group)
                return
            except OSError:
                time.sleep(0.05)        # the last process is on its way out


def _clones(folder: str, count: int, processes: int, watch: float) -> dict[str, Any]:
    program = str(Path(__file__).with_name("snapshot_clones.py"))
    found: list[dict[str, Any]] = []
    with _Account() as account, ExitStack() as stack:
        children = []
        for index in range(processes):
            command = [sys.executable, "-I", "-S", "-E", program, folder, str(count), str(index * count + 1),
                       str(watch), *([account.group] if account.group else [])]
            children.append(stack.enter_context(_child(command)))
        for child in children:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                said = child.stderr.read().decode().strip().splitlines() if child.stderr else []
                raise HvError(f"idle clones: {said[-1] if said else 'ended'}")
            found.append(json.loads(line))
        kernel = account.kb()
        pss = sum(_pss_kb(child.pid) for child in children)
    total = count * processes
    if (running := sum(row["running"] for row in found)) != total:
        raise HvError(f"idle clones: {running} of {total} run")
    guest = sum(row["guest_kb"] for row in found)
    return {"cost_kb": (pss - guest + kernel) / total, "guest_kb": guest / total,
            "restore_ms": sum(row["restore_ms"] for row in found) / processes,
            "wakes_per_s": [rate for row in found for rate in row["wakes_per_s"]]}


class _child:
    """A process that ends when its standard input does, or else is killed."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *exc: object) -> None:
        process = self._process
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _qemu(program: str, count: int) -> float:
    with _Account() as account, ExitStack() as stack:
        children = []
        for _ in range(count):
            # a shell joins the group first: the group's account is of what is made in it
            join = f'echo 0 > "{account.group}/cgroup.procs" && exec "$@"' if account.group else 'exec "$@"'
            process = stack.enter_context(_child(["/bin/sh", "-c", join, "sh", program, *MICROVM, "-kernel",
                                                  guest_path("echo"), "-append", "echo"]))
            stack.callback(process.kill)
            children.append(process)
        for process in children:
            assert process.stdout is not None
            seen = b""
            while b"echo: ready" not in seen:
                data = os.read(process.stdout.fileno(), 4096)
                if not data:
                    raise HvError("QEMU's guest does not boot")
                seen += data
        time.sleep(2)
        return (sum(_pss_kb(process.pid) for process in children) + account.kb()) / count


def _containers(place: Path, count: int, figures: list[Figure], runs: list[Run]) -> list[Any]:
    """crun, else runc, into the figures; to be closed afterwards."""
    if os.geteuid():
        say("not root: containers are left out")
        return []
    found = {peer.name: peer for peer in make_peers(place)}
    peer = found.get("crun") or found.get("runc")
    if peer is not None:
        figure = Figure(f"{count} {peer.name} containers", "kB", vm=False)

        def sample() -> list[float]:
            say(f"{count} idle containers of {peer.name}")
            bundle = place / "bundle"
            if not bundle.exists():
                make_bundle(place)
            set_program(bundle, "/bin/sleep", "1000")
            found = at_rest(peer, bundle, count)
            return [found["pss_kb"] + found["kernel_kb"]]

        figures.append(figure)
        runs.append(Run(sample, figure))
    return list(found.values())


def _pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
