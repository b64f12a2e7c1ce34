"""Many idle VMs: what each costs beyond the memory its guest has changed, and how often it wakes.

A VM's cost is the PSS of its process and what the kernel keeps for it, by the account of a memory cgroup (kmem: KVM's
structures, page tables, stacks, slab); where there can be none, by /proc/meminfo of the whole host.
Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["Amounts", "density_groups"]

import compileall
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
from hv.bench.snapshot_pool import served
from hv.bench.snapshot_restore import MICROVM, QEMU
from hv.container.cgroups.detect import detect
from hv.errors import HvError
from hv.guests import path as guest_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_PATIENCE = 300.0       # s for a thousand restores, on a software KVM
_SETTLE = 3.0           # s
_REPEATS = 3            # samples of each: one is many VMs
_INTERPRETER = (sys.executable, "-I", "-S", "-E", "-OO")    # as `pyhv snapshot restore` runs (hv/cli/bundle.py)


class Amounts:
    """How many of what; `watch` seconds are wake-ups counted for."""

    def __init__(self, clones: int = 200, processes: int = 20, tiny: int = 1000, qemu: int = 5, containers: int = 200,
                 watch: float = 30.0) -> None:
        self.clones, self.processes, self.tiny, self.qemu = clones, processes, tiny, qemu
        self.containers, self.watch = containers, watch


QUICK = Amounts(4, 2, 4, 1, 2, 1.0)


def density_groups(guests: Guests, amounts: Amounts, repeats: int = _REPEATS) -> list[Group]:
    """Measured."""
    cost: list[Figure] = []
    kernel: list[Figure] = []
    changed: list[Figure] = []
    speed: list[Figure] = []
    wakes: list[Figure] = []
    runs: list[Run] = []

    def vms(name: str, sample: Callable[[], _Costs], *aims: Aim) -> Figure:
        """Figures of one kind of VMs; the last is that of their wake-ups."""
        figures = Figure(name, "kB", *aims), Figure(name, "kB"), Figure(name, "kB")
        for column, figure in zip((cost, kernel, changed), figures, strict=True):
            column.append(figure)
        took, woke = Figure(name, "ms"), Figure(name, "/5 s", Aim(1))
        speed.append(took)
        wakes.append(woke)

        def measured() -> tuple[float, float, float]:
            say(name)
            found = sample()
            took.samples += found.restore_ms
            woke.samples += found.wakes
            return found.each_kb, found.kernel_kb, found.guest_kb

        runs.append(Run(measured, *figures))
        return woke

    vms(f"{amounts.clones} Linux clones, one process",
        lambda: _clones(guests.alone, amounts.clones, 1, amounts.watch), Aim(1024))
    vms(f"{amounts.processes} Linux clones, a process each",
        lambda: _clones(guests.alone, 1, amounts.processes, amounts.watch), Aim(6 * 1024))
    vms(f"{amounts.processes} Linux clones, a process each, of a pool",
        lambda: _forked(guests, amounts.processes), Aim(6 * 1024))
    vms(f"{amounts.tiny} halted tiny guests, one process",
        lambda: _clones(guests.tiny, amounts.tiny, 1, amounts.watch))
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
            "guest RAM that the guest has changed since it was restored; interpreter and shared pages are in it. A "
            "QEMU's guest was booted, and all its pages count. Containers sleep, each with its own network namespace; "
            "theirs is PSS and what the whole host's kernel has more.")
    return [Group("density", "Memory of an idle VM", text, cost),
            Group("density", "Of that, the kernel's",
                  "Mostly KVM's own: where it shadows page tables it keeps ten bytes for each page of guest RAM, "
                  "touched or not, and a stock of pages for each processor.", kernel),
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

    def joining(self) -> list[str]:
        """Words before a command: it joins the group first, which has an account of what is made in it only."""
        join = f'echo 0 > "{self.group}/cgroup.procs" && exec "$@"' if self.group else 'exec "$@"'
        return ["/bin/sh", "-c", join, "sh"]

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


class _Costs:
    """Per VM, of `total` ones that lie in the processes `pids`, their guest RAM the file `path`."""

    def __init__(self, account: _Account, pids: Sequence[int], path: str, total: int, restore_ms: list[float],
                 wakes: list[float]) -> None:
        kernel = account.kb()
        pss = sum(_pss_kb(pid) for pid in pids)
        guest = sum(_changed_kb(pid, path) for pid in pids)
        self.each_kb, self.kernel_kb, self.guest_kb = (pss - guest + kernel) / total, kernel / total, guest / total
        self.restore_ms, self.wakes = restore_ms, wakes


def _clones(folder: str, count: int, processes: int, watch: float) -> _Costs:
    program = str(Path(__file__).with_name("snapshot_clones.py"))
    compileall.compile_dir(Path(__file__).parents[1], quiet=2, optimize=2)      # no VM's process has to
    found: list[dict[str, Any]] = []
    with _Account() as account, ExitStack() as stack:
        children = []
        for index in range(processes):
            command = [*_INTERPRETER, program, folder, str(count), str(index * count + 1), str(watch),
                       *([account.group] if account.group else [])]
            children.append(stack.enter_context(_child(command)))
        for child in children:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                said = child.stderr.read().decode().strip().splitlines() if child.stderr else []
                raise HvError(f"idle clones: {said[-1] if said else 'ended'}")
            found.append(json.loads(line))
        if (running := sum(row["running"] for row in found)) != count * processes:
            raise HvError(f"idle clones: {running} of {count * processes} run")
        return _Costs(account, [child.pid for child in children], f"{folder}/memory", count * processes,
                      [row["restore_ms"] for row in found], [5 * rate for row in found for rate in row["wakes_per_s"]])


def _forked(guests: Guests, count: int) -> _Costs:
    """VMs of a pool's forked processes; the pool's two, and the VM that it keeps ready, are among the costs."""
    with _Account() as account, served(guests, "--processes", size=1, before=account.joining()) as door:
        status = door.ask("status")
        pids = [status["pid"], status["template"], *(door.ask("take")["pid"] for _ in range(count))]
        time.sleep(_SETTLE)
        return _Costs(account, pids, f"{guests.alone}/memory", count, [], [])


def _changed_kb(pid: int, path: str) -> int:
    """What a process has of its own of the file `path`: the pages of guest RAM that its guests have changed."""
    total = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1] == path
        elif inside and words[0] == "Anonymous:":
            total += int(words[1])
    return total


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
            process = stack.enter_context(_child([*account.joining(), program, *MICROVM, "-kernel", guest_path("echo"),
                                                  "-append", "echo"]))
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
        time.sleep(_SETTLE)
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
