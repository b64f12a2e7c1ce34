"""Terminals: size, raw mode, the keys to detach, what stays of ours."""

from __future__ import annotations

import os
import pty
import termios
import time

import pytest
from framework.instances import Screen, until
from framework.instances import world as make_world

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


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
