"""Kills of the keeper, the holder, the maker and the caller at any moment; a reboot. Nothing is lost, nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from framework.instances import until
from framework.instances import world as make_world
from framework.run import PYHV, ROOT

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]
TALK = "i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); sleep 0.01; done; exit 7"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _empty(world):
    yield
    world.empty()


def kill_keeper(world):
    pid = until(world.keeper)
    assert pid > 1
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: world.keeper() != pid)


def test_the_keeper_is_killed_and_nothing_is_lost(world):
    id = world.start("--name", "talks", "busybox", "sh", "-c", TALK % 300)
    for _ in range(3):
        time.sleep(0.3)
        kill_keeper(world)
        assert world.inspect("talks")["State"]["Running"]
        world.ok("exec", "talks", "true")
        with subprocess.Popen([*PYHV, "wait", "talks"], env=world.env, stdout=subprocess.DEVNULL) as waiter:
            assert until(world.keeper)      # whoever waits starts the next one
            waiter.kill()
    assert world.ok("wait", id) == "7\n"
    assert world.ok("logs", "talks").split("\n")[:-1] == [f"line {number}" for number in range(300)]


def test_a_program_that_writes_without_a_keeper_meets_no_sigpipe(world):
    world.start("--name", "writes", "busybox", "sh", "-c", "trap '' TERM; sleep 0.3; seq 1 60000; exit 5")
    kill_keeper(world)
    time.sleep(0.8)                 # 340 kB: it waits in the middle of that
    assert world.status("writes") == "running"
    assert world.ok("wait", "writes") == "5\n"
    assert world.ok("logs", "writes") == "".join(f"{number}\n" for number in range(1, 60001))


def test_the_end_is_known_though_there_was_no_keeper(world):
    world.start("--name", "ends", "busybox", "sh", "-c", "sleep 0.4; echo last words; exit 9")
    kill_keeper(world)
    time.sleep(0.8)
    assert "Exited (9)" in world.ok("ps", "-a")
    assert world.ok("logs", "ends") == "last words\n"


def test_attached_while_the_keeper_is_killed(world):
    process = world.popen("run", *world.common(()), "--name", "seen", "busybox", "sh", "-c",
                          "echo one; sleep 1; echo two; exit 6")
    assert process.stdout.readline() == b"one\n"
    kill_keeper(world)
    out, errors = process.communicate(timeout=20)
    assert (out, process.returncode) == (b"two\n", 6), errors


def test_the_holder_is_killed(world):
    id = world.start("--name", "held", "busybox", "sh", "-c", "echo a; sleep 1; echo b; exit 5")
    os.kill(world.kept(id)["pid"], signal.SIGKILL)
    time.sleep(0.1)
    assert world.status("held") == "running"
    world.ok("wait", "held")
    assert "Exited (unknown)" in world.ok("ps", "-a")
    assert world.ok("logs", "held") == "a\nb\n"
    world.ok("start", "held")


def test_a_terminal_outlives_the_keeper(world):
    world.start("--name", "tty", "-t", "busybox", "sh", "-c", "echo a; sleep 1; tty; exit 3")
    kill_keeper(world)
    assert world.ok("wait", "tty") == "3\n"
    assert world.ok("logs", "tty").split() == ["a", "/dev/pts/0"]


def test_stop_and_rm_without_a_keeper(world):
    world.start("--name", "aa", "--stop-timeout", "1", "busybox", "sleep", "100")
    world.start("--name", "bb", "busybox", "sleep", "100")
    kill_keeper(world)
    world.ok("stop", "aa")
    kill_keeper(world)
    world.ok("rm", "-f", "bb")
    assert world.ok("ps", "-aq").count("\n") == 1


def test_a_reboot(world):
    id = world.start("--name", "was", "busybox", "sh", "-c", "echo $(cat /kept 2>/dev/null); echo x > /kept; sleep 100")
    world.start("--rm", "--name", "temporary", "busybox", "sleep", "100")
    time.sleep(0.3)
    for pid, _ in world.processes():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not world.processes())
    for instance in os.listdir(world.run_root / "instances"):       # what a reboot does to cgroups
        subprocess.run([*PYHV, "oci", "--root", str(world.run_root / "runtime"), "delete", "--force", instance],
                       check=True, timeout=30)
    shutil.rmtree(world.run_root)
    line = world.ok("ps", "-a")
    assert "Exited (unknown)" in line and "temporary" not in line
    state = world.inspect("was")["State"]
    assert (state["Status"], state["ExitCode"], state["ExitCodeKnown"]) == ("exited", 255, False)
    world.ok("start", "was")
    assert until(lambda: "x" in world.ok("logs", "was")) and world.status(id) == "running"


def test_a_keeper_that_the_maker_starts_is_at_home(world):
    """It must not live in the mount namespace of one instance, or that one's mounts would stay."""
    assert until(lambda: not world.keeper())
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); from hv.linux.ns import CLONE_NEWNS, unshare; "
            "from hv.instance.keeper_client import connect; home = os.open('/proc/self/ns/mnt', os.O_RDONLY); "
            "unshare(CLONE_NEWNS); connect(home=home); sys.stdin.read()")
    maker = subprocess.Popen([PYHV[0], "-ISE", "-c", code, str(ROOT)], env=world.env, stdin=subprocess.PIPE)
    try:
        looked_at(world, maker)
    finally:
        maker.communicate()


