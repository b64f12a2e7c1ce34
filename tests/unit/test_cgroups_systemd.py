"""What of a configuration systemd is told: unit, slice, properties; tests/root has the real one."""

from __future__ import annotations

import pytest
from framework.bundle import config
from hypothesis import given
from hypothesis import strategies as st

from hv.container.cgroups import systemd
from hv.container.cgroups.properties import annotated, bits, properties
from hv.container.cgroups.systemd import expand_slice, unit_of
from hv.container.spec import Spec
from hv.errors import ConfigError

INFINITY = (1 << 64) - 1


@pytest.mark.parametrize("path, user, wanted", [
    ("system.slice:runc:box", False, ("system.slice", "runc-box.scope")),
    ("", False, ("system.slice", "pyhv-me.scope")),
    ("", True, ("user.slice", "pyhv-me.scope")), (":p:box", True, ("user.slice", "p-box.scope")),
    ("a-b.slice::box", False, ("a-b.slice", "box.scope")), ("-.slice:p:b", False, ("-.slice", "p-b.scope")),
    ("machine.slice:libpod:" + "0" * 64, False, ("machine.slice", f"libpod-{'0' * 64}.scope"))])
def test_cgroups_path(path, user, wanted):
    assert unit_of(path, "me", user) == wanted


@pytest.mark.parametrize("path", [
    "/eng/box", "box", "a.slice:b", "a.slice:b:c:d", "a:b:c", "a/b.slice:b:c", "--.slice:b:c",
    "-a.slice:b:c", "a-.slice:b:c", "a--b.slice:b:c", ".slice:b:c", "a@b.slice:b:c",
    "system.slice:b:", "system.slice:b:x.slice", "system.slice:b:x/y", "system.slice:b:a b",
    "system.slice:b:../x", "system.slice:b:" + "x" * 250, "x" * 255 + ".slice:b:c"])
def test_other_paths_are_refused_by_name(path):
    with pytest.raises(ConfigError, match=r"linux\.cgroupsPath") as caught:
        unit_of(path, "me", False)
    assert caught.value.hint


