"""Version 2 on the host's cgroup2 mount: its own files, and the controllers that version 1 has not taken.

Device programs work on any cgroup2 mount, so they are tried for real here, without the version 1 device list.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from framework.bundle import bundle as bundle  # a fixture
from framework.bundle import needs_busybox, needs_root
from framework.groups import Groups, leftovers, until

from hv.container.cgroups.detect import detect
from hv.container.runtime import Runtime
from hv.container.state import Record
from hv.container.update import update
from hv.errors import ConfigError, HvError
from hv.linux import bpf

LAYOUT = detect()
CONTROLLERS = Path(LAYOUT.v2, "cgroup.controllers").read_text().split() if LAYOUT.v2 else []
pytestmark = [needs_root, pytest.mark.skipif(not LAYOUT.v2, reason="this host has no cgroup2 mount")]
needs_hugetlb = pytest.mark.skipif("hugetlb" not in CONTROLLERS, reason="cgroup2 here has no hugetlb controller")

DENY = {"allow": False, "access": "rwm"}


@pytest.fixture
def groups():
    made = Groups()
    yield made
    made.close()
    assert leftovers() == []


@pytest.fixture
def group(groups):
    return groups.make("box", keys=("",))


def programs(group) -> list[int]:
    fd = os.open(group.paths[""], os.O_RDONLY)
    try:
        return bpf.attached(fd, bpf.CGROUP_DEVICE)
    finally:
        os.close(fd)


def test_the_device_program_rules(groups, group, tmp_path):
    log, zero = tmp_path / "log", tmp_path / "zero"
    os.mknod(log, 0o20600, os.makedev(1, 11))       # /dev/kmsg
    os.mknod(zero, 0o20600, os.makedev(1, 5))
    can = f"(: < {log}) 2>/dev/null && echo read; (: > {log}) 2>/dev/null && echo write; : < {zero} && echo zero"
    assert groups.output(group, can) == "read\nwrite\nzero\n"
    group.apply({"devices": [DENY]})
    assert groups.output(group, can) == "zero\n"
    group.apply({"devices": [DENY, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}]})
    assert groups.output(group, can) == "read\nzero\n"
    # what version 1 can't say: all of major 1 but for writing to the log
    group.apply({"devices": [DENY, {"allow": True, "type": "c", "major": 1, "access": "rwm"},
                             {"allow": False, "type": "c", "major": 1, "minor": 11, "access": "w"}]})
    assert groups.output(group, can) == "read\nzero\n"
    group.apply({"devices": [{"allow": True, "access": "rwm"}]})
    assert groups.output(group, can) == "read\nwrite\nzero\n"


def test_making_nodes_is_a_right_of_its_own(groups, group, tmp_path):
    group.apply({"devices": [DENY]})
    assert groups.output(group, f"mknod {tmp_path}/a c 77 1 && mknod {tmp_path}/b b 77 1 && echo made") == "made\n"
    group.apply({"devices": [DENY, {"allow": False, "access": "rwm"}]})
    assert (tmp_path / "a").is_char_device() and (tmp_path / "b").is_block_device()
    text = groups.output(group, f"exec 3< {tmp_path}/b", env={"PATH": os.environ["PATH"], "LC_ALL": "C"})
    assert "not permitted" in text


def test_there_is_one_program_whatever_was_there_before(group):
    group.apply({"devices": [DENY]})
    first = programs(group)
    group.apply({"devices": [DENY, {"allow": True, "type": "b", "access": "r"}]})
    second = programs(group)
    assert len(first) == len(second) == 1 and first != second
    update(group, {}, {"pids": None})
    assert programs(group) == second                # an update that says nothing of devices leaves them
    fd = os.open(group.paths[""], os.O_RDONLY)
    extra = bpf.load(bpf.PROG_TYPE_CGROUP_DEVICE, bytes.fromhex("b700000001000000 9500000000000000"))
    bpf.attach(fd, extra, bpf.CGROUP_DEVICE)
    os.close(extra)
    os.close(fd)
    assert len(programs(group)) == 2
    group.apply({"devices": [DENY]})
    assert len(programs(group)) == 1


def test_hundreds_of_rules_pass_the_verifier(group):
    rules = [{"allow": bool(n % 3), "type": "bc"[n % 2], "major": n, "minor": n % 5 - 1, "access": "rwm"[n % 3]}
             for n in range(600)]
    group.apply({"devices": [DENY, *rules]})
    with pytest.raises(HvError, match=r"linux\.resources\.devices: \d+ rules"):
        group.apply({"devices": rules * 8})


def test_a_program_that_the_verifier_refuses_is_an_error():
    with pytest.raises(HvError, match=r"bpf\(PROG_LOAD\): E"):
        bpf.load(bpf.PROG_TYPE_CGROUP_DEVICE, bytes.fromhex("b700000001000000"))        # no exit


def test_no_descriptor_is_left_open(group):
    before = os.listdir("/proc/self/fd")
    group.apply({"devices": [DENY]})
    group.apply({"devices": [DENY]})
    assert os.listdir("/proc/self/fd") == before


def test_freezing(groups, group, tmp_path):
    ticks = tmp_path / "ticks"
    groups.run(group, f"while :; do echo x >> {ticks}; sleep 0.005; done")
    until(ticks.exists)
    group.freeze(True)
    assert group.frozen()
    assert "frozen 1" in Path(group.paths[""], "cgroup.events").read_text()
    size = ticks.stat().st_size
    time.sleep(0.05)
    assert ticks.stat().st_size == size
    group.freeze(False)
    assert not group.frozen()
    until(lambda: ticks.stat().st_size > size)


def test_all_die_at_once_even_while_they_fork(groups, group):
    process = groups.run(group, "while :; do (sleep 9 &) ; sleep 0.001; done")
    until(lambda: len(group.pids()) > 20)
    assert group.kill()
    process.wait(10)
    until(lambda: not group.pids())


@needs_busybox
@pytest.mark.parametrize("turn", range(3))              # it is a matter of chance
@pytest.mark.skipif("pids" not in LAYOUT.v1 and "pids" not in CONTROLLERS, reason="no limit for a fork bomb")
def test_kill_all_outruns_a_chain_of_forks(bundle, turn):
    """Each process makes the next one: whoever kills one after the other comes too late for the last."""
    space = bundle.config["linux"]["namespaces"]
    bundle.config["linux"]["namespaces"] = [row for row in space if row["type"] != "pid"]   # its end would end all
    bundle.config["linux"]["resources"]["pids"] = {"limit": 2000}
    script = "f() { f & sleep 1000; }; for i in 1 2 3 4 5 6 7 8; do f & done; wait"
    assert bundle.create("sh", "-c", script).returncode == 0
    runtime = Runtime(str(bundle.state))
    group = runtime.group(Record(runtime.root, bundle.name).load())
    runtime.start(bundle.name)
    until(lambda: len(group.pids()) > 30)
    runtime.kill(bundle.name, 9, everyone=True)
    until(lambda: not group.pids(), 5)


def test_groups_below_are_counted_and_removed(groups, group):
    inner = Path(group.paths[""], "one/two")
    inner.mkdir(parents=True)
    process = groups.run(group, "sleep 50")
    (inner / "cgroup.procs").write_text(str(process.pid))
    assert process.pid in group.pids()
    group.kill()
    process.wait(10)
    group.remove()
    assert not Path(group.paths[""]).exists()


@needs_hugetlb
def test_a_controller_is_passed_on_when_a_limit_needs_it(groups):
    group = groups.make("pod/box", {"hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
                                    "unified": {"hugetlb.1GB.max": "0"}})
    try:
        folder = Path(group.paths[""])
        assert (folder / "hugetlb.2MB.max").read_text() == f"{4 << 20}\n"
        assert (folder / "hugetlb.2MB.rsvd.max").read_text() == f"{4 << 20}\n"
        assert (folder / "hugetlb.1GB.max").read_text() == "0\n"
        assert set(group.stats()["hugetlb"]) >= {"2MB", "1GB"}
    finally:
        group.remove()
        for point in set(LAYOUT.mounts().values()):
            os.rmdir(f"{point}{groups.base}/pod")


@needs_hugetlb
@pytest.mark.parametrize(("resources", "words"), [
    ({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]},
     r"hugepageLimits\[0\]: this host's kernel has no hugetlb\.3MB"),
    ({"unified": {"hugetlb.2MB.max": "many"}}, r"hugetlb\.2MB\.max'\]: hugetlb\.2MB\.max does not take many"),
    ({"unified": {"memory.high": "5"}}, "no controller memory"),
    ({"unified": {"cgroup.procs": "1"}}, "not a limit's file"),
])
def test_what_can_not_be_is_refused_by_name(group, resources, words):
    with pytest.raises(ConfigError, match=words):
        group.apply(resources, update=True)


def test_core_limits_can_be_given_by_unified(group):
    group.apply({"unified": {"cgroup.max.depth": "3"}}, update=True)
    assert Path(group.paths[""], "cgroup.max.depth").read_text() == "3\n"


def test_figures(groups, group):
    groups.run(group, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 50")
    data = until(lambda: (found := group.stats())["cpu"]["usage"]["total"] > 1_000_000 and found)
    usage = data["cpu"]["usage"]
    assert abs(usage["total"] - usage["kernel"] - usage["user"]) < 5000