def looked_at(world, maker):
    def at_home():
        try:
            return os.readlink(f"/proc/{world.keeper()}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        except FileNotFoundError:
            return False            # the process between the two

    assert until(at_home)
    keeper = world.keeper()
    assert os.readlink(f"/proc/{maker.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    with open(f"/proc/{keeper}/stat") as file:
        assert file.read().rpartition(")")[2].split()[1] != str(maker.pid)


def test_an_interrupt_while_it_is_made_ends_it(world):
    for step in range(6):
        process = world.popen("run", "--rm", *world.common(()), "busybox", "sleep", "100")
        time.sleep(0.015 + 0.01 * step)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        if process.poll() is None:      # it ran already: the signal was the program's, whose first process ignores it
            world("rm", "-f", "--all")
        process.wait(20)
        process.communicate()
        assert until(lambda: world.ok("ps", "-aq") == "")


@pytest.mark.parametrize("who", ["maker", "caller", "everyone"])
def test_run_is_killed_at_any_moment(world, who):
    """At 10 moments of the first 60 ms: what is there is consistent, and all of it can be removed."""
    for step in range(10):
        process = world.popen("run", "-d", *world.common(()), "--name", f"at{step}", "busybox", "sleep", "100",
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.008 + 0.006 * step)
        keeper = world.keeper()
        if who in ("caller", "everyone"):
            process.kill()
        if who in ("maker", "everyone"):
            for pid, words in world.processes():
                if pid not in (process.pid, keeper) and "run -d" in words:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
        process.wait(30)
        rows = [json.loads(line) for line in world.ok("ps", "-a", "--format", "json").splitlines()]
        for row in rows:
            assert row["State"] in ("running", "created", "exited"), row
            if row["State"] != "running":
                world("start", row["Names"])
                assert until(lambda name=row["Names"]: world.status(name) == "running"), row
        world.empty()
    time.sleep(5.5)                 # what was not even half made is swept once it is old
    id = world.start("busybox", "sleep", "1")
    kill_keeper(world)
    world.ok("wait", id)
    world.empty()
    world.assert_nothing_left()


def test_a_damaged_record_costs_one_line(world):
    id = world.start("--name", "hurt", "busybox", "sleep", "100")
    world.ok("stop", "-t", "0", "hurt")
    path = world.data / "instances" / id / "state.json"
    good = path.read_bytes()
    for bad in (b"", b"{", b"[]", b"\xff\xfe", b'{"status": 5, "exit_code": "x"}', b"[" * 100_000):
        path.write_bytes(bad)
        for words in (("ps", "-a"), ("inspect", "hurt"), ("start", "hurt"), ("logs", "hurt"), ("stop", "hurt")):
            done = world(*words)
            assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") <= 1, (bad, words, done.stderr)
        world("stop", "-t", "0", "hurt")
        assert good
    path.write_bytes(b"{")
    assert "hurt" in world.ok("rm", "-f", "hurt")
