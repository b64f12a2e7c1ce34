"""What version 1's files are told, on a tree of plain files."""

from __future__ import annotations

import errno

import pytest
from framework.cgroups import V1, Tree

from hv.container.cgroups.manager import manager
from hv.errors import ConfigError, HvError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    return Tree(tmp_path, monkeypatch, v1=tuple(V1))


def applied(tree, resources, *, update=True):
    group = manager("/eng/box", "box", layout=tree.layout)
    group.create()
    tree.writes.clear()
    group.apply(resources, update=update)
    return tree.wrote()


def test_memory_in_all_its_fields(tree):
    wrote = applied(tree, {"memory": {"limit": 100 << 20, "swap": 200 << 20, "reservation": 50 << 20,
                                      "kernelTCP": 9 << 20,
                                      "kernel": 7 << 20, "swappiness": 0, "disableOOMKiller": True,
                                      "useHierarchy": True,
                                      "checkBeforeUpdate": True}})
    assert wrote == [
        ("memory.limit_in_bytes", "104857600"), ("memory.memsw.limit_in_bytes", "209715200"),
        ("memory.soft_limit_in_bytes", "52428800"), ("memory.kmem.limit_in_bytes", "7340032"),
        ("memory.kmem.tcp.limit_in_bytes", "9437184"), ("memory.swappiness", "0"), ("memory.oom_control", "1")]



def test_unlimited_memory_unlimits_swap_too(tree):
    assert applied(tree, {"memory": {"limit": -1}}) == [
        ("memory.limit_in_bytes", "-1"), ("memory.memsw.limit_in_bytes", "-1")]


def test_raising_both_limits_writes_swap_first_when_the_kernel_wants_it_so(tree):
    def order(path, value):
        swap = [text for leaf, text in tree.writes if leaf == "memory.memsw.limit_in_bytes"]
        return 0 if swap else errno.EINVAL      # memory may not be above memory and swap

    tree.refuse["memory.limit_in_bytes"] = order
    assert applied(tree, {"memory": {"limit": 1 << 30, "swap": 2 << 30}}) == [
        ("memory.memsw.limit_in_bytes", "2147483648"), ("memory.limit_in_bytes", "1073741824")]


def test_a_limit_below_what_is_in_use_says_how_much(tree):
    tree.refuse["memory.limit_in_bytes"] = errno.EBUSY
    with pytest.raises(HvError, match=r"memory\.limit: .*in use: 5000000, peak 6000000"):
        applied(tree, {"memory": {"limit": 4096}})
    with pytest.raises(ConfigError, match="5000000 bytes are in use"):
        applied(tree, {"memory": {"limit": 4096, "checkBeforeUpdate": True}})


def test_a_kernel_without_kernel_memory_limits_is_found_out(tree, monkeypatch):
    from hv.container.cgroups import folder

    monkeypatch.setattr(folder.Folder, "number", lambda self, leaf, default=0: 9223372036854771712)
    with pytest.raises(ConfigError, match=r"memory\.kernel"):
        applied(tree, {"memory": {"kernel": 7 << 20}})


