"""`ps`, `inspect`, `stats`, `top`, `port`, and how long `ps` and `--help` take."""

from __future__ import annotations

import json
import os
from resource import RUSAGE_CHILDREN, getrusage

import pytest
from framework.instances import until
from framework.instances import world as make_world

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def two(world):
    world.start("--name", "runs", "--label", "a=1", "--memory", "64m", "busybox", "sh", "-c",
                "while :; do :; done")
    world.start("--name", "ended", "busybox", "sh", "-c", "exit 4")
    world.ok("wait", "ended")


def test_filters(world, two):
    def names(*words):
        return {json.loads(line)["Names"] for line in world.ok("ps", "--format", "json", *words).splitlines()}

    assert names() == {"runs"} and names("-a") == {"runs", "ended"}
    assert names("-f", "exited=4") == {"ended"} and names("-f", "status=running") == {"runs"}
    assert names("-a", "-f", "name=end") == {"ended"} and names("-a", "-f", "label=a") == {"runs"}
    assert names("-a", "-f", "ancestor=busybox") == {"runs", "ended"} and names("-a", "-f", "kind=vm") == set()
    assert names("-l") == {"ended"} and names("-n", "1") == {"ended"}
    world.fails(2, "ps", "-f", "nope=1")
    assert world.ok("ps", "--format", "{{.Names}} {{.State}}") == "runs running\n"


def test_inspect(world, two):
    about = world.inspect("runs")
    assert about["State"]["Running"] and about["HostConfig"]["Memory"] == 64 << 20
    assert about["Config"]["Cmd"][0] == "sh" and about["Config"]["Labels"] == {"a": "1"}
    assert about["LogPath"].endswith("/log.json") and about["State"]["Pid"] > 1
    assert world.ok("inspect", "-f", "{{.State.ExitCode}}", "ended") == "4\n"
    done = world("inspect", "runs", "nobody")
    assert done.returncode == 1 and len(json.loads(done.stdout)) == 1


def test_stats_and_top(world, two):
    rows = [json.loads(line) for line in world.ok("stats", "--no-stream", "--format", "json").splitlines()]
    assert [row["Name"] for row in rows] == ["runs"]
    assert until(lambda: float(json.loads(world.ok("stats", "--no-stream", "--format", "json"))["CPUPerc"][:-1]) > 1)
    assert rows[0]["MemUsage"].endswith("64MiB") and int(rows[0]["PIDs"]) >= 1
    assert "while" in world.ok("top", "runs")
    world.fails(1, "top", "ended")


def test_memory_that_runs_out(world):
    done = world.run("--name", "oom", "--memory", "8m", "--memory-swap", "8m", "busybox", "sh", "-c",
                     "head -c 64m /dev/zero | tail")
    assert done.returncode in (1, 137)
    assert world.inspect("oom")["State"]["OOMKilled"] is True


def test_how_long_they_take(world, two):
    """120 ms at most. Processor time, and the best of some: others may use the host."""
    for words in (("ps",), ("--help",)):
        best = 9.9
        for _ in range(8):
            before = getrusage(RUSAGE_CHILDREN)
            world.ok(*words)
            after = getrusage(RUSAGE_CHILDREN)
            best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert best < 0.12, words
