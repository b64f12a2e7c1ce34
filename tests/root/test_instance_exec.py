"""`pyhv exec` in containers."""

from __future__ import annotations

import os

import pytest
from framework.instances import until
from framework.instances import world as make_world

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def box(world):
    return world.start("--name", "box", "-e", "GIVEN=x y", "-w", "/tmp", "busybox", "sleep", "1000")


def test_streams_and_exit_code(world, box):
    done = world("exec", "box", "sh", "-c", "echo $GIVEN; pwd; echo e >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"x y\n/tmp\n", b"e\n")
    data = os.urandom(1 << 20)
    assert world("exec", "-i", box[:8], "cat", stdin=data).stdout == data
    assert world("exec", "box", "cat", stdin=data).stdout == b""


def test_signal_codes(world, box):
    assert world("exec", "box", "sh", "-c", "kill -9 $$").returncode == 137
    assert world("exec", "box", "sh", "-c", "kill -TERM $$").returncode == 143


def test_user_env_workdir(world, box):
    done = world("exec", "-u", "somebody", "-w", "/bin", "-e", "A=b", "box", "sh", "-c",
                 "id -u; id -g; pwd; echo $A$HOME")
    assert done.stdout == b"1000\n1000\n/bin\nb/tmp\n"
    assert world("exec", "-u", "5:6", "box", "sh", "-c", "id -u; id -g").stdout == b"5\n6\n"
    world.fails(125, "exec", "-u", "nobodyhere", "box", "true")


def test_failures_are_one_line(world, box):
    assert "not found" in world.fails(127, "exec", "box", "nope")
    world.fails(126, "exec", "box", "/etc")
    world.fails(1, "exec", "nobody", "true")
    world.fails(125, "exec", "box")
    world.fails(125, "exec", "--nope", "box", "true")


def test_detached(world, box):
    world.ok("exec", "-d", "box", "sh", "-c", "sleep 0.1; echo done > /tmp/detached")
    assert until(lambda: world("exec", "box", "cat", "/tmp/detached").stdout == b"done\n")


def test_it_ends_with_its_instance(world):
    world.start("--name", "short", "busybox", "sleep", "1000")
    process = world.popen("exec", "short", "sleep", "1000")
    assert until(lambda: world.ok("top", "short").count("sleep 1000") == 2)
    world.ok("rm", "-f", "short")
    assert process.wait(10) == 137
    process.communicate()


def test_not_where_nothing_runs(world):
    world.ok("create", "--network", "none", "--name", "idle", "busybox")
    assert "created" in world.fails(1, "exec", "idle", "true")