def test_cpu_in_all_its_fields(tree):
    wrote = applied(tree, {"cpu": {"shares": 512, "quota": 50000, "period": 200000, "burst": 1000, "idle": 1,
                                   "realtimePeriod": 1000000, "realtimeRuntime": 950000, "cpus": "0-1", "mems": "0"}})
    assert wrote == [("cpu.shares", "512"), ("cpu.idle", "1"), ("cpu.cfs_burst_us", "1000"),
                     ("cpu.cfs_period_us", "200000"), ("cpu.cfs_quota_us", "50000"), ("cpu.rt_period_us", "1000000"),
                     ("cpu.rt_runtime_us", "950000"), ("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]


def test_a_burst_waits_for_its_quota(tree):
    tree.refuse["cpu.cfs_burst_us"] = lambda path, value: 0 if ("cpu.cfs_quota_us",
                                                                "50000") in tree.writes else errno.EINVAL
    assert applied(tree, {"cpu": {"quota": 50000, "burst": 1000}}) == [
        ("cpu.cfs_quota_us", "50000"), ("cpu.cfs_burst_us", "1000")]


def test_what_never_fits_is_an_error_and_no_loop(tree):
    tree.refuse["cpu.rt_runtime_us"] = errno.EINVAL
    with pytest.raises(ConfigError, match=r"cpu\.realtimeRuntime"):
        applied(tree, {"cpu": {"realtimePeriod": 1000000, "realtimeRuntime": 950000}})


@pytest.mark.parametrize(("resources", "expected"), [
    ({"pids": {"limit": 7}}, [("pids.max", "7")]), ({"pids": {"limit": -1}}, [("pids.max", "max")]),
    ({"pids": {"limit": 0}}, []), ({"memory": {"limit": 0}}, []), ({"cpu": {"shares": 0, "cpus": ""}}, []),
    ({"memory": {}}, []), ({"memory": None, "somethingNew": 3}, []), ({"cpu": {"quota": -1}}, [("cpu.cfs_quota_us",
        "-1")]),
    ({"network": {"classID": 0x100001}}, [("net_cls.classid", "1048577")]),
    ({"network": {"priorities": [{"name": "eth0", "priority": 5}, {"name": "lo", "priority": 0}]}},
     [("net_prio.ifpriomap", "eth0 5"), ("net_prio.ifpriomap", "lo 0")]),
    ({"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}}}, [("rdma.max",
                                                                     "mlx5_1 hca_handle=3 hca_object=10000")]),
    ({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}, {"pageSize": "1GB", "limit": 0}]},
     [("hugetlb.2MB.limit_in_bytes", "4194304"), ("hugetlb.2MB.rsvd.limit_in_bytes", "4194304"),
      ("hugetlb.1GB.limit_in_bytes", "0")]),
    ({"blockIO": {"weight": 300, "leafWeight": 20, "weightDevice": [{"major": 8, "minor": 1, "weight": 5,
                                                                     "leafWeight": 6}],
                  "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                  "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 300}]}},
     [("blkio.weight", "300"), ("blkio.leaf_weight", "20"), ("blkio.weight_device", "8:1 5"),
      ("blkio.leaf_weight_device", "8:1 6"), ("blkio.throttle.read_bps_device", "8:0 600"),
      ("blkio.throttle.write_iops_device", "8:16 300")]),
])
def test_fields_become_writes(tree, resources, expected):
    assert applied(tree, resources) == expected


@pytest.mark.parametrize(("resources", "words"), [
    ({"memory": {"limit": "1g"}}, r"memory\.limit: '1g' is not a number"),
    ({"memory": []}, r"memory: \[\] is not an object"),
    ({"memory": [1]}, r"memory: \[1\] is not an object"), ({"memory": {"limit": -2}},
                                                           r"memory\.limit: -2 is out of range"),
    ({"memory": {"swappiness": 101}}, "swappiness"), ({"memory": {"limit": 200, "swap": 100}},
                                                      "less than memory.limit"),
    ({"memory": {"useHierarchy": 3}}, "useHierarchy"), ({"cpu": {"shares": True}}, "shares"),
    ({"cpu": {"cpus": "0\0"}}, "NUL"), ({"pids": {"limit": 1 << 70}}, "out of range"),
    ({"hugepageLimits": [{"pageSize": "../x/2MB", "limit": 0}]}, "pageSize"), ({"hugepageLimits": {"a": 1}},
        "an array"),
    ({"network": {"priorities": [{"name": "e x", "priority": 5}]}}, r"priorities\[0\]\.name"),
    ({"blockIO": {"weightDevice": [7]}}, r"weightDevice\[0\]"), ({"unified": {"memory.high": "1"}}, "version 2"),
])
def test_bad_values_are_refused_by_name(tree, resources, words):
    if words is None:
        assert applied(tree, resources) == []
        return
    with pytest.raises(ConfigError, match=words):
        applied(tree, resources)


def test_a_controller_that_is_not_there_is_named(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v1=("memory",))
    for part, controller in (({"pids": {"limit": 5}}, "pids"), ({"rdma": {"a": {"hcaHandles": 1}}}, "rdma"),
                             ({"cpu": {"cpus": "0"}}, "cpuset"), ({"network": {"classID": 3}}, "net_cls")):
        with pytest.raises(ConfigError, match=f"no cgroup controller {controller}"):
            applied(tree, part)


def test_shares_that_the_kernel_changes_are_refused(tree, monkeypatch):
    monkeypatch.setattr("hv.container.cgroups.folder.Folder.number", lambda *_: 2)
    with pytest.raises(ConfigError, match="the kernel keeps 2"):
        applied(tree, {"cpu": {"shares": 1}})


def test_cpus_and_memory_nodes_come_from_above(tree):
    applied(tree, {})
    for path in ("eng", "eng/box"):
        assert (tree.root / "cpuset" / path / "cpuset.cpus").read_text() == "0-3"
        assert (tree.root / "cpuset" / path / "cpuset.mems").read_text() == "0"
