"""Real cgroups for tests: a Cgroup of a name of its own, processes in it, all gone at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from hv.container.cgroups.detect import detect
from hv.container.cgroups.manager import Cgroup, manager
from hv.errors import HvError


def until(condition, seconds: float = 10.0):
    """Wait until condition() is true; what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came of it in time"
        time.sleep(0.005)
    return found


class Groups:
    """Makes groups and processes; `close` ends and removes all."""

    def __init__(self) -> None:
        self.base = f"/pyhv-test-{os.getpid()}"
        self.groups: list[Cgroup] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def make(self, name: str = "box", resources: dict | None = None, *, keys: tuple[str, ...] | None = None) -> Cgroup:
        """A group in all hierarchies, or those of `keys` alone; limited where `resources` says so."""
        group = manager(f"{self.base}/{name}", name, layout=detect())
        if keys is not None:
            for key in [key for key in group.paths if key not in keys]:
                del group.paths[key]
        self.groups.append(group)
        group.create()
        if resources is not None:
            group.apply(resources)
        return group

    def run(self, group: Cgroup, script: str, **options) -> subprocess.Popen[bytes]:
        """A shell in `group` that runs `script` once it is there."""
        process = subprocess.Popen(["sh", "-c", f"read go; {script}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True, **options)
        self.processes.append(process)
        group.add(process.pid)
        process.stdin.write(b"\n")
        process.stdin.close()
        return process

    def output(self, group: Cgroup, script: str, **options) -> str:
        """What a script in `group` prints."""
        process = self.run(group, script, **options)
        text = process.stdout.read().decode()
        process.wait(20)
        return text

    def close(self) -> None:
        for group in self.groups:
            try:
                group.freeze(False)
            except HvError:
                pass
            for pid in filter(None, group.pids()):      # 0 would be ourselves
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
            process.stdout.close()
        for group in self.groups:
            group.remove()
        for point in set(detect().mounts().values()):
            path = Path(point + self.base)
            if path.exists():
                path.rmdir()


def leftovers() -> list[str]:
    """Groups of this process's tests that are still there."""
    pattern = f"pyhv-test-{os.getpid()}*"
    return [str(found) for point in set(detect().mounts().values()) for found in Path(point).glob(pattern)]
