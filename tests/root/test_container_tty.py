"""Terminals of containers: the foreground relay on a real terminal, and --console-socket as conmon uses it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import termios
import time
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle
from framework.terminal import OnTerminal

pytestmark = container

needs_runc = pytest.mark.skipif(subprocess.run(["sh", "-c", "command -v runc"], capture_output=True).returncode != 0,
                                reason="runc is not installed")


def begin(made: Bundle) -> None:
    done = made.create("sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert made.call("start", made.name).returncode == 0


def on_terminal(made: Bundle, *words: str, size: tuple[int, int] | None = (33, 101)) -> OnTerminal:
    return OnTerminal("--root", str(made.state), *words, size=size, command=RUNTIME)


def modes(terminal: OnTerminal) -> list[Any]:
    return termios.tcgetattr(terminal.slave)


def becomes_raw(terminal: OnTerminal) -> None:
    deadline = time.monotonic() + 10
    while modes(terminal)[3] & termios.ICANON:
        assert time.monotonic() < deadline, "the terminal was not set to raw mode"
        time.sleep(0.01)


# in the foreground ------------------------------------------------------------------------------------


def test_exec_has_a_terminal_of_the_containers_own(bundle):
    begin(bundle)
    script = "tty; stty size; echo in to /dev/tty > /dev/tty; stat -c %u $(tty); echo code; exit 5"
    with on_terminal(bundle, "exec", "-t", "--user", "1000", bundle.name, "sh", "-c", script) as terminal:
        assert terminal.end() == 5
        text = terminal.output.decode()
        assert "/dev/pts/0" in text and "33 101" in text and "in to /dev/tty" in text and "\r\n1000\r\n" in text, text
        assert modes(terminal) == terminal.before


def test_run_has_one_too(bundle):
    bundle.config["process"] |= {"terminal": True, "args": ["sh", "-c", "tty; ls -l /dev/console; stty size; exit 6"]}
    bundle.write()
    with on_terminal(bundle, "run", "--bundle", str(bundle.folder), bundle.name) as terminal:
        assert terminal.end() == 6
        text = terminal.output.decode()
        assert "/dev/pts/0" in text and "/dev/console" in text and "33 101" in text, text
        assert modes(terminal) == terminal.before


def test_keys_are_the_programs_and_so_are_changes_of_size(bundle):
    begin(bundle)
    script = ("trap 'echo interrupted; n=$n.; [ $n = .. ] && exit 9' INT; trap 'stty size' WINCH; echo ready; "
              "while true; do sleep 0.05; done")
    with on_terminal(bundle, "exec", "-t", bundle.name, "sh", "-c", script) as terminal:
        terminal.wait_for(b"ready")
        becomes_raw(terminal)
        terminal.type(b"\x03")              # Ctrl-C
        terminal.wait_for(b"interrupted")
        terminal.resize(44, 55)
        terminal.wait_for(b"44 55")
        terminal.type(b"\x03")
        assert terminal.end() == 9
        assert modes(terminal) == terminal.before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_the_terminal_is_restored_when_a_signal_ends_it(bundle, number, code):
    begin(bundle)
    with on_terminal(bundle, "exec", "-t", bundle.name, "sh", "-c", "echo ready; exec sleep 1000") as terminal:
        terminal.wait_for(b"ready")
        becomes_raw(terminal)
        terminal.process.send_signal(number)
        assert terminal.end() == code
        assert modes(terminal) == terminal.before


def test_the_terminal_is_as_it_was_when_nothing_could_be_run(bundle):
    begin(bundle)
    with on_terminal(bundle, "exec", "-t", bundle.name, "absent") as terminal:
        assert terminal.end() == 255
        assert b"executable file not found in $PATH" in terminal.output
        assert modes(terminal) == terminal.before


def test_when_the_container_is_killed_the_terminal_comes_back(bundle):
    begin(bundle)
    with on_terminal(bundle, "exec", "-t", bundle.name, "sh", "-c", "echo ready; exec sleep 1000") as terminal:
        terminal.wait_for(b"ready")
        becomes_raw(terminal)
        bundle.call("kill", bundle.name, "KILL")
        assert terminal.end() == 137
        assert modes(terminal) == terminal.before


def test_much_output_comes_whole(bundle):
    begin(bundle)
    with on_terminal(bundle, "exec", "-t", bundle.name, "seq", "1", "20000") as terminal:
        assert terminal.end(30) == 0
        while select.select([terminal.master], [], [], 0.2)[0]:
            terminal.output += os.read(terminal.master, 65536)
        assert terminal.output.split() == [str(number).encode() for number in range(1, 20001)]


def test_a_program_that_does_not_read_holds_nothing_up(bundle):
    """More is typed than a terminal keeps: output goes on, and so do signals."""
    begin(bundle)
    script = ("stty raw -echo; echo ready; trap 'echo caught; exit 9' TERM; "
              "while true; do echo going on; sleep 0.1; done")
    with on_terminal(bundle, "exec", "-t", bundle.name, "sh", "-c", script) as terminal:
        terminal.wait_for(b"ready")
        becomes_raw(terminal)
        os.set_blocking(terminal.master, False)
        for _ in range(100):
            try:
                terminal.type(b"x" * 1000)
            except BlockingIOError:
                break
        terminal.output = b""
        terminal.wait_for(b"going on\ngoing on\ngoing on")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.wait_for(b"caught")
        assert terminal.end() == 9


def test_input_that_is_no_terminal_is_typed_and_its_end_is_told(bundle):
    begin(bundle)
    done = subprocess.run([*RUNTIME, "--root", str(bundle.state), "exec", "-t", bundle.name, "sh"], timeout=20,
                          input=b"echo $((6*7))\nexit 3\n", capture_output=True, check=False)
    assert done.returncode == 3 and b"42" in done.stdout
    done = subprocess.run([*RUNTIME, "--root", str(bundle.state), "exec", "-t", bundle.name, "cat"], timeout=20,
                          input=b"line\n", capture_output=True, check=False)
    assert done.returncode == 0 and b"line\r\nline\r\n" in done.stdout


# by a socket --------------------------------------------------------------------------------------------


class Receiver:
    """What conmon and the containerd shim do: listen, take one descriptor."""

    def __init__(self, made: Bundle) -> None:
        self.path = str(made.folder / "console")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.listener.settimeout(20)
        self.master = -1

    def take(self) -> bytes:
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(20)
            data, fds, _, _ = socket.recv_fds(connection, 4096, 4)
            (self.master,) = fds
            assert connection.recv(1) == b""            # and nothing else
            return data

    def read(self, until: bytes) -> bytes:
        text, deadline = b"", time.monotonic() + 10
        while until not in text:
            assert time.monotonic() < deadline, text
            if select.select([self.master], [], [], 0.1)[0]:
                text += os.read(self.master, 4096)
        return text

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.close()
        if self.master >= 0:
            os.close(self.master)
        os.unlink(self.path)


SILENT: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL}


def test_exec_gives_its_terminal_to_the_socket(bundle):
    begin(bundle)
    with Receiver(bundle) as receiver:
        assert bundle.call("exec", "-d", "-t", "--console-socket", receiver.path, bundle.name, "sh", **SILENT
                           ).returncode == 0
        assert receiver.take() == b"/dev/ptmx"
        termios.tcsetwinsize(receiver.master, (20, 30))
        os.write(receiver.master, b"stty size; tty\n")
        assert b"/dev/pts/0" in receiver.read(b"/dev/pts/0")
        os.write(receiver.master, b"echo $((40 + 2)); exit\n")
        receiver.read(b"42")


@needs_runc
def test_what_the_socket_gets_is_what_runc_sends(bundle):
    bundle.config["process"] |= {"terminal": True, "args": ["sh", "-c", "tty; stty size; echo end; sleep 1000"],
                                 "consoleSize": {"height": 21, "width": 43}}
    bundle.write()
    said = []
    for runtime in (RUNTIME, ["runc"]):
        with Receiver(bundle) as receiver:
            assert bundle.call("create", "--console-socket", receiver.path, bundle.name, runtime=runtime, **SILENT
                               ).returncode == 0
            name = receiver.take()
            assert bundle.call("start", bundle.name, runtime=runtime).returncode == 0
            said.append((name, receiver.read(b"end"), os.fstat(receiver.master).st_rdev,
                         termios.tcgetattr(receiver.master)))
            bundle.call("delete", "--force", bundle.name, runtime=runtime)
    assert b"21 43" in said[0][1]
    assert said[0] == said[1]


def test_without_anybody_at_the_socket_it_is_refused(bundle):
    begin(bundle)
    done = bundle.call("exec", "-d", "-t", "--console-socket", "/absent", bundle.name, "true")
    assert done.returncode == 255 and "--console-socket /absent: No such file or directory" in done.stderr
    done = bundle.call("exec", "-d", "--console-socket", "/absent", bundle.name, "true")
    assert done.returncode == 255 and "no terminal" in done.stderr


# images that prepare something ------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", ["nothing", "a file", "a link to the host's"])
def test_only_a_real_devpts_will_do(bundle, prepared):
    bundle.config["mounts"] = [row for row in bundle.config["mounts"] if row["destination"] not in ("/dev", "/dev/pts",
                               "/dev/shm", "/dev/mqueue")]
    bundle.config["root"]["readonly"] = False
    (bundle.rootfs / "dev/pts").mkdir()
    if prepared == "a file":
        (bundle.rootfs / "dev/pts/ptmx").write_text("")
    elif prepared == "a link to the host's":
        (bundle.rootfs / "dev/pts/ptmx").symlink_to("../../../../../../dev/null")
    begin(bundle)
    with Receiver(bundle) as receiver:
        done = bundle.call("exec", "-d", "-t", "--console-socket", receiver.path, bundle.name, "true")
        assert done.returncode == 255 and "process.terminal" in done.stderr, done.stderr
        assert "devpts" in done.stderr
