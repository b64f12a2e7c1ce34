"""`pyhv bench container`: starting and keeping containers, beside runc, crun and a minimal C program.

Driven by tests/root/test_bench_container.py.
"""

from __future__ import annotations

__all__ = ["Peer", "at_rest", "bench_container", "make_bundle", "make_peers", "set_program", "settled_kb"]

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hv.bench.elsewhere import Elsewhere
from hv.bench.harness import Case, Group, launcher, print_groups, run_rounds, say, spawn, write_json
from hv.container.cgroups.detect import detect, own_paths
from hv.container.seccomp.compile import compile_profile
from hv.container.seccomp.profile import default_profile
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_WARM = 5           # containers of one process; the last counts
_SETTLE, _SETTLE_MOST = 1.0, 8.0        # seconds without a change worth naming; at most so many
_CALM = 64          # kB of change in that time that are nothing
_LIMITS = {"memory": {"limit": 256 << 20}, "cpu": {"shares": 512}, "pids": {"limit": 100}}
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")


class Peer:
    """A runtime with runc's command line, and how its commands are run here."""

    def __init__(self, name: str, command: list[str], state: Path, elsewhere: Elsewhere | None = None) -> None:
        self.name = name
        self.command = [*command, "--root", str(state)]
        self.elsewhere = elsewhere

    def sample(self, *words: str, errors: bool = True) -> Callable[[], float]:
        """A sample function for a command: milliseconds, whole process. `errors`: as for harness.spawn."""
        command = [*self.command, *words]
        return self.elsewhere.spawn(command, errors) if self.elsewhere else spawn(command, errors=errors)

    def pid(self, name: str) -> int:
        """The first process of a container."""
        done = subprocess.run([*self.command, "state", name], check=True, capture_output=True, timeout=30)
        return int(json.loads(done.stdout)["pid"])


def bench_container(rounds: int, containers: int, file: str | None) -> int:
    """Run all cases, print the tables, write the samples to `file`."""
    if os.geteuid():
        raise ConfigError("pyhv bench container: cgroups and the peers need root", "run it as root")
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as place:
        bundle = make_bundle(Path(place))
        peers = make_peers(Path(place))
        try:
            groups = [_whole_process(peers, bundle), _warm(Path(place), bundle)]
            for _, cases, _ in groups:
                say(f"{', '.join(case.name for case in cases)}: {rounds} rounds")
                run_rounds(cases, rounds)
            rest = {}
            if containers:
                set_program(bundle, "/bin/sleep", "1000")
                at_rest(peers[0], bundle, containers)      # the kernel keeps some of what it once needed
                for peer in peers:
                    say(f"{containers} idle containers of {peer.name}")
                    rest[peer.name] = at_rest(peer, bundle, containers)
        finally:
            for peer in peers:
                if peer.elsewhere:
                    peer.elsewhere.close()
    host = print_groups(groups)
    for name, row in rest.items():
        print(f"At rest, per container, {name}: {row['pss_kb']:.0f} kB PSS, {row['cgroup_kb']:.0f} kB in its memory "
              f"cgroup, {row['kernel_kb']:.0f} kB of the kernel's in all, {row['processes']:.1f} processes")
    if file is not None:
        write_json(file, {"host": host, "at rest": rest, "cases": [
            {"group": title, "name": case.name, "unit": case.unit, **case.series.data()}
            for title, cases, _ in groups for case in cases]})
    return 0


def make_bundle(place: Path) -> Path:
    """A bundle as an engine makes it: all namespaces, default mounts, cgroup limits, the default filter."""
    busybox = shutil.which("busybox")
    if not busybox:
        raise ConfigError("no busybox for the containers to run", "install the package busybox-static")
    rootfs = place / "bundle" / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(busybox, rootfs / "bin" / "busybox")
    for name in ("true", "sleep"):
        (rootfs / "bin" / name).symlink_to("busybox")
    subprocess.run([runtime(), "spec", "--bundle", str(place / "bundle")], check=True, timeout=30)
    set_program(place / "bundle", "/bin/true")
    return place / "bundle"


def set_program(bundle: Path, *args: str) -> None:
    """Have the bundle run that."""
    file = bundle / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    config["ociVersion"] = "1.0.2"          # the newest that the peers of some distributions know
    config["process"] |= {"terminal": False, "args": list(args)}
    config["root"]["readonly"] = False
    config["linux"]["resources"] |= _LIMITS
    config["linux"]["seccomp"] = default_profile(config["process"]["capabilities"]["bounding"])
    file.write_text(json.dumps(config))


def runtime() -> str:
    """The command `pyhv-runtime`, as a user starts it."""
    beside = Path(launcher()[0]).with_name("pyhv-runtime")
    return str(beside if beside.exists() else Path(__file__).resolve().parents[2] / "bin" / "pyhv-runtime")


