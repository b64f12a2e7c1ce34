"""--systemd-cgroup with a real systemd, process 1 of a container of our own (tests/framework/systemd_box.py), where the
hierarchies are those of this host, version 1 alone, and version 2 alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import config, container
from framework.groups import until
from framework.systemd_box import Box, needs_systemd

from hv.container.cgroups.detect import detect

pytestmark = [*container, needs_systemd]
V1 = {"memory", "pids", "cpu", "cpuset", "devices", "freezer"} <= set(detect().v1)
KINDS = ("hybrid", "legacy", "unified") if V1 else ("unified",)
UNIT = "pyhv-one.scope"
PLACE = "/test.slice/test-some.slice/pyhv-one.scope"
DENY = {"allow": False, "access": "rwm"}


@pytest.fixture(scope="module", params=KINDS)
def started(request) -> Iterator[Box]:
    with Box(request.param) as made:
        yield made


@pytest.fixture
def box(started: Box) -> Iterator[Box]:
    """The box, with a bundle that sleeps; afterwards neither unit nor folder is left."""
    started.config = config("sleep", "1000")
    started.config["linux"] |= {"cgroupsPath": "test-some.slice:pyhv:one", "resources": {"devices": [DENY]}}
    yield started
    started.runtime("delete", "--force", "one")
    assert units(started) == []
    assert started.output("sh", "-c", "ls -A /run/pyhv; find /sys/fs/cgroup -name 'pyhv-*'") == ""
    # slices stay as systemd has them, but not where it has none
    assert started.output("sh", "-c", "find /sys/fs/cgroup/freezer /sys/fs/cgroup/cpuset -name '*.slice' || true") == ""


def units(box: Box) -> list[str]:
    return box.output("systemctl", "list-units", "--all", "--plain", "--no-legend", "pyhv-*").splitlines()


def begin(box: Box, *words: str) -> None:
    box.write()
    done = box.runtime(*(words or ("run", "--detach")), "--bundle", "/bundle", "one")
    assert done.returncode == 0, (done.stdout, done.stderr)


def places(box: Box, command: str) -> set[str]:
    """The groups, in all hierarchies that can be seen there, of the processes with that command line."""
    text = box.output("sh", "-c", f"cat $(pgrep -x -f '{command}' | sed 's|.*|/proc/&/cgroup|')")
    seen = {"hybrid": None, "legacy": "0::", "unified": "0::"}[box.kind]
    rows = [line for line in text.splitlines() if seen is None or (line.startswith(seen)) == (box.kind == "unified")]
    return {line.split(":", 2)[2] for line in rows}


def file(box: Box, controller: str, leaf: str) -> str:
    top = "/sys/fs/cgroup" if box.kind == "unified" else f"/sys/fs/cgroup/{controller}"
    return box.output("cat", f"{top}{PLACE}/{leaf}")


def needs_version_1(box: Box) -> None:
    if box.kind == "unified":
        pytest.skip("this host's controllers are in version 1")


def test_a_container_is_a_delegated_scope_in_its_slice(box):
    begin(box)
    found = box.show(UNIT, "Slice", "ControlGroup", "Delegate", "ActiveState", "Description", "DefaultDependencies",
                     "Transient", "TasksAccounting", "MemoryAccounting", "CPUAccounting")
    assert found == {"Slice": "test-some.slice", "ControlGroup": PLACE, "Delegate": "yes", "ActiveState": "active",
                     "Description": "container one", "DefaultDependencies": "no", "Transient": "yes",
                     "TasksAccounting": "yes", "MemoryAccounting": "yes", "CPUAccounting": "yes"}
    assert places(box, "sleep 1000") == {PLACE}
    pid = json.loads(box.runtime("state", "one").stdout)["pid"]
    assert box.output("sh", "-c", f"cat $(find /sys/fs/cgroup -path '*{PLACE}/cgroup.procs') | sort -u") == str(pid)


def test_exec_is_in_the_unit(box):
    begin(box)
    assert box.runtime("exec", "--detach", "one", "sleep", "999").returncode == 0
    assert places(box, "sleep 999") == {PLACE}


def test_without_a_path_the_unit_has_the_containers_name(box):
    del box.config["linux"]["cgroupsPath"]
    begin(box)
    assert box.show(UNIT, "ControlGroup") == {"ControlGroup": "/system.slice/pyhv-one.scope"}


LIMITS = {"memory": {"limit": 64 << 20}, "pids": {"limit": 55},
          "cpu": {"shares": 512, "quota": 20000, "period": 50000, "cpus": "0"},
          "devices": [DENY, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}]}


def test_limits_are_properties_and_in_files_and_outlive_a_reload(box):
    needs_version_1(box)
    box.config["linux"]["resources"] = LIMITS
    begin(box)
    found = box.show(UNIT, "MemoryLimit", "TasksMax", "CPUShares", "CPUQuotaPerSecUSec", "CPUQuotaPeriodUSec",
                     "DevicePolicy", "DeviceAllow")
    assert found.pop("DeviceAllow")
    assert found == {"MemoryLimit": str(64 << 20), "TasksMax": "55", "CPUShares": "512", "DevicePolicy": "strict",
                     "CPUQuotaPerSecUSec": "400ms", "CPUQuotaPeriodUSec": "50ms"}
    assert "/dev/char/1:11 r" in box.output("systemctl", "show", UNIT, "-p", "DeviceAllow")
    for _ in range(2):
        assert file(box, "memory", "memory.limit_in_bytes") == str(64 << 20)
        assert file(box, "pids", "pids.max") == "55"
        assert file(box, "cpu", "cpu.shares") == "512"
        assert (file(box, "cpu", "cpu.cfs_quota_us"), file(box, "cpu", "cpu.cfs_period_us")) == ("20000", "50000")
        assert file(box, "cpuset", "cpuset.cpus") == "0"
        devices = file(box, "devices", "devices.list").splitlines()
        assert "c 1:11 r" in devices and "c 1:3 rwm" in devices and "a *:* rwm" not in devices
        box.output("systemctl", "daemon-reload")
        # what makes systemd write everything again
        box.output("systemctl", "set-property", "--runtime", UNIT, "DeviceAllow=/dev/char/1:11 r")


@pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed")
def test_runc_tells_systemd_the_same(box):
    limited = LIMITS | {"blockIO": {"weight": 300}}
    box.config["linux"]["resources"] = {"devices": LIMITS["devices"]} if box.kind == "unified" else limited
    # what differs from run to run; how each sets its properties; what it says of itself
    apart = re.compile(r".*Timestamp|.*Monotonic|CPUUsageNSec|ControlGroupId|InvocationID|MemoryCurrent|DropInPaths|"
                       "NeedDaemonReload|Description|MemoryAvailable|StateChange.*|.*NSec|TasksCurrent")
    found = []
    for command in (["runc", "--systemd-cgroup"], box.command()):     # runc leaves folders behind, which ours removes
        box.write()
        box.output(*command, "run", "--detach", "--bundle", "/bundle", "one")
        rows = box.output("systemctl", "show", UNIT).replace("char-pts", "char-136").splitlines()
        found.append({row for row in rows if not apart.fullmatch(row.partition("=")[0])})
        box.output(*command, "delete", "--force", "one")
    if box.kind == "unified":           # runc names devices to systemd there too, which takes part in deciding then
        found = [{row for row in rows if not row.startswith("Device")} for rows in found]
    assert found[0] ^ found[1] == set()


def test_update_changes_properties_and_files(box):
    needs_version_1(box)
    box.config["linux"]["resources"] = LIMITS
    begin(box)
    done = box.runtime("update", "--memory", "100m", "--cpu-quota", "35000", "--pids-limit", "77", "--cpu-share", "99",
                       "one")
    assert done.returncode == 0, done.stderr
    assert box.show(UNIT, "MemoryLimit", "TasksMax", "CPUShares", "CPUQuotaPerSecUSec") == {
        "MemoryLimit": str(100 << 20), "TasksMax": "77", "CPUShares": "99", "CPUQuotaPerSecUSec": "700ms"}
    assert file(box, "memory", "memory.limit_in_bytes") == str(100 << 20)
    assert file(box, "pids", "pids.max") == "77"
    assert file(box, "cpu", "cpu.cfs_quota_us") == "35000" and file(box, "cpu", "cpu.shares") == "99"
    (box.root / "bundle/new.json").write_text(json.dumps({"devices": [DENY]}))
    assert box.runtime("update", "--resources", "/bundle/new.json", "one").returncode == 0
    assert "c 1:11 r" not in file(box, "devices", "devices.list")
    assert "/dev/char/1:11" not in box.output("systemctl", "show", UNIT, "-p", "DeviceAllow")
    assert json.loads(box.runtime("state", "one").stdout)["status"] == "running"
    assert box.runtime("update", "--cpu-share", "1", "one").returncode == 1
    assert box.show(UNIT, "CPUShares") == {"CPUShares": "99"} and file(box, "cpu", "cpu.shares") == "99"


def test_pause_and_resume(box):
    begin(box)
    for command, status in (("pause", "paused"), ("resume", "running")):
        assert box.runtime(command, "one").returncode == 0
        assert json.loads(box.runtime("state", "one").stdout)["status"] == status


def test_created_then_started(box):
    box.config["process"]["args"] = ["sh", "-c", "touch /tmp/begun; sleep 1000"]
    box.config["root"]["readonly"] = False
    begin(box, "create")
    assert box.show(UNIT, "ActiveState") == {"ActiveState": "active"}
    assert not (box.root / "bundle/rootfs/tmp/begun").exists()
    assert box.runtime("start", "one").returncode == 0
    until(lambda: (box.root / "bundle/rootfs/tmp/begun").exists())
    (box.root / "bundle/rootfs/tmp/begun").unlink()


def test_the_unit_ends_with_the_program(box):
    box.config["process"]["args"] = ["sh", "-c", "exit 7"]
    box.write()
    done = box.runtime("run", "--bundle", "/bundle", "one")
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    assert units(box) == []
    box.config["process"]["args"] = ["true"]
    begin(box)
    until(lambda: json.loads(box.runtime("state", "one").stdout)["status"] == "stopped")
    assert box.runtime("delete", "one").returncode == 0


def test_in_the_foreground_the_program_is_alone_in_there(box):
    box.write()
    box.output("sh", "-c", '"$0" "$@" </dev/null >/dev/null 2>&1 &', *box.command("run", "--bundle", "/bundle", "one"))
    until(lambda: "running" in box.runtime("state", "one").stdout)
    pid = json.loads(box.runtime("state", "one").stdout)["pid"]
    assert box.output("sh", "-c", f"cat $(find /sys/fs/cgroup -path '*{PLACE}/cgroup.procs') | sort -u") == str(pid)
    assert box.runtime("kill", "one", "KILL").returncode == 0
    until(lambda: box.call("pgrep", "-f", "run --bundle /bundle one").returncode == 1)
    assert units(box) == []


def test_out_of_memory(box):
    needs_version_1(box)
    box.config["linux"]["resources"] |= {"memory": {"limit": 16 << 20}}
    box.config["process"]["args"] = ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]
    box.write()
    assert box.runtime("run", "--bundle", "/bundle", "one").returncode == 128 + signal.SIGKILL
    assert units(box) == []


def test_annotations_are_properties_and_a_failed_unit_is_no_obstacle(box):
    box.config["annotations"] = {"org.systemd.property.RuntimeMaxSec": "uint64 1",
                                 "org.systemd.property.TimeoutStopSec": "uint64 1"}
    begin(box)
    assert box.show(UNIT, "RuntimeMaxUSec", "TimeoutStopUSec") == {"RuntimeMaxUSec": "1s", "TimeoutStopUSec": "1s"}
    until(lambda: box.show(UNIT, "ActiveState", "Result") == {"ActiveState": "failed", "Result": "timeout"})
    assert json.loads(box.runtime("state", "one").stdout)["status"] == "stopped"
    box.config["annotations"] = {}
    box.write()
    done = box.runtime("run", "--detach", "--bundle", "/bundle", "two")
    assert done.returncode == 0, done.stderr
    assert box.show(UNIT, "ActiveState") == {"ActiveState": "active"}
    assert box.runtime("delete", "--force", "two").returncode == 0


def test_a_property_that_systemd_does_not_know(box):
    box.config["annotations"] = {"org.systemd.property.NoSuch": "'x'"}
    box.write()
    done = box.runtime("run", "--bundle", "/bundle", "one")
    assert done.returncode == 1 and "NoSuch" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_unit_of_somebody_else_is_left_alone(box):
    box.output("sh", "-c", f"systemd-run --scope --quiet --unit={UNIT} --slice=test-some.slice sleep 500 "
                           "</dev/null >/dev/null 2>&1 &")
    until(lambda: units(box))
    box.write()
    done = box.runtime("run", "--bundle", "/bundle", "one")
    assert done.returncode == 1 and ("exists already" in done.stderr or "processes are in there" in done.stderr)
    assert box.show(UNIT, "ActiveState") == {"ActiveState": "active"}
    box.output("systemctl", "stop", UNIT)


@pytest.mark.parametrize("change", [
    {"process": {"args": ["/absent"]}}, {"linux": {"resources": {"cpu": {"cpus": "4095"}}}},
    {"linux": {"resources": {"unified": {"no.such": "1"}}}}, {"mounts": [{"destination": "/x", "type": "nonesuch"}]}])
def test_of_what_fails_nothing_is_left(box, change):
    for part, value in change.items():
        if isinstance(value, dict):
            box.config[part] |= value
        else:
            box.config[part] += value
    box.write()
    done = box.runtime("run", "--bundle", "/bundle", "one")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    until(lambda: units(box) == [])


def test_of_a_runtime_that_is_killed_no_process_is_left(box):
    box.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "touch /tmp/hook; sleep 300"]}]}
    box.write()
    box.output("rm", "-f", "/tmp/hook")
    box.output("sh", "-c", 'setsid "$0" "$@" </dev/null >/dev/null 2>&1 & echo $! >/tmp/pid',
               *box.command("create", "--bundle", "/bundle", "one"))
    until(lambda: box.call("test", "-e", "/tmp/hook").returncode == 0)
    assert units(box)
    box.output("sh", "-c", "kill -9 $(cat /tmp/pid)")
    until(lambda: box.output("sh", "-c", f"cat $(find /sys/fs/cgroup -path '*{PLACE}/cgroup.procs')") == "")
    assert box.runtime("delete", "--force", "one").returncode == 0
    until(lambda: units(box) == [])
    box.call("pkill", "-x", "-f", "sleep 300")


def test_without_systemds_own_socket_the_bus_is_used(box):
    box.output("mv", "/run/systemd/private", "/run/systemd/aside")
    try:
        begin(box)
        assert places(box, "sleep 1000") == {PLACE}
        assert box.runtime("delete", "--force", "one").returncode == 0
    finally:
        box.output("mv", "/run/systemd/aside", "/run/systemd/private")


def test_a_path_of_the_other_driver_is_refused(box):
    box.config["linux"]["cgroupsPath"] = "/eng/one"
    box.write()
    done = box.runtime("run", "--bundle", "/bundle", "one")
    assert done.returncode == 1 and "slice:prefix:name" in done.stderr


def test_of_the_host_nothing_was_changed(box):
    """The box has /proc/sys read-only, so systemd sets none of the host's variables."""
    assert "ro," in next(line for line in box.output("cat", "/proc/self/mounts").splitlines() if " /proc/sys " in line)
    assert not Path("/run/systemd/private").exists() or Path("/proc/1/comm").read_text() == "systemd\n"
