"""The same verbs with `--vm`: streams, exit codes, signals, life, files, and what is left."""

from __future__ import annotations

import os
import termios
import time

import pytest
from framework.instances import Screen, until
from framework.instances import world as make_world
from framework.run import needs_kvm

pytestmark = [needs_kvm, pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"), "--vm")


@pytest.fixture(scope="module")
def box(world):
    """One VM that serves many checks."""
    id = world.start("--name", "box", "-e", "GIVEN=x y", "-w", "/work/here", "--hostname", "inside", "busybox", "sh",
                     "-c", "trap 'echo bye; exit 3' TERM; echo out; echo err >&2; while :; do sleep 0.1; done")
    yield id
    world("rm", "-f", "box")


def test_output_and_exit_code(world):
    done = world.run("--rm", "busybox", "sh", "-c", "echo out; echo err >&2; uname -r; exit 42", timeout=120)
    assert done.returncode == 42 and done.stderr == b"err\n"
    assert done.stdout.startswith(b"out\n") and done.stdout.split()[1].decode() != os.uname().release


def test_stdin_is_binary_clean_and_ends(world):
    data = os.urandom(1 << 20)
    done = world.run("--rm", "-i", "busybox", "cat", stdin=data)
    assert done.returncode == 0 and done.stdout == data


def test_no_such_program(world):
    assert "not found" in world.fails(127, "run", "--rm", *world.common(()), "busybox", "nope")
    world.fails(126, "run", "--rm", *world.common(()), "busybox", "/etc")


def test_what_is_refused(world):
    for option in (["--privileged"], ["--cpuset-cpus", "0"], ["--security-opt", "seccomp=unconfined"]):
        assert "not for --vm" in world.fails(125, "run", *world.common(()), *option, "busybox", "true")
    world.fails(125, "run", "--vm", "--network", "host", "busybox", "true")


def test_it_is_listed(world, box):
    assert world.status("box") == "running" and "vm" in world.ok("ps") and box[:12] in world.ok("ps", "-q")
    assert until(lambda: world("logs", "box").stdout == b"out\n") and world("logs", "box").stderr == b"err\n"
    assert "sleep 0.1" in world.ok("top", "box") or "sh -c" in world.ok("top", "box")
    assert "box" in world.ok("stats", "--no-stream")


def test_exec(world, box):
    done = world("exec", "box", "sh", "-c", "echo $GIVEN; pwd; hostname; echo e >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"x y\n/work/here\ninside\n", b"e\n")
    assert world("exec", "-i", "box", "cat", stdin=b"\0\1\xff" * 9999).stdout == b"\0\1\xff" * 9999
    assert world("exec", "-u", "somebody", "-w", "/tmp", "-e", "A=b", "box", "sh", "-c",
                 "id -u; pwd; echo $A").stdout == b"1000\n/tmp\nb\n"
    world.fails(127, "exec", "box", "nope")
    world.ok("exec", "-d", "box", "sh", "-c", "sleep 0.2; echo x > /detached")
    assert until(lambda: world("exec", "box", "cat", "/detached").stdout == b"x\n")


def test_pause(world, box):
    world.ok("pause", "box")
    assert world.status("box") == "paused"
    world.ok("unpause", "box")
    assert world("exec", "box", "echo", "on").stdout == b"on\n"


def test_cp_both_ways(world, box, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"\0data" * 1000)
    world.ok("cp", str(tmp_path / "in"), "box:/put")
    assert world("exec", "box", "cat", "/put/file").stdout == b"\0data" * 1000
    world.ok("exec", "box", "sh", "-c", "echo made > /made")
    world.ok("cp", "box:/made", str(tmp_path / "made"))
    assert (tmp_path / "made").read_text() == "made\n"


def test_the_keeper_is_killed(world, box):
    pid = until(world.keeper)
    assert pid > 1
    os.kill(pid, 9)
    assert until(lambda: world.keeper() != pid)
    assert world("exec", "box", "echo", "alive").stdout == b"alive\n"
    assert world.status("box") == "running"


def test_stop_and_start_again(world, box):
    world.ok("exec", "box", "sh", "-c", "echo kept > /kept")
    world.ok("stop", "box")
    assert world.ok("wait", "box") == "3\n" and "bye" in world.ok("logs", "box")
    world.ok("start", "box")
    assert world("exec", "box", "cat", "/kept").stdout == b"kept\n"


def test_volumes(world, tmp_path):
    (tmp_path / "file").write_text("outside\n")
    mounts = ["-v", "kept:/v", "-v", f"{tmp_path}:/b", "-v", f"{tmp_path}:/r:ro", "--tmpfs", "/t:size=1m"]
    done = world.run("--rm", *mounts, "busybox", "sh", "-c", "cat /b/file; echo in > /b/back; echo kept > /v/x; "
                     "echo no > /r/file; df -k /t | tail -1")
    assert done.stdout.startswith(b"outside\n") and b"1024" in done.stdout and b"ead-only" in done.stderr
    assert (tmp_path / "back").read_text() == "in\n" and (tmp_path / "file").read_text() == "outside\n"
    assert (world.data / "volumes" / "kept" / "_data" / "x").read_text() == "kept\n"
    world.ok("volume", "rm", "kept")


def test_a_terminal(world):
    screen = Screen(world, "run", *world.common(()), "--rm", "-it", "busybox", "sh", "-c",
                    "stty size; read x; echo got $x; trap 'stty size; exit 7' WINCH; while :; do sleep 0.1; done")
    screen.expect(b"30 90\r\n", 60)
    screen.type(b"hello\r")
    screen.expect(b"got hello\r\n", 30)
    time.sleep(0.5)
    termios.tcsetwinsize(screen.fd, (40, 100))
    screen.expect(b"40 100\r\n", 30)
    assert screen.end() == 7


def test_ctrl_c_is_the_programs(world):
    screen = Screen(world, "run", *world.common(()), "--rm", "-it", "busybox", "sh", "-c",
                    "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.1; done")
    screen.expect(b"ready", 60)
    screen.type(b"\x03")
    screen.expect(b"interrupted", 30)
    assert screen.end() == 5


def test_a_signal_ends_what_runs_in_front(world):
    process = world.popen("run", *world.common(()), "--rm", "busybox", "sh", "-c",
                          "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"got\n", 9)


def test_a_guest_that_never_answers_is_killed(world):
    id = world.start("--name", "dead", "busybox", "sleep", "1000")
    os.kill(world.kept(id)["pid"], 19)         # SIGSTOP
    began = time.monotonic()
    world.ok("rm", "-f", "dead", timeout=120)
    assert time.monotonic() - began < 90


def test_the_vm_is_killed(world):
    id = world.start("--name", "shot", "busybox", "sleep", "1000")
    os.kill(world.kept(id)["pid"], 9)
    world.ok("wait", "shot")
    assert world.status("shot") == "exited"
