"""`pyhv run` and the verbs of instances, containers: streams, exit codes, signals, life and what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from framework.instances import World, until
from framework.instances import world as make_world
from framework.run import no_traceback

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _empty(world):
    yield
    world.empty()


def test_output_errors_and_exit_code(world):
    done = world.run("--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err\n")
    assert not os.listdir(world.data / "instances" / "names")


@pytest.mark.parametrize("command, code", [
    (["true"], 0), (["false"], 1), (["sh", "-c", "kill -9 $$"], 137), (["sh", "-c", "kill -15 $$; sleep 5"], 143),
    (["nope"], 127), (["/no/such/file"], 127), (["/etc"], 126), (["/etc/passwd"], 126),
    (["sh", "-c", "exit 255"], 255)])
def test_exit_codes(world, command, code):
    # the first process of a pid namespace gets no signal of its own that it does not handle: hence --init
    done = world.run("--rm", *(["--init"] if "kill" in command[-1] else []), "busybox", *command)
    assert done.returncode == code, done.stderr
    no_traceback(done)


def test_usage_errors_are_one_line(world):
    for words in (("run",), ("run", "--nope", "busybox"), ("run", "--memory", "1x", "busybox"),
                  ("run", "--pull", "never", "nosuchimage:1"),
                  ("run", "--restart", "often", "busybox"), ("run", "--rm", "--restart", "always", "busybox"),
                  ("run", "--name", "a/b", "busybox"), ("run", "--vm", "--container", "busybox"),
                  ("run", "--kernel", "/x", "busybox"), ("run", "-v", "a:b:c:d", "busybox"),
                  ("run", "--network", "none", "-u", "nobodyhere", "busybox", "true"),
                  ("run", "--network", "none", "-v", "/no/such/thing:/x", "busybox", "true")):
        world.fails(125, *words)
    world.fails(2, "ps", "extra")
    world.fails(1, "stop", "nobody")
    world.fails(2, "logs")


def test_stdin_is_binary_clean_and_ends(world):
    data = os.urandom(3 << 20)
    done = world.run("--rm", "-i", "busybox", "cat", stdin=data)
    assert done.returncode == 0 and done.stdout == data


def test_without_i_standard_input_is_empty(world):
    assert world.run("--rm", "busybox", "cat", stdin=b"unseen").stdout == b""


def test_a_slow_reader_holds_the_program_up_and_loses_nothing(world):
    process = world.popen("run", *world.common(()), "--name", "slow", "busybox", "sh", "-c",
                          "i=0; while [ $i -lt 400 ]; do head -c 16384 /dev/zero; i=$((i+1)); done")
    assert until(lambda: world("inspect", "slow").returncode == 0)
    time.sleep(1)
    assert world.status("slow") == "running"        # 6.5 MB don't fit anywhere
    out, _ = process.communicate(timeout=30)
    assert len(out) == 400 * 16384 and process.returncode == 0


def test_many_small_writes_come_in_order(world):
    done = world.run("--rm", "busybox", "sh", "-c", "seq 1 20000")
    assert done.stdout.decode().split() == [str(number) for number in range(1, 20001)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_go_on_to_the_program(world, number):
    name = number.name.removeprefix("SIG")
    process = world.popen("run", *world.common(()), "--rm", "busybox", "sh", "-c",
                          f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert out == f"got {name}\n".encode() and process.returncode == 9


def test_the_life_of_one_in_the_background(world):
    id = world.start("--name", "life", "busybox", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")
    assert re.fullmatch("[0-9a-f]{32}", id)
    assert "life" in world.ok("ps") and id[:12] in world.ok("ps", "-q")
    assert "is running" in world.fails(1, "rm", "life")
    assert world.ok("pause", "life") == "life\n" and world.status("life") == "paused"
    assert "paused" in world.fails(1, "exec", "life", "true")
    world.ok("unpause", "life")
    assert world.ok("stop", "life") == "life\n"
    assert world.status("life") == "exited" and world.ok("wait", "life") == "3\n"
    assert "life" not in world.ok("ps") and "Exited (3)" in world.ok("ps", "-a")
    world.ok("start", "life")
    assert world.status("life") == "running"
    world.ok("restart", "-t", "1", "life")
    assert world.status("life") == "running"
    world.ok("rename", "life", "after")
    world.ok("kill", "-s", "TERM", "after")
    assert world.ok("wait", id[:6]) == "3\n"
    world.ok("rm", "after")
    assert world.ok("ps", "-aq") == ""


def test_stop_kills_who_does_not_listen(world):
    world.start("--name", "deaf", "busybox", "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")
    began = time.monotonic()
    world.ok("stop", "-t", "1", "deaf")
    assert 0.9 < time.monotonic() - began < 8 and world.ok("wait", "deaf") == "137\n"


def test_stop_signal_of_the_options_and_of_the_image(world):
    world.image("quits", StopSignal="SIGUSR2")
    script = "trap 'exit 4' USR1; trap 'exit 5' USR2; while :; do sleep 0.05; done"
    world.start("--name", "one", "--stop-signal", "USR1", "busybox", "sh", "-c", script)
    world.start("--name", "two", "quits", "sh", "-c", script)
    time.sleep(0.2)
    world.ok("stop", "one", "two")
    assert world.ok("wait", "one", "two") == "4\n5\n"


def test_names_are_taken_once(world):
    world.ok("create", *world.common(()), "--name", "mine", "busybox")
    assert "taken" in world.fails(125, "run", *world.common(()), "--name", "mine", "busybox", "true")
    assert world.ok("ps", "-aq").count("\n") == 1
    rivals = [world.popen("create", *world.common(()), "--name", "once", "busybox") for _ in range(8)]
    codes = sorted(rival.wait(30) for rival in rivals)
    for rival in rivals:
        rival.communicate()
    assert codes.count(0) == 1 and len(codes) == 8


def test_create_then_start_attached(world):
    world.ok("create", "-i", *world.common(()), "--name", "later", "busybox", "sh", "-c", "cat; exit 6")
    assert world.status("later") == "created"
    done = world("start", "-ai", "later", stdin=b"through\n")
    assert (done.returncode, done.stdout) == (6, b"through\n")


def test_attach_sees_what_comes_and_the_end(world):
    world.start("--name", "talks", "busybox", "sh", "-c", "sleep 0.7; echo late; exit 8")
    done = world("attach", "talks")
    assert (done.returncode, done.stdout) == (8, b"late\n")
    assert "not running" in world.fails(1, "attach", "talks")


def test_what_an_instance_writes_stays_until_it_is_removed(world):
    world.start("--name", "keeps", "busybox", "sh", "-c", "cat /count 2>/dev/null; echo x >> /count")
    world.ok("wait", "keeps")
    done = world("start", "-a", "keeps")
    assert done.stdout == b"x\n"


def test_the_image_is_in_use(world):
    world.start("--name", "user", "busybox", "sleep", "100")
    assert list((world.data / "images" / "users").glob("*/*"))
    world.ok("rm", "-f", "user")
    assert not list((world.data / "images" / "users").glob("*/*"))


@pytest.mark.parametrize("policy, times", [("on-failure:2", 2), ("always", 3)])
def test_restart_policies(world, policy, times):
    world.start("--name", "again", "--restart", policy, "busybox", "sh", "-c", "echo run; exit 1")
    assert until(lambda: world.inspect("again")["RestartCount"] >= times, 20)
    if policy.startswith("on-failure"):
        assert until(lambda: world.status("again") == "exited")
        time.sleep(1)
        assert world.ok("logs", "again") == "run\n" * 3
    else:
        world.ok("stop", "again")
        time.sleep(0.5)                 # what it wrote last is in the log as well
        count = world.ok("logs", "again").count("run")
        time.sleep(1.5)
        assert world.ok("logs", "again").count("run") == count and world.status("again") == "exited"


def test_no_restart_of_success_with_on_failure(world):
    world.start("--name", "fine", "--restart", "on-failure", "busybox", "true")
    world.ok("wait", "fine")
    time.sleep(0.5)
    assert world.status("fine") == "exited" and world.inspect("fine")["RestartCount"] == 0


def test_nothing_of_it_is_mounted_on_the_host(world):
    world.start("--name", "hidden", "busybox", "sleep", "100")
    assert str(world.folder) not in Path("/proc/self/mounts").read_text()


def test_a_caller_that_is_killed_leaves_it_running(world):
    process = world.popen("run", *world.common(()), "--name", "orphan", "busybox", "sh", "-c",
                          "echo up; sleep 1; echo still; sleep 100")
    assert process.stdout.readline() == b"up\n"
    process.kill()
    process.communicate()
    assert until(lambda: "still" in world.ok("logs", "orphan"))
    assert world.status("orphan") == "running"


def test_cidfile_and_labels(world, tmp_path):
    file = tmp_path / "cid"
    id = world.start("--cidfile", str(file), "--label", "a=b", "--label", "c", "busybox", "sleep", "100")
    assert file.read_text() == id
    assert world.ok("ps", "-q", "-f", "label=a=b") == id[:12] + "\n"
    assert world.ok("ps", "-q", "-f", "label=a=z") == ""
    assert "exists" in world.fails(125, "run", "--cidfile", str(file), *world.common(()), "busybox", "true")


def test_help_of_every_verb(world):
    from hv.cli.verbs import VERBS

    for verb in VERBS:
        assert f"Usage: pyhv {verb}" in world.ok(verb, "--help")


def test_many_at_once(world):
    rivals = [world.popen("run", "--rm", *world.common(()), "busybox", "sh", "-c", f"echo {number}; exit {number}")
              for number in range(12)]
    for number, rival in enumerate(rivals):
        out, errors = rival.communicate(timeout=60)
        assert (out, rival.returncode) == (f"{number}\n".encode(), number), errors


def test_a_reader_that_goes_away(world: World):
    process = world.popen("run", *world.common(()), "--name", "gone", "busybox", "sh", "-c",
                          "seq 1 200000; touch /done; sleep 100", stderr=subprocess.DEVNULL)
    process.stdout.read(10)
    process.stdout.close()
    assert until(lambda: world("exec", "gone", "test", "-e", "/done").returncode == 0, 20)
    process.kill()
    process.wait()
