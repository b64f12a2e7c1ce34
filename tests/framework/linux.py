"""Real kernels for tests: built once, kept in pyhv's cache, shared by all test processes."""

from __future__ import annotations

import fcntl
import subprocess
import time
from pathlib import Path

import pytest
from framework.run import PYHV

from hv import Machine, MachineConfig
from hv.kernels import cache
from hv.kernels.initramfs import busybox

BUILD_SECONDS = 1800


def kernel(flavour: str) -> Path:
    """The folder of the micro or smp kernel; built by `pyhv kernel build` where the cache has none."""
    with open(cache.folder() / "test-build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # one of several test processes builds, the others wait
        done = subprocess.run([*PYHV, "kernel", "build", flavour], capture_output=True, text=True,
                              timeout=BUILD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def initrd() -> bytes:
    """A busybox system whose init starts a shell on the console."""
    return busybox()


class Shell:
    """A booted Linux guest with a shell at its console."""

    def __init__(self, image: Path, **options: object) -> None:
        options.setdefault("initrd", initrd())
        self.machine = Machine(MachineConfig(str(image), **options))   # type: ignore[arg-type]
        self.machine.start()
        self.at = 0

    def wait_for(self, text: bytes, timeout: float = 90) -> None:
        self.at = self.machine.console.wait_for(text, timeout, start=self.at, alive=lambda: not self.machine.stopping)

    def booted(self) -> Shell:
        self.wait_for(b"Run /init as init process")
        self.wait_for(b"pyhv# ")
        return self

    def run(self, command: str, timeout: float = 60) -> str:
        """Type a command; what it printed."""
        self.machine.console.send(b"echo B''EGIN; " + command.encode() + b"; echo E''ND $?\n")
        start = self.at
        self.wait_for(b"END ", timeout)
        self.wait_for(b"pyhv# ", timeout)
        skipped = self.machine.console.printed - len(self.machine.console.output)
        text = bytes(self.machine.console.output[start - skipped:self.at - skipped])
        # The command's own echo is wrapped anywhere, so the output is marked at both ends.
        return text.replace(b"\r", b"").partition(b"BEGIN\n")[2].decode(errors="replace")

    def power_off(self, timeout: float = 60) -> str:
        """Type the command; the reason for which the machine ended."""
        self.machine.console.send(b"poweroff -f\n")
        end = time.monotonic() + timeout
        outcome = self.machine.wait(max(0.1, end - time.monotonic()))
        assert outcome is not None, "the guest did not power off"
        return outcome.reason

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *exc: object) -> None:
        self.machine.close()


def skip_without_build_tools() -> None:
    """Say what is missing, rather than fail in the middle of a build."""
    import shutil

    missing = [tool for tool in ("flex", "bison", "bc", "make", "gcc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the kernel can't be built: no {', '.join(missing)}")
