"""What version 2 is told, on a tree of plain files: the host has few of its controllers."""

from __future__ import annotations

import errno

import pytest
from framework.cgroups import V2_CONTROLLERS, Tree

from hv.container.cgroups import devices_bpf
from hv.container.cgroups.manager import manager
from hv.container.cgroups.v2 import weight_of
from hv.errors import ConfigError, HvError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(devices_bpf, "attach", lambda path, rules: None)
    return Tree(tmp_path, monkeypatch, v2=V2_CONTROLLERS)


def applied(tree, resources):
    group = manager("/eng/box", "box", layout=tree.layout)
    group.create()
    tree.writes.clear()
    group.apply(resources, update=True)
    return tree.wrote()


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1024, 39), (262144, 10000), (1, 1), (1 << 40, 10000), (512,
    20)])
def test_weights_of_shares(shares, weight):
    assert weight_of(shares) == weight


@pytest.mark.parametrize(("resources", "expected"), [
    ({"memory": {"limit": 100, "swap": 300, "reservation": 50, "swappiness": None}},
     [("memory.swap.max", "200"), ("memory.max", "100"), ("memory.low", "50")]),
    ({"memory": {"limit": -1}}, [("memory.swap.max", "max"), ("memory.max", "max")]),
    ({"memory": {"swap": -1}}, [("memory.swap.max", "max")]),
    ({"memory": {"limit": 100, "swap": 100, "reservation": -1}},
     [("memory.swap.max", "0"), ("memory.max", "100"), ("memory.low", "max")]),
    ({"memory": {"limit": 100, "disableOOMKiller": False, "useHierarchy": True}}, [("memory.max", "100")]),
    ({"cpu": {"shares": 1024, "quota": 50000, "period": 200000, "burst": 1000}},
     [("cpu.weight", "39"), ("cpu.max", "50000 200000"), ("cpu.max.burst", "1000")]),
    ({"cpu": {"quota": -1}}, [("cpu.max", "max 100000")]), ({"cpu": {"period": 5000}}, [("cpu.max", "max 5000")]),
    ({"cpu": {"shares": 1024, "idle": 1, "cpus": "0-2", "mems": "0"}},
     [("cpu.idle", "1"), ("cpuset.cpus", "0-2"), ("cpuset.mems", "0")]),
    ({"cpu": {"idle": 0}}, [("cpu.idle", "0")]),
    ({"pids": {"limit": 9}}, [("pids.max", "9")]), ({"pids": {"limit": -1}}, [("pids.max", "max")]),
    ({"blockIO": {"weight": 10, "weightDevice": [{"major": 8, "minor": 0, "weight": 1000}],
                  "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                  "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}]}},
     [("io.weight", "default 1"), ("io.weight", "8:0 10000"), ("io.max", "8:0 rbps=600"), ("io.max", "8:0 wiops=max")]),
    ({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}, [("hugetlb.2MB.max", "0")]),
    ({"rdma": {"mlx5_1": {"hcaHandles": 3}}}, [("rdma.max", "mlx5_1 hca_handle=3")]),
    ({"unified": {"memory.high": "1000", "io.max": "8:0 rbps=1\n8:16 rbps=2\n"}},
     [("memory.high", "1000"), ("io.max", "8:0 rbps=1"), ("io.max", "8:16 rbps=2")]),
])
def test_fields_become_writes(tree, resources, expected):
    assert applied(tree, resources) == expected


@pytest.mark.parametrize(("resources", "words"), [
    ({"memory": {"kernel": 100}}, "kernel: cgroup version 2"), ({"memory": {"kernelTCP": 100}}, "kernelTCP"),
    ({"memory": {"swappiness": 0}}, "swappiness"), ({"memory": {"disableOOMKiller": True}}, "disableOOMKiller"),
    ({"memory": {"useHierarchy": False}}, "useHierarchy"), ({"memory": {"swap": 100}}, "needs memory.limit"),
    ({"memory": {"limit": 200, "swap": 100}}, "less than"), ({"cpu": {"realtimeRuntime": 1}}, "realtimeRuntime"),
    ({"memory": {"limit": 100, "checkBeforeUpdate": True}}, "5000000 bytes are in use"),
    ({"network": {"classID": 5}}, "net_cls"), ({"blockIO": {"leafWeight": 5}}, "leafWeight"),
    ({"blockIO": {"weight": 5}}, "blockIO.weight: 5"), ({"unified": {"misc.max": "x"}}, "no controller misc"),
    ({"unified": {"memory.nothing": "x"}}, "no memory.nothing"), ({"unified": {"memory.high": 5}}, "not a string"),
    ({"unified": {"../memory.high": "5"}}, "not a limit's file"), ({"unified": {"cgroup.procs": "1"}},
                                                                   "not a limit's file"),
    ({"unified": {"cgroup.kill": "1"}}, "not a limit's file"), ({"unified": {"memory": "1"}}, "not a limit's file"),
])
def test_what_version_2_lacks_is_refused_by_name(tree, resources, words):
    with pytest.raises(ConfigError, match=words):
        applied(tree, resources)
    assert tree.wrote() == []


