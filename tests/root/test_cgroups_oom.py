"""Out of memory: the kernel kills a process of the container, and that is told; what `events` prints."""

from __future__ import annotations

import json
import os
import sys
import threading

import pytest
from framework.bundle import needs_root
from framework.groups import Groups, leftovers, until

from hv.container.cgroups.detect import detect
from hv.container.cgroups.oom import OomWatch
from hv.container.events import stats_line, watch

pytestmark = [needs_root, pytest.mark.skipif("memory" not in detect().v1,
                                             reason="no cgroup version 1 memory controller")]
EATER = f"{sys.executable} -ISc 'x = []\nwhile 1: x.append(bytearray(1 << 20))'; echo $?"


@pytest.fixture
def group():
    groups = Groups()
    made = groups.make("box", {"memory": {"limit": 30 << 20, "swap": 30 << 20}})
    made.run = lambda script: groups.output(made, script)
    yield made
    groups.close()
    assert leftovers() == []


def test_a_killed_process_is_counted(group):
    watching = OomWatch(group)
    assert watching.fd >= 0 and watching.news() == 0
    before = group.oom_kills()
    assert "137" in group.run(EATER)
    assert group.oom_kills() == before + 1
    assert watching.news() == 1
    assert watching.news() == 0
    watching.close()
    watching.close()


def test_events_tell_of_it_at_once_and_of_figures_in_time(group):
    ended = threading.Event()
    lines = []
    printer = threading.Thread(target=lambda: lines.extend(watch(group, "box", 0.05, lambda: not ended.is_set())))
    printer.start()
    try:
        until(lambda: lines)
        group.run(EATER)
        until(lambda: any('"oom"' in line for line in lines))
    finally:
        ended.set()
        printer.join(5)
    assert not printer.is_alive()
    rows = [json.loads(line) for line in lines]
    assert {"type": "oom", "id": "box"} in rows
    figures = [row for row in rows if row["type"] == "stats"]
    assert figures and all(row["id"] == "box" for row in figures)
    assert figures[0]["data"]["memory"]["usage"]["limit"] == 30 << 20
    assert len([row for row in rows if row["type"] == "oom"]) == 1


def test_the_last_news_are_told_when_the_container_died_of_it(group):
    state = {"alive": True}

    def alive():
        if state["alive"]:
            group.run(EATER)
            state["alive"] = False
            return True
        return False

    assert [json.loads(line)["type"] for line in watch(group, "box", 60, alive)] == ["oom"]


def test_a_line_of_figures(group):
    row = json.loads(stats_line(group, "a-name"))
    assert (row["type"], row["id"]) == ("stats", "a-name") and row["data"]["pids"] == {} | row["data"]["pids"]


def test_watching_a_group_that_goes_away_ends_quietly(group):
    watching = OomWatch(group)
    group.remove()
    assert watching.news() == 0
    watching.close()
    assert os.listdir("/proc/self/fd")
