"""The engines that `pyhv bench run` stands beside: podman and docker, each with storage of its own below a folder.

They are given what a host without the right to raise limits needs; docker's daemon has neither bridge nor iptables, so
it is compared without a network only. Driven by tests/root/test_bench_run.py.
"""

from __future__ import annotations

__all__ = ["Docker", "Podman"]

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from hv.bench.harness import say
from hv.errors import HvError
from hv.linux.creds import PR_SET_PDEATHSIG, prctl

_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
_DAEMON_SECONDS = 30.0
_COMMAND_SECONDS = 300


class Podman:
    """podman with `runtime`; its state lies below `place`."""

    name = "podman"

    def __init__(self, place: Path, runtime: str = "runc") -> None:
        program = shutil.which("podman")
        found = shutil.which(runtime)
        if program is None or found is None:
            raise HvError(f"podman, or {runtime} for it, is not installed")
        self._place = place
        place.mkdir(parents=True, exist_ok=True)
        driver = "overlay" if "overlay" in Path("/proc/filesystems").read_text() else "vfs"
        self.command = [program, "--root", str(place / "root"), "--runroot", str(place / "run"),
                        "--tmpdir", str(place / "tmp"), "--storage-driver", driver, "--cgroup-manager", "cgroupfs",
                        "--events-backend", "file", "--runtime", found]

    def take(self, archive: Path, image: str) -> None:
        """Load a docker-archive that holds `image`."""
        _call([*self.command, "load", "-q", "-i", str(archive)], image)

    def run(self, image: str, *words: str, network: str = "none") -> list[str]:
        """The command that runs `words` in a container and removes it."""
        return [*self.command, "run", "--rm", "--network", network, *_LIMITS, image, *words]

    def close(self) -> None:
        """Remove all it has."""
        for words in (("rm", "--all", "--force", "--time", "0"), ("rmi", "--all", "--force")):
            subprocess.run([*self.command, *words], stdin=subprocess.DEVNULL, capture_output=True,
                           timeout=_COMMAND_SECONDS, check=False)
        _unmount(self._place)


class Docker:
    """A docker daemon of our own; HvError where it does not come up."""

    name = "docker"

    def __init__(self, place: Path) -> None:
        daemon, self._program = shutil.which("dockerd"), _client()
        if daemon is None or not self._program:
            raise HvError("docker is not installed")
        self._place = place
        place.mkdir(parents=True, exist_ok=True)
        self._socket = f"unix://{place}/d.sock"
        with open(place / "log", "wb") as log:
            self._daemon = subprocess.Popen(
                [daemon, "--host", self._socket, "--data-root", f"{place}/data", "--exec-root", f"{place}/exec",
                 "--pidfile", f"{place}/pid", "--bridge=none", "--iptables=false", "--ip6tables=false",
                 "--storage-driver", "overlay2", "--exec-opt", "native.cgroupdriver=cgroupfs"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))     # it ends when we are killed
        self.command = [self._program, "--host", self._socket]
        end = time.monotonic() + _DAEMON_SECONDS
        while subprocess.run([*self.command, "version"], capture_output=True, timeout=_COMMAND_SECONDS,
                             check=False).returncode:
            if self._daemon.poll() is not None or time.monotonic() > end:
                last = (place / "log").read_text(errors="replace").strip().splitlines()[-1:]
                self.close()
                raise HvError(f"docker's daemon does not come up: {' '.join(last)[:200]}")
            time.sleep(0.2)

    def take(self, archive: Path, image: str) -> None:
        """Load a docker-archive that holds `image`."""
        _call([*self.command, "load", "-q", "-i", str(archive)], image)

    def run(self, image: str, *words: str, network: str = "none") -> list[str]:
        """The command that runs `words` in a container and removes it."""
        return [*self.command, "run", "--rm", "--network", network, image, *words]

    def close(self) -> None:
        """End the daemon."""
        self._daemon.terminate()
        try:
            self._daemon.wait(20)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait(20)
        _unmount(self._place)


def _client() -> str:
    """Docker's client: the one that belongs to the daemon comes first."""
    return next((path for path in ("/usr/bin/docker", shutil.which("docker") or "") if os.access(path, os.X_OK)), "")


def _call(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_SECONDS,
                          check=False)
    if done.returncode:
        raise HvError(f"{os.path.basename(command[0])} can't take {what}: {done.stderr.strip()[-200:]}")


def _unmount(place: Path) -> None:
    """What an engine left mounted below its folder."""
    rows = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in reversed([row for row in rows if row.startswith(f"{place}/")]):
        if subprocess.run(["umount", "-l", target], capture_output=True, timeout=30, check=False).returncode:
            say(f"{target} stays mounted")