def test_bfq_weights_go_to_bfq(tree):
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    (tree.v2 / "box/io.bfq.weight").write_text("")
    group.apply({"blockIO": {"weight": 300}}, update=True)
    assert tree.wrote("io.bfq.weight", "io.weight") == [("io.bfq.weight", "300")]


def test_a_smaller_burst_comes_before_a_smaller_quota(tree):
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    group.apply({"cpu": {"quota": 90000, "burst": 80000}}, update=True)
    tree.writes.clear()
    group.apply({"cpu": {"quota": 20000, "burst": 10000}}, update=True)
    assert tree.wrote() == [("cpu.max.burst", "10000"), ("cpu.max", "20000 100000")]


def test_a_new_period_keeps_the_quota(tree):
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    group.apply({"cpu": {"quota": 90000}}, update=True)
    group.apply({"cpu": {"period": 50000}}, update=True)
    assert (tree.v2 / "box/cpu.max").read_text() == "90000 50000"


def test_all_controllers_are_passed_on_from_the_root(tree):
    manager("/eng/pod/box", "box", layout=tree.layout).create()
    for path in ("", "eng", "eng/pod"):
        assert set((tree.v2 / path / "cgroup.subtree_control").read_text().split()) == set(V2_CONTROLLERS)
    assert set((tree.v2 / "eng/pod/box/cgroup.controllers").read_text().split()) == set(V2_CONTROLLERS)
    assert (tree.v2 / "eng/pod/box/cgroup.subtree_control").read_text() == ""


def test_one_controller_that_can_not_be_passed_on_does_not_keep_back_the_others(tree):
    tree.refuse["cgroup.subtree_control"] = lambda path, text: errno.EINVAL if "+cpu" in text.split() else 0
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    group.apply({"memory": {"limit": 5}, "pids": {"limit": 5}}, update=True)
    with pytest.raises(HvError, match=r"linux\.resources\.cpu: cgroup .*unified does not pass controller cpu on"):
        group.apply({"cpu": {"shares": 5}}, update=True)


def test_a_group_with_processes_is_not_asked_to_pass_anything_on(tree):
    manager("/pod/one", "one", layout=tree.layout).create()
    (tree.v2 / "pod/cgroup.subtree_control").write_text("")
    (tree.v2 / "pod/cgroup.type").write_text("domain\n")
    (tree.v2 / "pod/cgroup.procs").write_text("77\n")
    before = tree.wrote("cgroup.subtree_control")
    group = manager("/pod/two", "two", layout=tree.layout)
    group.create()
    with pytest.raises(HvError, match=r"linux\.resources\.pids: cgroup .*/pod does not pass controller pids on"):
        group.apply({"pids": {"limit": 5}}, update=True)
    assert tree.wrote("cgroup.subtree_control") == before


def test_the_hybrid_host_uses_version_2_for_what_version_1_lacks(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v1=("memory", "devices"), v2=("hugetlb", "pids"))
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    assert tree.wrote("cgroup.subtree_control") == []       # only what is asked for
    group.apply({"memory": {"limit": 5}, "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                 "unified": {"pids.max": "5"}}, update=True)
    assert tree.wrote() == [("memory.limit_in_bytes", "5"), ("cgroup.subtree_control", "+hugetlb"),
                            ("hugetlb.2MB.max", "0"), ("cgroup.subtree_control", "+pids"), ("pids.max", "5")]


def test_freezing(tree):
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    assert not group.frozen()
    group.freeze(True)
    assert group.frozen()
    group.freeze(False)
    assert tree.wrote("cgroup.freeze") == [("cgroup.freeze", "1"), ("cgroup.freeze", "0")]


def test_processes_that_do_not_freeze_are_thawed_again(tree, monkeypatch):
    monkeypatch.setattr("hv.container.cgroups.v2._FREEZE_SECONDS", 0.01)
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    (tree.v2 / "box/cgroup.events").write_text("populated 1\nfrozen 0\n")
    with pytest.raises(HvError, match="do not freeze"):
        group.freeze(True)
    assert not group.frozen()


def test_oom_kills_are_counted(tree):
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    assert group.oom_kills() == 2
