"""Terminals: size, raw mode, the keys to detach, what stays of ours."""

from __future__ import annotations

import os
import pty
import select
import termios
import time

import pytest
from framework.instances import until
from framework.instances import world as make_world
from framework.run import PYHV

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


class Screen:
    """`pyhv WORDS` on a terminal of 30 rows and 90 columns."""

    def __init__(self, world, *words):
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if not self.pid:
            termios.tcsetwinsize(0, (30, 90))
            os.execve(PYHV[0], [*PYHV, *words], world.env | {"TERM": "dumb"})

    def expect(self, text, seconds=10):
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, (text, self.seen)
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    assert text in self.seen, (text, self.seen)
        _, _, self.seen = self.seen.partition(text)

    def type(self, data):
        os.write(self.fd, data)

    def end(self):
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return code


def test_size_keys_and_exit_code(world):
    screen = Screen(world, "run", "--rm", "-it", "--network", "none", "busybox", "sh", "-c",
                    "stty size; tty; echo $TERM; read x; echo got $x; trap 'stty size; exit 7' WINCH; "
                    "while :; do sleep 0.05; done")
    screen.expect(b"30 90\r\n")
    screen.expect(b"/dev/pts/0\r\nxterm\r\n")
    screen.type(b"hello\r")
    screen.expect(b"got hello\r\n")
    time.sleep(0.2)
    termios.tcsetwinsize(screen.fd, (40, 100))
    screen.expect(b"40 100\r\n")
    assert screen.end() == 7


def test_ctrl_c_is_the_programs(world):
    screen = Screen(world, "run", "--rm", "-it", "--network", "none", "busybox", "sh", "-c",
                    "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done")
    screen.expect(b"ready")
    screen.type(b"\x03")
    screen.expect(b"interrupted")
    assert screen.end() == 5


def test_detached_by_keys_and_attached_again(world):
    screen = Screen(world, "run", "-it", "--name", "keys", "--network", "none", "busybox", "sh", "-c",
                    "while read x; do echo said $x; done")
    screen.type(b"one\r")
    screen.expect(b"said one")
    screen.type(b"\x10\x11")
    assert screen.end() == 0 and world.status("keys") == "running"
    again = Screen(world, "attach", "--detach-keys", "ctrl-x", "keys")
    time.sleep(0.3)
    again.type(b"two\r")
    again.expect(b"said two")
    again.type(b"\x18")
    assert again.end() == 0 and world.status("keys") == "running"
    world.ok("rm", "-f", "keys")


def test_exec_on_a_terminal(world):
    world.start("--name", "host", "busybox", "sleep", "1000")
    screen = Screen(world, "exec", "-it", "host", "sh", "-c", "stty size; read x; exit $x")
    screen.expect(b"30 90")
    screen.type(b"9\r")
    assert screen.end() == 9


def test_the_terminal_is_as_it_was(world):
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = world.popen("run", "--rm", "-it", "--network", "none", "busybox", "sh", "-c", "sleep 0.3", stdin=slave,
                          stdout=slave, stderr=slave)
    assert until(lambda: termios.tcgetattr(slave) != before or process.poll() is not None)
    process.wait(20)
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
