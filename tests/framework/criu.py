"""A container that is saved and restored by CRIU: where its images are, what it has counted to, its terminal."""

from __future__ import annotations

import array
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle
from framework.groups import until

COUNTER = "while :; do n=$((n+1)); echo $n >> /tmp/n; sleep 0.1; done"


def _why_not() -> str:
    """Why CRIU can't be used here, in its own words."""
    if shutil.which("criu") is None:
        return "criu is not installed (Debian's package)"
    if os.geteuid():
        return "criu needs root"
    done = subprocess.run(["criu", "check"], capture_output=True, text=True, check=False, timeout=60)
    said = (done.stdout + done.stderr).splitlines()
    return f"`criu check` fails on this kernel: {said[0]}" if done.returncode else ""


_reason = _why_not()
needs_criu = pytest.mark.skipif(bool(_reason), reason=_reason or "-")


class Listener:
    """A Unix socket that gets a terminal, as conmon has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(1)
        self.socket.settimeout(20)

    def take(self) -> int:
        connection, _ = self.socket.accept()
        with connection:
            _, extra, _, _ = connection.recvmsg(64, socket.CMSG_SPACE(4))
        return array.array("i", extra[0][2])[0]

    def close(self) -> None:
        self.socket.close()


class Saved:
    """The bundle's container and its images."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.images = bundle.folder / "images"
        self._open: list[Any] = []

    def _quiet(self, *words: str, stdout: Any = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
        """The container would hold pipes open: errors go into a file."""
        errors = self.bundle.folder / "errors"
        with errors.open("w") as file:
            done = self.bundle.call(*words, capture_output=False, stdout=stdout, stderr=file, timeout=120)
        done.stderr = errors.read_text()
        return done

    def run(self, script: str, *flags: str, stdout: Any = subprocess.DEVNULL) -> None:
        """`run --detach` of a shell with `script`."""
        if stdout is subprocess.PIPE:
            reader, writer = os.pipe()
            self._open += [reader, writer]
            stdout = writer
        self.bundle.config["process"]["args"] = ["sh", "-c", script]
        self.bundle.config["root"]["readonly"] = False
        self.bundle.write()
        done = self._quiet("run", "--detach", *flags, self.bundle.name, stdout=stdout)
        assert done.returncode == 0, done.stderr

    def checkpoint(self, *flags: str, images: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self._quiet("checkpoint", "--image-path", str(images or self.images), *flags, self.bundle.name)

    def restore(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return self._quiet("restore", "--detach", "--image-path", str(self.images), *flags, self.bundle.name)

    def start(self, command: str, *flags: str) -> subprocess.Popen[bytes]:
        """The same, not waited for."""
        return subprocess.Popen([*RUNTIME, "--root", str(self.bundle.state), command, "--image-path", str(self.images),
                                 *flags, self.bundle.name], cwd=self.bundle.folder, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def count(self, least: int = 0) -> int:
        """What it has counted to, once that is `least`."""
        file = self.bundle.rootfs / "tmp/n"

        def now() -> int:
            lines = file.read_text().split() if file.exists() else []
            assert lines == [str(number + 1) for number in range(len(lines))], lines    # it never began again
            return len(lines)

        if least:
            until(lambda: now() >= least, 30)
        return until(now, 30)

    def listener(self, name: str) -> Listener:
        made = Listener(self.bundle.folder / name)
        self._open.append(made)
        return made

    def read(self, fd: int, wanted: bytes) -> bytes:
        """What comes from a terminal, up to `wanted`."""
        got, end = b"", time.monotonic() + 20
        while wanted not in got and time.monotonic() < end:
            if select.select([fd], [], [], 0.5)[0]:
                got += os.read(fd, 4096)
        return got

    def criu_runs(self) -> list[int]:
        """Processes of criu that work on these images."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (path / "comm").read_text() == "criu\n" and any(
                        os.readlink(fd).startswith(str(self.images)) for fd in (path / "fd").iterdir()):
                    found.append(int(path.name))
            except OSError:
                pass
        return found

    def close(self) -> None:
        for pid in self.criu_runs():
            os.kill(pid, signal.SIGKILL)
        for made in self._open:
            os.close(made) if isinstance(made, int) else made.close()


@pytest.fixture
def saved(bundle: Bundle) -> Any:
    made = Saved(bundle)
    yield made
    made.close()
