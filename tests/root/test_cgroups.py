"""The host's real hierarchies: what limits do, and that the files say what runc's say for the same config.json."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from framework.bundle import config, needs_busybox, needs_root, rootfs
from framework.groups import Groups, leftovers, until

from hv.container.cgroups.detect import detect
from hv.container.cgroups.manager import from_paths, manager
from hv.container.update import update
from hv.errors import ConfigError, HvError, StateError

LAYOUT = detect()
pytestmark = [needs_root, pytest.mark.skipif(not {"memory", "pids", "cpu", "devices", "freezer"} <= set(LAYOUT.v1),
                                             reason="this host has no cgroup version 1 controllers")]
needs_runc = pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed")

# files that tell the same for the same limits; the rest counts, or has no meaning by itself
COMPARED = {
    "memory": ("limit_in_bytes", "memsw.limit_in_bytes", "soft_limit_in_bytes", "swappiness", "use_hierarchy"),
    "cpu": ("shares", "cfs_quota_us", "cfs_period_us"), "cpuset": ("cpus", "mems", "cpu_exclusive"), "pids": ("max",),
    "blkio": ("bfq.weight", "throttle.read_bps_device", "throttle.write_iops_device"), "devices": ("list",),
}


@pytest.fixture
def groups():
    made = Groups()
    yield made
    made.close()
    assert leftovers() == []


def told(paths: dict[str, str]) -> dict[str, object]:
    """What the files to be compared say."""
    found: dict[str, object] = {}
    for controller, leaves in COMPARED.items():
        for leaf in leaves:
            path = Path(paths[controller], f"{controller}.{leaf}")
            if path.exists():
                found[path.name] = sorted(path.read_text().split("\n"))
    for line in Path(paths["memory"], "memory.oom_control").read_text().splitlines():
        if line.startswith("oom_kill_disable"):
            found["oom_kill_disable"] = line
    return found


def disk() -> dict[str, int]:
    for name in sorted(os.listdir("/sys/block")):
        major, minor = Path("/sys/block", name, "dev").read_text().split(":")
        return {"major": int(major), "minor": int(minor)}
    return {"major": 8, "minor": 0}


RESOURCES = {
    "none": {},
    "podman": {"devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 2048}},
    "ctr": {"devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3,
                                                            "access": "rwm"},
                        {"allow": True, "type": "c", "major": 136, "access": "rwm"}], "cpu": {"shares": 1024}},
    "memory": {"memory": {"limit": 100 << 20, "swap": 200 << 20, "reservation": 50 << 20, "swappiness": 10,
                          "disableOOMKiller": True}},
    "unlimited": {"memory": {"limit": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}},
    "cpu": {"cpu": {"shares": 333, "quota": 20000, "period": 50000, "cpus": "0", "mems": "0"}},
    "io": {"blockIO": {"weight": 200, "throttleReadBpsDevice": [disk() | {"rate": 1000000}],
                       "throttleWriteIOPSDevice": [disk() | {"rate": 100}]}},
    "open": {"devices": [{"allow": True, "access": "rwm"}]},
    "mixed": {"devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "b", "major": 254, "minor": 0,
                                                              "access": "r"},
                          {"allow": True, "type": "c", "major": 10, "access": "rwm"}, {"allow": False, "type": "c",
                              "major": 10,
                           "access": "w"}], "memory": {"limit": 1 << 28}},
}


@needs_runc
@needs_busybox
@pytest.mark.parametrize("name", RESOURCES)
def test_the_files_say_what_runc_makes_them_say(groups, tmp_path, name):
    rootfs(tmp_path / "rootfs")
    written = config("sleep", "60")
    written["linux"] |= {"resources": RESOURCES[name], "cgroupsPath": f"{groups.base}/runc"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    runc = ["runc", "--root", str(tmp_path / "state")]
    box = f"cg{os.getpid()}"
    complaint = tmp_path / "complaint"
    try:
        with complaint.open("w") as file:       # no pipe: the container's processes would hold it open
            code = subprocess.call([*runc, "create", "-b", str(tmp_path), box], stdin=subprocess.DEVNULL, timeout=30,
                                   stdout=subprocess.DEVNULL, stderr=file)
        assert code == 0, complaint.read_text()
        theirs = told({key: f"{point}{groups.base}/runc" for key, point in LAYOUT.mounts().items()})
        joined = set(json.loads((tmp_path / "state" / box / "state.json").read_text())["cgroup_paths"])
    finally:
        subprocess.run([*runc, "delete", "--force", box], stdin=subprocess.DEVNULL, capture_output=True, timeout=30,
                       check=False)
    group = groups.make("ours", RESOURCES[name])
    assert told(group.paths) == theirs
    assert set(group.paths) == joined


def test_a_process_is_in_all_hierarchies_and_found_there(groups):
    group = groups.make()
    process = groups.run(group, "sleep 50 & sleep 50")
    lines = Path(f"/proc/{process.pid}/cgroup").read_text().split()
    assert len(lines) == len(set(LAYOUT.mounts().values()))
    assert all(line.endswith(f":{groups.base}/box") for line in lines)
    until(lambda: len(group.pids()) == 3)
    assert process.pid in from_paths(dict(group.paths)).pids()


def test_a_process_that_has_ended_can_not_join(groups):
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(HvError, match="has ended"):
        groups.make().add(process.pid)


def test_the_limit_on_processes_holds(groups):
    group = groups.make("box", {"pids": {"limit": 3}})
    text = groups.output(group, "sleep 1 & sleep 1 & sleep 1 & echo done", env={"PATH": os.environ["PATH"],
        "LC_ALL": "C"})
    assert "fork" in text and "done" not in text


def test_the_device_rules_hold_and_change_while_it_runs(groups, tmp_path):
    node = tmp_path / "log"
    os.mknod(node, 0o20600, os.makedev(1, 11))      # /dev/kmsg
    group = groups.make("box", {"devices": [{"allow": False, "access": "rwm"}]})
    script = f"for i in 1 2; do (: < {node}) 2>/dev/null && echo yes || echo no; done; : < /dev/zero && echo zero"
    assert groups.output(group, script) == "no\nno\nzero\n"
    update(group, {}, {"devices": [{"allow": False}, {"allow": True, "type": "c", "major": 1, "minor": 11,
                                                      "access": "r"}]})
    assert groups.output(group, script) == "yes\nyes\nzero\n"
    update(group, {}, {"devices": [{"allow": False}]})
    assert groups.output(group, script) == "no\nno\nzero\n"


def test_freezing_stops_and_thawing_lets_go_on(groups, tmp_path):
    group = groups.make()
    ticks = tmp_path / "ticks"
    groups.run(group, f"while :; do echo x >> {ticks}; sleep 0.005; done")
    until(ticks.exists)
    group.freeze(True)
    assert group.frozen()
    size = ticks.stat().st_size
    time.sleep(0.1)
    assert ticks.stat().st_size == size
    group.freeze(False)
    assert not group.frozen()
    until(lambda: ticks.stat().st_size > size)


def test_forking_processes_can_be_frozen_too(groups):
    group = groups.make()
    for _ in range(3):
        groups.run(group, "while :; do (exit 0) & (exit 0); wait; done")
    for _ in range(5):
        group.freeze(True)
        found = group.pids()
        time.sleep(0.02)
        assert group.pids() == found
        group.freeze(False)


def test_removing_takes_what_the_container_made_along(groups):
    group = groups.make()
    for path in set(group.paths.values()):
        os.makedirs(f"{path}/a/b/c/d")
        for number in range(5):
            os.makedirs(f"{path}/e{number}/f")
    group.remove()
    assert not any(os.path.exists(path) for path in group.paths.values())
    group.remove()


def test_very_deep_groups_are_counted_and_removed(groups):
    group = groups.make("box", keys=("pids",))
    fd = os.open(group.paths["pids"], os.O_RDONLY)
    depth = 600                     # a path of these would be too long for any call that takes one
    for _ in range(depth):
        os.mkdir("deeper-in", dir_fd=fd)
        inner = os.open("deeper-in", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    process = subprocess.Popen(["sleep", "50"])
    procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=fd)
    os.write(procs, str(process.pid).encode())
    os.close(procs)
    os.close(fd)
    assert group.pids() == [process.pid]
    process.kill()
    process.wait()
    group.remove()
    assert not os.path.exists(group.paths["pids"])


def test_a_group_in_use_is_an_error_after_some_patience(groups, monkeypatch):
    from hv.container.cgroups import manager as module
    from hv.container.cgroups.folder import remove_tree

    monkeypatch.setattr(module, "remove_tree", lambda path: remove_tree(path, 0.05))
    group = groups.make()
    process = groups.run(group, "sleep 50")
    with pytest.raises(HvError, match=r"still in use"):
        group.remove()
    assert Path(f"/proc/{process.pid}").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.undo()


def test_somebody_elses_group_is_not_taken_and_what_was_made_is_removed(groups):
    other = groups.make("box", keys=("pids",))
    groups.run(other, "sleep 50")
    before = set(os.listdir(LAYOUT.v1["cpu"]))
    with pytest.raises(StateError, match=r"holds \d processes already"):
        manager(f"{groups.base}/box", "box").create()
    assert not os.path.exists(f"{LAYOUT.v1['cpu']}{groups.base}/box")
    assert set(os.listdir(LAYOUT.v1["cpu"])) - before <= {groups.base.strip("/")}


def test_groups_below_our_own_default_go_with_the_last_container():
    name = f"box{os.getpid()}"
    first, second = manager(f"test{os.getpid()}/{name}", name), manager(f"test{os.getpid()}/{name}b", name)
    for group in (first, second):
        group.create()
    first.remove()
    assert all(os.path.isdir(path) for path in second.paths.values())
    second.remove()
    assert not any(os.path.exists(os.path.dirname(path)) for path in second.paths.values())
    alone = manager("", name)
    alone.create()
    alone.remove()
    assert not any(os.path.exists(path) for path in alone.paths.values())


def test_an_update_changes_what_it_names_and_sets_back_what_it_can_not(groups):
    group = groups.make("box", {"memory": {"limit": 100 << 20, "swap": 200 << 20}, "cpu": {"shares": 500}})
    config = {"linux": {"resources": {"memory": {"limit": 100 << 20, "swap": 200 << 20}, "cpu": {"shares": 500}}}}
    memory, cpu = Path(group.paths["memory"]), Path(group.paths["cpu"])
    update(group, config, {"memory": {"limit": 300 << 20, "swap": 400 << 20}})      # above the old swap limit
    assert (memory / "memory.limit_in_bytes").read_text() == f"{300 << 20}\n"
    update(group, config, {"memory": {"limit": 50 << 20, "swap": 60 << 20}})        # and below
    assert (memory / "memory.memsw.limit_in_bytes").read_text() == f"{60 << 20}\n"
    assert (cpu / "cpu.shares").read_text() == "500\n"
    with pytest.raises(ConfigError, match=r"linux\.resources\.cpu\.shares: 1,"):
        update(group, config, {"memory": {"limit": 20 << 20}, "cpu": {"shares": 1}})
    assert (memory / "memory.limit_in_bytes").read_text() == f"{50 << 20}\n"
    assert (cpu / "cpu.shares").read_text() == "500\n"
    update(group, config, {"memory": {"limit": -1}})
    assert config["linux"]["resources"]["memory"] == {"limit": -1, "swap": -1}
    assert int((memory / "memory.memsw.limit_in_bytes").read_text()) > 1 << 60


@pytest.mark.parametrize(("resources", "words"), [
    ({"cpu": {"cpus": "0-9999"}}, r"cpu\.cpus: cpuset\.cpus does not take 0-9999"),
    ({"cpu": {"quota": 5}}, r"cpu\.quota"), ({"pids": {"limit": 1 << 62}}, r"pids\.limit"),
    ({"memory": {"kernel": 50 << 20}}, r"memory\.kernel: this host's kernel has no limit"),
    ({"blockIO": {"weight": 5000}}, r"blockIO\.weight"), ({"blockIO": {"leafWeight": 50}}, r"blockIO\.leafWeight"),
    ({"blockIO": {"throttleReadBpsDevice": [{"major": 4000, "minor": 1, "rate": 5}]}},
     r"blockIO\.throttleReadBpsDevice\[0\]\.rate"),
    ({"rdma": {"mlx": {"hcaHandles": 3}}}, "rdma: this host has no cgroup controller rdma"),
])
def test_what_the_kernel_refuses_is_refused_by_name(groups, resources, words):
    with pytest.raises(HvError, match=rf"^linux\.resources\.{words}"):
        groups.make("box", resources)


def test_figures_of_a_running_container(groups):
    group = groups.make("box", {"pids": {"limit": 55}, "memory": {"limit": 200 << 20}})
    groups.run(group, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 50")
    data = until(lambda: (found := group.stats())["cpu"]["usage"]["total"] > 1_000_000 and found)
    assert sum(data["cpu"]["usage"]["percpu"]) > 0
    assert data["pids"]["limit"] == 55 and data["pids"]["current"] >= 1
    assert data["memory"]["usage"]["limit"] == 200 << 20
    assert data["memory"]["usage"]["usage"] > 0 and "rss" in data["memory"]["raw"]
    assert data["cpuset"]["cpus"] == list(range(os.cpu_count() or 1))
    assert set(data) == {"cpu", "cpuset", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"}


def test_a_user_without_rights_goes_without_unless_limits_are_asked_for(groups):
    # imported first: that user may not be able to read this Python's files
    script = ("import os, sys; sys.path.insert(0, sys.argv[1])\n"
              "from hv.container.cgroups.manager import manager\nfrom hv.errors import HvError\n"
              "os.setgid(65534); os.setuid(65534)\n"
              "group = manager('', 'userbox'); group.create(); group.apply({}); group.add(os.getpid())\n"
              "print(group.paths, group.pids(), group.frozen())\ngroup.remove()\n"
              "try: group.apply({'memory': {'limit': 5}})\nexcept HvError as error: print(error)\n")
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-Ic", script, root], capture_output=True, text=True, timeout=30,
                          check=False)
    assert done.stdout.splitlines() == [
        "{} [] False", "linux.resources.memory: cgroup controller memory: Permission denied"], done.stderr
