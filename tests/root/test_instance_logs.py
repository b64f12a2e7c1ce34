"""`pyhv logs`: following, the last lines, times, rotation, both streams."""

from __future__ import annotations

import io
import os
import re
import tarfile
import time

import pytest
from framework.instances import until
from framework.instances import world as make_world

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


def test_both_streams_tail_and_times(world):
    world.start("--name", "both", "busybox", "sh", "-c", "for i in 1 2 3; do echo o$i; echo e$i >&2; sleep 0.02; done")
    world.ok("wait", "both")
    done = world("logs", "both")
    assert (done.stdout, done.stderr) == (b"o1\no2\no3\n", b"e1\ne2\ne3\n")
    assert world("logs", "--tail", "2", "both").stdout + world("logs", "-n", "2", "both").stderr == b"o3\ne3\n"
    assert world("logs", "--tail", "0", "both").stdout == b""
    stamped = world("logs", "-t", "both").stdout.decode().splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z o\d", line) for line in stamped)
    middle = stamped[1].split()[0]
    assert world("logs", "--since", middle, "both").stdout == b"o2\no3\n"
    assert world("logs", "--until", middle, "both").stdout == b"o1\n"
    assert world("logs", "--since", "1h", "both").stdout == b"o1\no2\no3\n"
    world.fails(2, "logs", "--since", "x", "both")
    world.fails(2, "logs", "--tail", "x", "both")


def test_following_ends_with_it(world):
    world.start("--name", "goes", "busybox", "sh", "-c", "for i in $(seq 1 40); do echo $i; sleep 0.02; done")
    assert world.ok("logs", "-f", "goes").split() == [str(number) for number in range(1, 41)]


def test_following_across_rotation(world):
    world.start("--name", "turns", "--log-opt", "max-size=8k", "--log-opt", "max-file=3", "busybox", "sh", "-c",
                "i=0; while [ $i -lt 1500 ]; do echo line $i; i=$((i+1)); [ $((i % 50)) -eq 0 ] && sleep 0.05; done")
    lines = world.ok("logs", "-f", "turns").splitlines()
    assert lines[-1] == "line 1499" and len(lines) == 1500
    folder = world.data / "instances" / world.inspect("turns")["Id"]
    files = sorted(leaf for leaf in os.listdir(folder) if leaf.startswith("log"))
    assert files == ["log.json", "log.json.1", "log.json.2"]
    assert all(os.path.getsize(folder / leaf) <= 8192 for leaf in files)


def test_bytes_come_back_as_they_were(world):
    world.start("--name", "raw", "busybox", "sh", "-c", "head -c 300000 /dev/urandom > /f; cat /f; printf end")
    world.ok("wait", "raw")
    logged = world("logs", "raw").stdout
    with tarfile.open(fileobj=io.BytesIO(world("cp", "raw:/f", "-").stdout)) as archive:
        assert logged == archive.extractfile("f").read() + b"end"


def test_logs_of_a_restarted_one_go_on(world):
    world.start("--name", "twice", "busybox", "echo", "hello")
    world.ok("wait", "twice")
    world.ok("start", "twice")
    assert until(lambda: world.ok("logs", "twice") == "hello\nhello\n")


def test_a_full_disk_does_not_stop_the_program(world, tmp_path):
    id = world.ok("create", "--network", "none", "busybox", "sh", "-c", "seq 1 1000; exit 3").strip()
    os.symlink("/dev/full", world.data / "instances" / id / "log.json")
    world.ok("start", id)
    assert world.ok("wait", id) == "3\n"
    assert until(lambda: "could not be written" in (world.run_root / "keeper.log").read_text())
    (world.data / "instances" / id / "log.json").unlink()
    time.sleep(0.1)
