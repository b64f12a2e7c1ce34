"""cgroup version 2 for real: the runtime itself, in a Linux guest that has that version alone and all its controllers.

On hosts where version 1 holds the controllers, version 2's can be tried nowhere else. One guest serves all tests; what
is done in it stands in tests/framework/cgroups_inside.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from framework.bundle import needs_busybox, rootfs
from framework.guest_python import GuestPython
from framework.linux import skip_without_build_tools
from framework.run import ROOT, needs_kvm

from hv.devices.virtio.blk_config import DiskConfig

pytestmark = [needs_kvm, needs_busybox, pytest.mark.timeout(2400)]

CONTROLLERS = {"cpuset", "cpu", "io", "memory", "hugetlb", "pids"}
MIB = 1 << 20
DISK = "254:0"         # the guest's first virtio disk; the major number is the first that the kernel gives away
LIMITS = {
    "memory": {"limit": 64 * MIB, "reservation": 16 * MIB, "swap": 96 * MIB},
    "cpu": {"shares": 2048, "quota": 100000, "period": 200000, "burst": 5000, "cpus": "0", "mems": "0"},
    "pids": {"limit": 20},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}],
    "blockIO": {"weight": 200, "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 256 << 10}]},
    "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "b", "major": 254, "access": "r"}],
    "unified": {"memory.high": str(60 * MIB), "cgroup.max.descendants": "7"},
}


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestPython]:
    skip_without_build_tools()
    folder, disk = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("disk") / "disk"
    rootfs(folder / "box")
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    with GuestPython(folder, "framework.cgroups_inside", devices=(DiskConfig(str(disk)),)) as guest:
        yield guest
        assert guest.call("groups") == []
        for name, device in guest.machine.devices.items():
            assert not getattr(device, "faults", 0), (name, device.fault_texts)


@pytest.fixture(scope="module")
def box(guest: GuestPython) -> Iterator[str]:
    """A container with limits of all kinds, running. The tests below change it one after the other."""
    assert guest.call("create", name="box", resources=LIMITS, capabilities=["CAP_MKNOD"]) == ""
    yield "box"
    assert guest.call("end", name="box") == []


def test_what_is_there(guest: GuestPython) -> None:
    seen = guest.call("hierarchies")
    assert (seen["v1"], seen["v2"]) == ({}, "/sys/fs/cgroup")
    assert set(seen["cgroup.controllers"].split()) >= CONTROLLERS
    assert seen["cgroup.subtree_control"] == ""         # nobody has passed anything on yet; the runtime must


def test_every_limit_is_what_the_kernel_has(guest: GuestPython, box: str) -> None:
    seen = guest.call("read", group=f"pyhv-{box}", leaves=[
        "memory.max", "memory.low", "memory.swap.max", "memory.high", "cpu.weight", "cpu.max", "cpu.max.burst",
        "cpuset.cpus", "cpuset.mems", "pids.max", "io.weight", "io.max", "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max",
        "cgroup.max.descendants"])
    assert seen == {
        "memory.max": str(64 * MIB), "memory.low": str(16 * MIB), "memory.swap.max": str(32 * MIB),
        "memory.high": str(60 * MIB), "cpu.weight": "79", "cpu.max": "100000 200000", "cpu.max.burst": "5000",
        "cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "20", "io.weight": "default 1920",
        "io.max": f"{DISK} rbps={256 << 10} wbps=max riops=max wiops=max", "hugetlb.2MB.max": str(4 * MIB),
        "hugetlb.2MB.rsvd.max": str(4 * MIB), "cgroup.max.descendants": "7"}


def test_what_a_program_in_the_container_sees(guest: GuestPython, box: str) -> None:
    seen = guest.call("execute", name=box, script="cd /sys/fs/cgroup; cat /proc/self/cgroup pids.max; "
                                                  "wc -l < cgroup.procs; mknod /dev/log c 1 11; exec 2>&1; "
                                                  "(: < /dev/log); (echo 9 > pids.max) || (: > /dev/null) && echo end")
    group, limit, count, *words = seen["output"].split()
    assert (group, limit) == ("0::/", "20") and int(count) >= 2     # its own group is the root
    assert "/dev/log: Operation not permitted" in seen["output"], seen
    assert "pids.max: Read-only file system" in seen["output"] and words[-1] == "end", seen


def test_figures(guest: GuestPython, box: str) -> None:
    figures = guest.call("stats", name=box)
    assert figures["memory"]["usage"]["limit"] == 64 * MIB
    assert figures["memory"]["swap"]["limit"] == 96 * MIB
    assert 0 < figures["memory"]["usage"]["usage"] <= figures["memory"]["usage"]["max"] < 64 * MIB
    assert figures["memory"]["raw"]["anon"] > 0
    assert figures["pids"]["limit"] == 20 and figures["pids"]["current"] >= 1
    assert figures["cpuset"]["cpus"] == [0] and figures["cpuset"]["mems"] == [0]
    usage = figures["cpu"]["usage"]
    assert usage["total"] > 0 and abs(usage["total"] - usage["kernel"] - usage["user"]) < 50_000
    assert figures["hugetlb"]["2MB"] == {"failcnt": 0}


def test_processes_are_limited(guest: GuestPython, box: str) -> None:
    assert guest.call("update", name=box, resources={"pids": {"limit": 4}}) == ""
    seen = guest.call("execute", name=box, script="for i in 1 2 3 4; do sleep 60 & done; echo all")
    assert seen["code"] != 0 and "all" not in seen["output"], seen
    events = guest.call("read", group=f"pyhv-{box}", leaves=["pids.events", "pids.max"])
    assert guest.call("update", name=box, resources={"pids": {"limit": 20}}) == ""
    assert int(events["pids.events"].split()[1]) >= 1 and events["pids.max"] == "4"


def test_the_processor_is_limited(guest: GuestPython, box: str) -> None:
    free = guest.call("update", name=box, resources={"cpu": {"quota": -1}})
    assert free == "" and guest.call("spinning", name=box, seconds=1)["held up"] == 0
    assert guest.call("update", name=box, resources={"cpu": {"quota": 40000, "burst": 0}}) == ""
    assert guest.call("read", group=f"pyhv-{box}", leaves=["cpu.max"]) == {"cpu.max": "40000 200000"}
    seen = guest.call("spinning", name=box, seconds=3)
    assert seen["held up"] >= 2 and seen["throttling"]["throttledTime"] > 0, seen
    assert seen["share"] < 0.45, seen                   # a fifth; the last period before the end may go over
    assert guest.call("update", name=box, resources={"cpu": {"quota": -1, "shares": 512}}) == ""
    assert guest.call("read", group=f"pyhv-{box}", leaves=["cpu.max", "cpu.weight"]) == {
        "cpu.max": "max 200000", "cpu.weight": "20"}


def test_the_disk_is_limited(guest: GuestPython, box: str) -> None:
    seen = guest.call("read_disk", name=box, size=768 << 10)        # three seconds at 256 KiB a second
    assert seen["device"] == [int(part) for part in DISK.split(":")]
    assert seen["seconds"] > 1.5, seen
    rows = {(row["major"], row["op"]): row.get("value") for row in seen["blkio"]["ioServiceBytesRecursive"]}
    assert rows[seen["device"][0], "Read"] >= 768 << 10


def test_a_weight_for_one_disk(guest: GuestPython, box: str) -> None:
    resources = {"blockIO": {"weightDevice": [{"major": 254, "minor": 0, "weight": 300}]}}
    refused = guest.call("update", name=box, resources=resources)
    assert refused.endswith(f"weightDevice[0].weight: io.weight does not take {DISK} 2930 (Operation not supported)")
    guest.call("cost_model", device=DISK)
    assert guest.call("update", name=box, resources=resources) == ""
    assert guest.call("read", group=f"pyhv-{box}", leaves=["io.weight"])["io.weight"].split("\n") == [
        "default 1920", f"{DISK} 2930"]


def test_huge_pages_are_limited(guest: GuestPython, box: str) -> None:
    assert guest.call("huge_pages", name=box, sizes=[4 * MIB, 6 * MIB]) == {str(4 * MIB): "ok", str(6 * MIB): "ENOMEM"}


def test_processors_can_be_chosen(guest: GuestPython, box: str) -> None:
    seen = guest.call("on_another_processor", name=box)
    assert seen == {"before": ["0"] * 3, "refused": "", "moved": ["1"] * 3, "figures": [1], "back": ["0"] * 3}


def test_device_rules_change(guest: GuestPython, box: str) -> None:
    assert guest.call("kernel_log", name=box) == {"read": "EPERM", "write": "EPERM"}
    # what version 1 can't say: all of major 1, without writing to the log
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "access": "rwm"},
             {"allow": False, "type": "c", "major": 1, "minor": 11, "access": "w"}]
    assert guest.call("update", name=box, resources={"devices": rules}) == ""
    assert guest.call("kernel_log", name=box) == {"read": "ok", "write": "EPERM"}


def test_the_device_program_answers_for_each_access(guest: GuestPython) -> None:
    null, zero = 3, 5
    seen = guest.call("device_program", rules=[[False, "a", -1, -1, 7], [True, "c", 1, null, 1 | 2],
                                               [True, "c", 1, zero, 2]])
    assert seen == {"make null": "ok", "make zero": "EPERM", "read zero": "ok", "write zero": "EPERM",
                    "read null": "ok"}


def test_pausing(guest: GuestPython, box: str) -> None:
    seen = guest.call("freezing", name=box)
    assert seen["paused"] == "paused" and seen["cgroup.freeze"] == "1" and "frozen 1" in seen["cgroup.events"]
    assert seen["again"].startswith("cannot pause a container that is paused")
    assert seen["ran"] == 0 and seen["resumed"] == "running" and "frozen 0" in seen["events"]


def test_updates_that_can_not_be_change_nothing(guest: GuestPython, box: str) -> None:
    leaves = ["pids.max", "memory.max", "cpu.max"]
    before = guest.call("read", group=f"pyhv-{box}", leaves=leaves)
    for resources, words in (
            ({"pids": {"limit": 6}, "unified": {"memory.nonsense": "1"}}, "no memory.nonsense here"),
            ({"pids": {"limit": 6}, "cpu": {"cpus": "77"}}, "cpuset.cpus does not take 77"),
            ({"unified": {"rdma.max": "1"}}, "no controller rdma here"),
            ({"rdma": {"mlx": {"hcaHandles": 1}}}, "no cgroup controller rdma"),
            ({"memory": {"swappiness": 1}}, "swappiness: cgroup version 2 has nothing like it"),
            ({"cpu": {"realtimeRuntime": 1000}}, "realtimeRuntime: cgroup version 2 has nothing like it"),
            ({"network": {"classID": 1}}, "no cgroup controller net_cls"),
            ({"blockIO": {"weightDevice": [{"major": 77, "minor": 0, "weight": 100}]}}, "io.weight does not take 77:0"),
    ):
        assert words in guest.call("update", name=box, resources=resources), resources
        assert guest.call("read", group=f"pyhv-{box}", leaves=leaves) == before


def test_memory_limits_move_together(guest: GuestPython, box: str) -> None:
    leaves = ["memory.max", "memory.swap.max"]

    def after(**memory: int) -> list[str]:
        assert guest.call("update", name=box, resources={"memory": memory}) == ""
        return list(guest.call("read", group=f"pyhv-{box}", leaves=leaves).values())

    assert after(limit=80 * MIB) == [str(80 * MIB), str(16 * MIB)]      # the sum stays what it was: 96 MiB
    assert after(limit=-1) == ["max", "max"]
    assert after(limit=64 * MIB, swap=64 * MIB) == [str(64 * MIB), "0"]


def test_the_command_says_the_same(guest: GuestPython, box: str) -> None:
    seen = guest.call("command", words=["events", "--stats", box], checkout=str(ROOT))
    row = json.loads(seen["output"])
    assert (seen["code"], row["type"], row["id"]) == (0, "stats", box)
    assert row["data"]["memory"]["usage"]["limit"] == 64 * MIB


def test_killing_all_of_a_paused_container(guest: GuestPython, box: str) -> None:
    seen = guest.call("kill_all", name=box, paused=True)
    assert seen == {"before": seen["before"], "status": "stopped", "code": 137} and seen["before"] >= 1


def test_out_of_memory_is_told(guest: GuestPython) -> None:
    seen = guest.call("out_of_memory", name="eater", script="exec dd if=/dev/zero of=/dev/null bs=24M count=1",
                      resources={"memory": {"limit": 8 * MIB, "swap": 8 * MIB}})
    assert [json.loads(line) for line in seen["lines"]] == [{"type": "oom", "id": "eater"}]
    assert seen["code"] == 137 and int(seen["events"]["oom_kill"]) == 1, seen
    assert seen["left"] == []


def test_a_group_with_processes_passes_nothing_on(guest: GuestPython) -> None:
    seen = guest.call("below_a_busy_group", path="/pod/one", resources={"pids": {"limit": 9}})
    assert seen["without"] == "" and seen["left"] == []
    assert seen["with"] == "linux.resources.pids: cgroup /sys/fs/cgroup/pod does not pass controller pids on"
    # the kernel would have passed pids on, at the price that nothing but threads could be below
    assert (seen["cgroup.type"], seen["cgroup.subtree_control"], seen["groups"]) == ("domain", "", ["/pod"])


def test_a_container_that_splits_its_group(guest: GuestPython) -> None:
    script = ("cd /sys/fs/cgroup && mkdir init && echo 1 > init/cgroup.procs && echo +pids > cgroup.subtree_control "
              "&& mkdir other && echo ready && sleep 1000")
    assert guest.call("create", name="split", script=script, cgroup_options=["rw", "nosuid"], output=True,
                      path="/a/deep/place", resources={"pids": {"limit": 30}}) == ""
    assert guest.call("read", group="a/deep/place", leaves=["pids.max"]) == {"pids.max": "30"}
    guest.call("wait_for", name="split", text="ready")
    seen = guest.call("execute", name="split", script="cat /proc/self/cgroup /sys/fs/cgroup/other/pids.max")
    assert seen["output"].split() == ["0::/init", "max"], seen
    assert guest.call("kill_all", name="split")["code"] == 137
    assert guest.call("end", name="split") == []
    left = [group for group in guest.call("groups") if group.startswith("/a")]
    assert sorted(left) == ["/a", "/a/deep"]            # whoever named them may have more for them
    guest.call("remove", groups=["a/deep", "a"])


def test_a_user_with_a_delegated_group(guest: GuestPython) -> None:
    seen = guest.call("delegated", name="mine", user=1000, resources={"pids": {"limit": 11},
                                                                      "memory": {"limit": 32 * MIB}})
    assert (seen["pids.max"], seen["memory.max"], seen["paused"]) == ("11", str(32 * MIB), "paused")
    assert len(seen["cgroup.procs"].split()) == 1 and seen["left"] == []
