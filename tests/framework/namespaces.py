"""A network namespace that plays the host in tests, so that the real one stays as it is.

    with Host() as host:            # this thread is in it within the block, and between `with host:` blocks again
        host.run("ip link add ...")
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hv.linux.netns import inside, new_netns


class Host:
    """Enter it as often as wanted; commands run in it in any case. Closed by the outermost block."""

    def __init__(self) -> None:
        self.netns = new_netns()
        self._inside: list[inside] = []

    def __enter__(self) -> Host:
        entered = inside(self.netns.fd)
        entered.__enter__()
        self._inside.append(entered)
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.pop().__exit__(*error)
        if not self._inside:
            self.netns.close()

    def call(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """A command in it."""
        return subprocess.run(["nsenter", f"--net={self.netns.path}", *words], text=True, timeout=30, check=False,
                              capture_output=True, input=text)

    def run(self, command: str) -> str:
        """What a shell command prints; it must succeed."""
        done = self.call("sh", "-ec", command)
        assert done.returncode == 0, done.stderr
        return done.stdout


def until_gone(path: str | Path, seconds: float = 5) -> bool:
    """Whether a file goes away in time."""
    import time

    end = time.monotonic() + seconds
    while os.path.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