@pytest.mark.parametrize("name, path", [
    ("system.slice", "system.slice"), ("-.slice", ""), ("a-b.slice", "a.slice/a-b.slice"),
    ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice")])
def test_a_slice_lies_in_those_that_its_name_begins_with(name, path):
    assert expand_slice(name) == path


def test_without_systemd_it_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(systemd, "_BOOTED", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="--systemd-cgroup: systemd does not run on this host") as caught:
        systemd.scope(Spec(config("true"), str(tmp_path)), "box")
    assert "cgroupfs" in caught.value.hint


def told(resources, **more):
    more = {"v2": True, "version": 252} | more
    return {name: value for name, (_, value) in properties(resources, **more)}


V1 = {"v2": False, "update": True}


@pytest.mark.parametrize("resources, v2, v1", [
    ({}, {}, {}),
    ({"memory": {"limit": 100, "swap": 300, "reservation": 50}},
     {"MemoryMax": 100, "MemorySwapMax": 200, "MemoryLow": 50}, {"MemoryLimit": 100}),
    ({"memory": {"limit": -1}}, {"MemoryMax": INFINITY, "MemorySwapMax": INFINITY}, {"MemoryLimit": INFINITY}),
    ({"memory": {"limit": 100, "swap": 100}}, {"MemoryMax": 100, "MemorySwapMax": 0}, {"MemoryLimit": 100}),
    ({"memory": {"limit": 100, "swap": -1}}, {"MemoryMax": 100, "MemorySwapMax": INFINITY}, {"MemoryLimit": 100}),
    ({"cpu": {"shares": 1024}}, {"CPUWeight": 39}, {"CPUShares": 1024}),
    ({"cpu": {"shares": 1024, "idle": 1}}, {"CPUWeight": 0}, {"CPUShares": 1024}),
    ({"cpu": {"quota": 20000, "period": 50000}}, {"CPUQuotaPeriodUSec": 50000, "CPUQuotaPerSecUSec": 400000},
     {"CPUQuotaPeriodUSec": 50000, "CPUQuotaPerSecUSec": 400000}),
    ({"cpu": {"quota": 12345}}, {"CPUQuotaPerSecUSec": 130000}, {"CPUQuotaPerSecUSec": 130000}),
    ({"cpu": {"quota": -1}}, {"CPUQuotaPerSecUSec": INFINITY}, {"CPUQuotaPerSecUSec": INFINITY}),
    ({"cpu": {"cpus": "0-1,8", "mems": "0"}}, {"AllowedCPUs": b"\3\1", "AllowedMemoryNodes": b"\1"},
     {"AllowedCPUs": b"\3\1", "AllowedMemoryNodes": b"\1"}),
    ({"pids": {"limit": 5}}, {"TasksMax": 5}, {"TasksMax": 5}),
    ({"pids": {"limit": -1}}, {"TasksMax": INFINITY}, {"TasksMax": INFINITY}),
    ({"pids": {"limit": 0}}, {}, {}),
    ({"blockIO": {"weight": 500}}, {"IOWeight": 4950}, {"BlockIOWeight": 500}),
    ({"unified": {"memory.max": "7", "memory.high": "max", "pids.max": "9", "cpu.max": "10000 20000", "cpu.weight": "5",
                  "cpuset.cpus": "1", "hugetlb.2MB.max": "0"}},
     {"MemoryMax": 7, "MemoryHigh": INFINITY, "TasksMax": 9, "CPUQuotaPeriodUSec": 20000, "CPUQuotaPerSecUSec": 500000,
      "CPUWeight": 5, "AllowedCPUs": b"\2"}, {}),
    ({"unified": {"memory.max": "seven", "cpu.max": "x y"}}, {}, {})])
def test_limits(resources, v2, v1):
    assert told(resources) == v2
    assert told(resources, **V1) == v1


def test_an_old_systemd_is_told_what_it_knows():
    resources = {"cpu": {"cpus": "0", "quota": 10000, "period": 20000, "idle": 1}}
    assert told(resources, version=241) == {"CPUQuotaPerSecUSec": 500000}
    assert told(resources, version=243) == {"CPUQuotaPerSecUSec": 500000, "CPUQuotaPeriodUSec": 20000}


def test_device_rules_are_told_in_version_1_alone():
    deny = {"allow": False, "access": "rwm"}
    rules = [deny, {"allow": True, "type": "c", "major": 7, "minor": 8, "access": "r"},
             {"allow": True, "type": "b", "major": 9, "access": "rw"}]
    found = properties({"devices": rules}, v2=False, version=252)
    assert found[:2] == [("DevicePolicy", ("s", "strict")), ("DeviceAllow", ("a(ss)", []))]
    allowed = dict(found[2][1][1])
    assert allowed["/dev/char/7:8"] == "r" and allowed["block-9"] == "rw" and allowed["char-*"] == "m"
    assert allowed["/dev/char/1:3"] == "rwm" and allowed["char-136"] == "rwm"
    assert "DeviceAllow" not in told({"devices": rules})
    assert told({"devices": [deny | {"allow": True}]}, v2=False) == {"DevicePolicy": "auto", "DeviceAllow": []}
    assert "DevicePolicy" in told({}, v2=False) and told({"devices": []}, v2=False, update=True) == {}


@pytest.mark.parametrize("text", ["a", "0-", "-1", "8192", "0-99999", "1-a", "1;2"])
def test_lists_of_processors_that_are_none(text):
    with pytest.raises(ConfigError, match=r"linux\.resources\.cpu\.cpus"):
        properties({"cpu": {"cpus": text}}, v2=True, version=252)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_list_as_bits(numbers):
    mask = bits(",".join(map(str, numbers)), "x")
    assert {index for index in range(8 * len(mask)) if mask[index // 8] >> index % 8 & 1} == numbers


def test_annotations():
    prefix = "org.systemd.property."
    assert annotated({f"{prefix}CollectMode": "'inactive-or-failed'", f"{prefix}TimeoutStopSec": "uint64 3",
                      "other": "x", f"{prefix}RuntimeMaxUSec": "uint64 5", f"{prefix}JobTimeoutSec": "1.5",
                      f"{prefix}AllowedCPUs": "@ay [3]", f"{prefix}After": "['a.service']"}) == [
        ("CollectMode", ("s", "inactive-or-failed")), ("TimeoutStopUSec", ("t", 3000000)),
        ("RuntimeMaxUSec", ("t", 5)), ("JobTimeoutUSec", ("t", 1500000)), ("AllowedCPUs", ("ay", b"\3")),
        ("After", ("as", ["a.service"]))]


@pytest.mark.parametrize("name, text", [
    ("", "1"), ("a-b", "1"), ("Ab", "1"), ("Größe", "1"), ("PIDs", "[uint32 1]"), ("Slice", "'x.slice'"),
    ("Delegate", "false"), ("DeviceAllow", "@a(ss) []"), ("TimeoutStopSec", "'x'"), ("TimeoutStopSec", "-1"),
    ("TimeoutStopSec", "uint64 18446744073709551615"), ("TimeoutStopSec", "true"), ("CPUWeight", "x")])
def test_annotations_that_are_refused(name, text):
    with pytest.raises(ConfigError, match=r"^annotation org\.systemd\.property\."):
        annotated({f"org.systemd.property.{name}": text})
