"""Figures from control files as both versions write them."""

from __future__ import annotations

import pytest

from hv.container.cgroups.stats import collect


@pytest.fixture
def fill(tmp_path):
    def put(name, **files):
        (tmp_path / name).mkdir(exist_ok=True)
        for leaf, text in files.items():
            (tmp_path / name / leaf.replace("__", ".")).write_text(text)
        return str(tmp_path / name)
    return put


def test_version_2(fill):
    path = fill("two",
                cpu__stat="usage_usec 900\nuser_usec 500\nsystem_usec 400\nnr_periods 4\n"
                          "nr_throttled 2\nthrottled_usec 7\n",
                memory__current="1000\n", memory__max="5000\n", memory__peak="2000\n", memory__swap__current="50\n",
                memory__swap__max="300\n", memory__stat="anon 10\nfile 20\n", memory__events="max 3\noom_kill 1\n",
                pids__current="4\n", pids__max="max\n", cpuset__cpus__effective="0-1,4\n", cpuset__mems="0\n",
                io__stat="8:0 rbytes=100 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n253:1 rbytes=5\n",
                hugetlb__2MB__current="2097152\n", hugetlb__2MB__events="max 6\n")
    data = collect({"": path})
    assert data["cpu"] == {"usage": {"total": 900000, "kernel": 400000, "user": 500000},
                           "throttling": {"periods": 4, "throttledPeriods": 2, "throttledTime": 7000}}
    assert data["memory"]["cache"] == 20
    assert data["memory"]["usage"] == {"limit": 5000, "usage": 1000, "max": 2000, "failcnt": 3}
    assert data["memory"]["swap"] == {"limit": 5300, "usage": 1050, "failcnt": 0}
    assert data["memory"]["raw"] == {"anon": 10, "file": 20}
    assert data["pids"] == {"current": 4}
    assert data["cpuset"]["cpus"] == [0, 1, 4] and data["cpuset"]["mems"] == [0]
    assert data["blkio"]["ioServiceBytesRecursive"][:2] == [
        {"major": 8, "op": "Read", "value": 100}, {"major": 8, "op": "Write", "value": 200}]
    assert {"major": 253, "minor": 1, "op": "Read", "value": 5} in data["blkio"]["ioServiceBytesRecursive"]
    assert data["hugetlb"] == {"2MB": {"usage": 2097152, "failcnt": 6}}


def test_no_limit_is_the_largest_number(fill):
    path = fill("two", memory__current="1\n", memory__max="max\n", memory__swap__max="0\n")
    memory = collect({"": path})["memory"]
    assert memory["usage"]["limit"] == memory["swap"]["limit"] == (1 << 64) - 1


def test_version_1(fill):
    paths = {
        "cpuacct": fill("cpuacct", cpuacct__usage="300\n", cpuacct__usage_percpu="100 200 \n",
                        cpuacct__stat="user 3\nsystem 4\n",
                        cpuacct__usage_all="cpu user system\n0 10 90\n1 20 180\n"),
        "cpu": fill("cpu", cpu__stat="nr_periods 0\nnr_throttled 0\nthrottled_time 9\n"),
        "memory": fill("memory", memory__limit_in_bytes="4096\n", memory__usage_in_bytes="5\n",
                       memory__max_usage_in_bytes="6\n",
                       memory__failcnt="7\n", memory__memsw__limit_in_bytes="8192\n",
                       memory__memsw__usage_in_bytes="9\n",
                       memory__memsw__failcnt="1\n", memory__stat="cache 11\nrss 12\n",
                       memory__kmem__usage_in_bytes="3\n"),
        "pids": fill("pids", pids__current="2\n", pids__max="70\n"),
        "blkio": fill("blkio", blkio__bfq__io_serviced_recursive="Total 0\n",
                      blkio__throttle__io_serviced_recursive="254:0 Read 5\n254:0 Total 5\nTotal 5\n",
                      blkio__throttle__io_service_bytes_recursive="254:0 Read 4096\nTotal 4096\n"),
        "hugetlb": fill("hugetlb", hugetlb__2MB__usage_in_bytes="5\n", hugetlb__2MB__max_usage_in_bytes="6\n",
                        hugetlb__2MB__failcnt="7\n", hugetlb__2MB__rsvd__usage_in_bytes="9\n"),
        "cpuset": fill("cpuset", cpuset__cpus="0\n", cpuset__mems="0\n", cpuset__sched_load_balance="1\n",
                       cpuset__sched_relax_domain_level="-1\n"),
    }
    data = collect(paths)
    assert data["cpu"]["usage"] == {"total": 300, "percpu": [100, 200], "percpu_kernel": [90, 180], "percpu_user": [10,
        20],
                                    "kernel": 40000000, "user": 30000000}
    assert data["cpu"]["throttling"] == {"throttledTime": 9}
    assert data["memory"]["usage"] == {"limit": 4096, "usage": 5, "max": 6, "failcnt": 7}
    assert data["memory"]["swap"] == {"limit": 8192, "usage": 9, "failcnt": 1}
    assert data["memory"]["kernel"] == {"limit": 0, "usage": 3, "failcnt": 0}
    assert data["memory"]["cache"] == 11 and data["memory"]["raw"] == {"cache": 11, "rss": 12}
    assert data["pids"] == {"current": 2, "limit": 70}
    assert data["blkio"] == {"ioServicedRecursive": [{"major": 254, "op": "Read", "value": 5},
                                                     {"major": 254, "op": "Total", "value": 5}],
                             "ioServiceBytesRecursive": [{"major": 254, "op": "Read", "value": 4096}]}
    assert data["hugetlb"] == {"2MB": {"usage": 5, "max": 6, "failcnt": 7}}
    assert data["cpuset"]["sched_load_balance"] == 1 and data["cpuset"]["sched_relax_domain_level"] == -1


def test_groups_that_are_gone_or_not_there_give_zeros(tmp_path):
    for paths in ({}, {"": str(tmp_path / "none"), "memory": str(tmp_path / "none")}):
        data = collect(paths)
        assert data["cpu"]["usage"]["total"] == 0 and data["memory"]["usage"]["limit"] == 0 and data["blkio"] == {}
