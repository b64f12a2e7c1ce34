"""--systemd-cgroup for a user without root, by that user's own systemd; for podman; what systemd takes of version 2."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator

import pytest
from framework.bundle import container
from framework.engines import IMAGE, RUNTIME, needs
from framework.groups import until
from framework.run import ROOT
from framework.systemd_box import Box, needs_systemd

from hv.container.cgroups.detect import detect

pytestmark = [*container, needs_systemd]
KINDS = ("hybrid", "unified") if detect().v1 else ("unified",)
USER = 4242
FOLDER = f"/run/user/{USER}"
ENVIRONMENT = {"XDG_RUNTIME_DIR": FOLDER, "HOME": "/tmp"}
UNIT = "pyhv-one.scope"
SET_UP = f"""set -e
echo tester:x:{USER}:{USER}::/tmp:/bin/sh >>/etc/passwd
echo tester:x:{USER}: >>/etc/group
chmod 755 /root
install -d -o {USER} -m 700 {FOLDER}
chown -R {USER} /bundle
mkdir -p /etc/systemd/user
printf '[Unit]\\nDefaultDependencies=no\\n' >/etc/systemd/user/box.target
# the kernel lets no user mount a /proc where something of the one there is covered
for part in $(sed -n 's|^[^ ]* \\(/proc/[^ ]*\\) .*|\\1|p' /proc/self/mounts); do umount -l $part; done
systemd-run --quiet --unit=tester.service --slice=user-{USER}.slice -p User={USER} -p Delegate=yes -p Type=notify \\
    -E XDG_RUNTIME_DIR={FOLDER} /lib/systemd/systemd --user --unit=box.target --log-target=console
"""


@pytest.fixture(scope="module", params=KINDS)
def box(request) -> Iterator[Box]:
    with Box(request.param) as made:
        yield made


@pytest.fixture
def tester(request) -> Iterator[Box]:
    """A box with a user's systemd, and a bundle of that user."""
    with Box(request.param) as made:
        made.output("sh", "-c", SET_UP)
        assert mine(made, "spec", "--rootless", "--bundle", "/bundle").returncode == 0
        place = made.root / "bundle/config.json"
        made.config = json.loads(place.read_text())
        made.config["process"] |= {"args": ["sleep", "1000"], "terminal": False}
        made.write()
        yield made


def mine(box: Box, *words: str):
    """Our runtime, run by the user."""
    return box.runtime(*words, user=USER, environment=ENVIRONMENT)


def where(box: Box, command: str) -> str:
    """The group of version 2 of the process with that command line."""
    text = box.output("sh", "-c", f"cat /proc/$(pgrep -x -f '{command}')/cgroup")
    return next(line for line in text.splitlines() if line.startswith("0::"))[3:]


@pytest.mark.parametrize("tester", KINDS, indirect=True)
def test_a_users_container_is_a_unit_of_that_users_systemd(tester):
    done = mine(tester, "run", "--detach", "--bundle", "/bundle", "one")
    assert done.returncode == 0, done.stderr
    place = f"/user.slice/user-{USER}.slice/tester.service/user.slice/{UNIT}"
    assert where(tester, "sleep 1000") == place
    shown = tester.output("systemctl", "--user", "show", UNIT, "-p", "ControlGroup", user=USER, environment=ENVIRONMENT)
    assert shown == f"ControlGroup={place}"
    assert mine(tester, "exec", "--detach", "one", "sleep", "999").returncode == 0
    assert where(tester, "sleep 999") == place
    for command, status in (("pause", "paused"), ("resume", "running")):
        assert mine(tester, command, "one").returncode == 0
        assert json.loads(mine(tester, "state", "one").stdout)["status"] == status
    assert mine(tester, "delete", "--force", "one").returncode == 0
    assert UNIT not in tester.output("systemctl", "--user", "list-units", "--all", user=USER, environment=ENVIRONMENT)
    assert tester.output("sh", "-c", "find /sys/fs/cgroup -name 'pyhv-*'") == ""


@pytest.mark.parametrize("tester", KINDS[:1], indirect=True)
def test_a_user_is_heard_by_the_bus_as_well(tester):
    tester.output("systemctl", "--user", "start", "dbus.service", user=USER, environment=ENVIRONMENT)
    tester.output("rm", f"{FOLDER}/systemd/private")
    done = mine(tester, "run", "--detach", "--bundle", "/bundle", "one")
    assert done.returncode == 0, done.stderr
    assert where(tester, "sleep 1000").endswith(f"/tester.service/user.slice/{UNIT}")
    assert mine(tester, "delete", "--force", "one").returncode == 0
    assert tester.output("sh", "-c", "find /sys/fs/cgroup -name 'pyhv-*'") == ""


