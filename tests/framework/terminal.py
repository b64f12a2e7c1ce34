"""Running `pyhv` on a terminal, as a user at a shell does."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import termios
import time

from framework.run import PYHV


class OnTerminal:
    """`pyhv` as the foreground job of a terminal of its own, as a shell would start it."""

    def __init__(self, *arguments: str, size: tuple[int, int] | None = None, command: list[str] = PYHV) -> None:
        self.master, slave = pty.openpty()
        if size is not None:
            self.resize(*size)
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        self.output = b""

        def own_terminal() -> None:
            os.setsid()
            import fcntl

            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen([*command, *arguments], stdin=slave, stdout=slave, stderr=slave,
                                        preexec_fn=own_terminal)

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.master, (rows, columns))      # and the foreground job gets SIGWINCH

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, text: bytes, timeout: float = 15) -> None:
        end = time.monotonic() + timeout
        while text not in self.output:
            assert time.monotonic() < end, f"{text!r} did not come; got {self.output!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 4096)

    def end(self, timeout: float = 15) -> int:
        end = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 4096)
        assert self.process.poll() is not None, "pyhv did not end"
        while select.select([self.master], [], [], 0)[0]:       # its last words
            try:
                self.output += os.read(self.master, 4096)
            except OSError:
                break
        return self.process.returncode

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        if self.slave >= 0:
            os.close(self.slave)
