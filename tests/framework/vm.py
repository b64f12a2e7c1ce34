"""`pyhv boot` in the background, under a name of this test run; its control socket."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from framework.control import Line
from framework.run import PYHV

from hv.machine.control import folder

PREFIX = f"test-{os.getpid()}"


class Vm:
    """`pyhv boot` in the background, under a name of this test run."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = f"{PREFIX}-{name}"
        self.path = f"{folder()}/{self.name}.sock"
        self.process = subprocess.Popen([*PYHV, "boot", *arguments, "--name", self.name, "--timeout", "300", "--quiet"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while not os.path.exists(self.path):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.stderr
            time.sleep(0.01)

    def line(self) -> Line:
        return Line(self.path)

    def end(self, timeout: float = 20) -> int:
        return self.process.wait(timeout)

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()
        assert not os.path.exists(self.path)