@pytest.mark.parametrize("tester", KINDS[:1], indirect=True)
def test_a_user_without_a_systemd_is_told(tester):
    tester.output("systemctl", "stop", "tester.service")
    done = mine(tester, "run", "--bundle", "/bundle", "one")
    assert done.returncode == 1 and "systemd (of this user) can't be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs("podman", "conmon")
def test_podman_with_the_systemd_manager(box):
    with tarfile.open(box.root / "bundle/image.tar", "w") as file:
        file.add(box.root / "bundle/rootfs", ".")
    (box.root / "bundle/containers.conf").write_text(
        f'[engine]\nlock_type = "file"\n[engine.runtimes]\npyhv = ["{RUNTIME}"]\n')

    def podman(*words: str, code: int = 0) -> str:
        done = box.call("podman", "--root", "/tmp/p/root", "--runroot", "/tmp/p/run", "--tmpdir", "/tmp/p/tmp",
                        "--storage-driver", "vfs", "--cgroup-manager", "systemd", "--events-backend", "file",
                        "--runtime", RUNTIME, *words, environment={"CONTAINERS_CONF": "/bundle/containers.conf"})
        assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout.strip()

    flags = ("--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--cgroupns", "host",
             *(("--pids-limit", "0") if box.kind == "unified" else ("--memory", "64m", "--pids-limit", "33")))
    podman("import", "/bundle/image.tar", IMAGE)
    rows = podman("run", "--rm", *flags, IMAGE, "sh", "-c", "cat /proc/self/cgroup; exit 7", code=7).splitlines()
    assert "/machine.slice/libpod-" in next(row for row in rows if row.startswith("0::"))
    name = podman("run", "--detach", *flags, IMAGE, "sleep", "1000")
    unit = f"libpod-{name}.scope"
    assert box.show(unit, "ActiveState", "Slice") == {"ActiveState": "active", "Slice": "machine.slice"}
    if box.kind != "unified":
        assert box.show(unit, "MemoryLimit", "TasksMax") == {"MemoryLimit": str(64 << 20), "TasksMax": "33"}
    assert podman("exec", name, "echo", "hello") == "hello"
    podman("pause", name)
    podman("unpause", name)
    podman("stop", "--time", "0", name)
    podman("rm", name)
    until(lambda: "libpod" not in box.output("systemctl", "list-units", "--all", "--plain", "--no-legend"))


SCRIPT = f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from hv.container.cgroups.bus import Bus
from hv.container.cgroups.properties import properties
limits = {{"memory": {{"limit": 1 << 26, "swap": 1 << 27, "reservation": 1 << 25}}, "pids": {{"limit": 44}},
          "cpu": {{"shares": 1024, "quota": 20000, "period": 50000, "cpus": "0-1", "mems": "0"}},
          "blockIO": {{"weight": 500}}}}
with Bus(False) as bus, subprocess.Popen(["sleep", "500"]) as held:
    version = int(bus.property("Version").partition(".")[0])
    wanted = properties(limits, v2=True, version=version)
    bus.start("pyhv-x.scope", [("PIDs", ("au", [held.pid])), ("Delegate", ("b", True)), *wanted])
    subprocess.run(["systemctl", "show", "pyhv-x.scope"], check=True)
    bus.change("pyhv-x.scope", properties({{"unified": {{"memory.max": "max", "cpu.max": "max", "pids.max": "7",
                                                     "cpu.weight": "5"}}}}, v2=True, version=version))
    subprocess.run(["systemctl", "show", "pyhv-x.scope"], check=True)
    bus.stop("pyhv-x.scope")
"""


def test_systemd_takes_the_properties_of_version_2(box):
    """As far as they go where this host's controllers are in version 1: what systemd keeps, not what it writes."""
    text = box.output("python3", "-c", SCRIPT).splitlines()
    for line in (f"MemoryMax={1 << 26}", f"MemorySwapMax={1 << 26}", f"MemoryLow={1 << 25}", "TasksMax=44",
                 "CPUWeight=39", "CPUQuotaPerSecUSec=400ms", "CPUQuotaPeriodUSec=50ms", "AllowedCPUs=0-1",
                 "AllowedMemoryNodes=0", "IOWeight=4950", "MemoryMax=infinity", "CPUQuotaPerSecUSec=infinity",
                 "TasksMax=7", "CPUWeight=5"):
        assert line in text, line