def make_peers(place: Path) -> list[Peer]:
    """Ours first."""
    peers = [Peer("pyhv-runtime", [runtime()], place / "pyhv")]
    layout = detect()
    for name in ("runc", "crun"):
        found = shutil.which(name)
        if not found:
            say(f"{name} is not installed: it is left out")
            continue
        # crun refuses hosts that have both versions mounted; without the mount of version 2 it works
        hybrid = name == "crun" and layout.v1 and layout.v2
        peers.append(Peer(name, [found], place / name, Elsewhere(without=layout.v2) if hybrid else None))
    return peers


def _whole_process(peers: list[Peer], bundle: Path) -> Group:
    cases = [Case(f"{peer.name} run", "ms", peer.sample("run", "--bundle", str(bundle), f"pyhv-bench-{os.getpid()}"))
             for peer in peers]
    python = Path(sys.executable)
    cases.append(Case("python3 -I -S -E -c pass", "ms", spawn([str(python), "-I", "-S", "-E", "-c", "pass"])))
    return "busybox true in a container, whole process", cases, cases[1] if len(peers) > 1 else None


def _warm(place: Path, bundle: Path) -> Group:
    """From a process that lives on: ours against C."""
    state = place / "warm"
    state.mkdir()
    command = [sys.executable, "-m", "hv.bench.warm", str(_WARM), str(bundle), str(state)]
    cases = [Case("hv.container, warm", "ms", lambda: _last(command))]
    program = _minimal(place)
    if program is not None:
        profile = place / "filter"
        config = json.loads((bundle / "config.json").read_text())
        profile.write_bytes(compile_profile(config["linux"]["seccomp"]))
        minimal = [program, str(_WARM), str(bundle / "rootfs"), str(state), str(profile), *_hierarchies()]
        cases.append(Case("minimal C, warm", "ms", lambda: _last(minimal)))
    return "One container: create, start, wait, delete", cases, cases[-1] if program else None


def _hierarchies() -> list[str]:
    """The mount points of cgroups as container.c takes them; controllers that share one by the first's name."""
    points: dict[str, str] = {}
    layout = detect()
    for name, point in layout.v1.items():
        points.setdefault(point, name)
    return [f"{point}@{name}" for point, name in points.items()] + ([layout.v2] if layout.v2 else [])


def _last(command: list[str]) -> float:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise HvError(f"{os.path.basename(command[0])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(done.stdout.split()[-1]) / 1e3


def _minimal(place: Path) -> str | None:
    program = place / "minimal"
    try:
        source = Path(__file__).with_name("container.c")
        subprocess.run(["cc", "-O2", "-w", "-o", str(program), str(source)], check=True, capture_output=True,
                       timeout=60)
    except (OSError, subprocess.SubprocessError):
        say("no C compiler: the minimal C program is left out")
        return None
    return str(program)


def at_rest(peer: Peer, bundle: Path, count: int) -> dict[str, float]:
    """Figures per container of `count` detached ones whose program sleeps."""
    names = [f"pyhv-bench-{os.getpid()}-{number}" for number in range(count)]
    before = settled_kb()
    try:
        for name in names:
            peer.sample("run", "--detach", "--bundle", str(bundle), name, errors=False)()
        kernel = settled_kb() - before
        pids = [peer.pid(name) for name in names]
        memory = detect().v1.get("memory", "") or detect().v2
        pss = cgroup = processes = 0
        for pid in pids:
            group = Path(memory + own_paths(pid).get("memory", own_paths(pid).get("", "/")))
            members = [int(word) for word in (group / "cgroup.procs").read_text().split()]
            processes += len(members)
            pss += sum(pss_kb(member) for member in members)
            cgroup += _usage(group)
        return {"pss_kb": pss / count, "cgroup_kb": cgroup / 1024 / count, "kernel_kb": kernel / count,
                "processes": processes / count}
    finally:
        for name in names:
            peer.sample("delete", "--force", name)()


def _usage(group: Path) -> int:
    for leaf in ("memory.usage_in_bytes", "memory.current"):
        if (group / leaf).exists():
            return int((group / leaf).read_text())
    return 0


def pss_kb(pid: int) -> int:
    """A process's share of what is mapped (man 5 proc_pid_smaps)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def settled_kb() -> int:
    """kernel_kb() once the kernel has done what it had put off, such as taking the last containers apart."""
    end = time.monotonic() + _SETTLE_MOST
    last = kernel_kb()
    while time.monotonic() < end:
        time.sleep(_SETTLE)
        now = kernel_kb()
        if abs(now - last) < _CALM:
            return now
        last = now
    return last


def kernel_kb() -> int:
    """What the kernel has for itself: slab, stacks, page tables, per-processor memory (man 5 proc_meminfo)."""
    wanted = ("Slab:", "KernelStack:", "PageTables:", "Percpu:")
    return sum(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
               if line.startswith(wanted))
