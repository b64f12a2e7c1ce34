"""`run` in the foreground: signals, orphans, the terminal, the exit code, what is left."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle  # a fixture

pytestmark = container


def begin(bundle: Bundle, *args: str, **options: object) -> subprocess.Popen[bytes]:
    bundle.config["process"]["args"] = list(args)
    bundle.write()
    command = [*RUNTIME, "--root", str(bundle.state), "run", bundle.name]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=bundle.folder, **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGWINCH + 2])
def test_signals_go_on_to_the_program(bundle: Bundle, number: int) -> None:
    script = f"trap 'echo got; exit 33' {int(number)}; echo ready; while :; do sleep 0.05; done"
    with begin(bundle, "sh", "-c", script) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"got\n"
        assert process.wait(10) == 33


def test_a_burst_of_signals(bundle: Bundle) -> None:
    script = "trap 'n=$((n+1))' USR1; trap 'exit 44' TERM; echo ready; while :; do sleep 0.01; done"
    with begin(bundle, "sh", "-c", script) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        for _ in range(200):
            process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 44


def test_orphans_without_a_pid_namespace_are_ours(bundle: Bundle) -> None:
    linux = bundle.config["linux"]
    linux["namespaces"] = [row for row in linux["namespaces"] if row["type"] != "pid"]
    bundle.config["mounts"] = [row for row in bundle.config["mounts"] if row["destination"] != "/proc"]
    linux["maskedPaths"] = linux["readonlyPaths"] = []
    with begin(bundle, "sh", "-c", "(sleep 1003 &); echo started; sleep 0.3; exit 6") as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2       # the program, and the orphan
        orphan = next(pid for pid in children if b"1003" in Path(f"/proc/{pid}/cmdline").read_bytes())
        assert process.wait(10) == 6
    assert not Path(f"/proc/{orphan}").exists()


def test_nothing_of_ours_stays_with_a_detached_container(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()
    done = bundle.call("run", "--detach", bundle.name, capture_output=False, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    assert done.returncode == 0 and bundle.status() == "running"
    tasks = Path(f"/sys/fs/cgroup/pids/pyhv-{bundle.name}/cgroup.procs").read_text().split()
    assert tasks == [str(bundle.pid())]
    assert not [pid for pid in os.listdir("/proc") if pid.isdecimal()
                and bundle.name.encode() in _command(pid) and b"pyhv-runtime" in _command(pid)]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_keep(bundle: Bundle) -> None:
    bundle.write()
    assert bundle.call("run", "--keep", bundle.name).returncode == 0
    assert bundle.status() == "stopped"


class Terminal:
    """`run` as the foreground job of a terminal."""

    def __init__(self, bundle: Bundle, *args: str) -> None:
        bundle.config["process"] |= {"args": list(args), "terminal": True}
        bundle.write()
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (33, 77))
        self.before = termios.tcgetattr(self.slave)

        def own() -> None:
            os.setsid()
            import fcntl

            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

        command = [*RUNTIME, "--root", str(bundle.state), "run", bundle.name]
        self.process = subprocess.Popen(command, cwd=bundle.folder, stdin=self.slave, stdout=self.slave,
                                        stderr=self.slave, preexec_fn=own)
        self.output = b""

    def wait_for(self, text: bytes) -> None:
        import select

        end = time.monotonic() + 10
        while text not in self.output:
            assert time.monotonic() < end, self.output
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 4096)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_a_terminal(bundle: Bundle) -> None:
    script = ("tty; stty size; trap 'stty size' WINCH; echo ready; read -r line; echo \"[$line]\"; "
              "while :; do sleep 0.05; done")
    terminal = Terminal(bundle, "sh", "-c", script)
    try:
        terminal.wait_for(b"ready")
        assert b"/dev/pts/0" in terminal.output and b"33 77" in terminal.output
        assert not termios.tcgetattr(terminal.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)   # raw
        os.write(terminal.master, b"typed\r")
        terminal.wait_for(b"[typed]")
        termios.tcsetwinsize(terminal.master, (44, 55))
        terminal.wait_for(b"44 55")
        os.write(terminal.master, b"\x03")          # Ctrl-C is the container's to act on
        assert terminal.process.wait(10) == 130
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_output_that_comes_last_is_not_lost(bundle: Bundle) -> None:
    terminal = Terminal(bundle, "sh", "-c", "seq 1 3000; echo the-end")
    try:
        terminal.wait_for(b"the-end")
        assert terminal.process.wait(10) == 0
        assert terminal.output.count(b"\n") == 3001
    finally:
        terminal.close()


def test_a_terminal_with_input_from_a_pipe(bundle: Bundle) -> None:
    bundle.config["process"]["terminal"] = True
    done = bundle.run("sh", "-c", "read -r a; echo \"[$a]\"; cat; exit 8", stdin=None, input="one\ntwo\n")
    assert done.returncode == 8 and "[one]" in done.stdout and "two" in done.stdout
