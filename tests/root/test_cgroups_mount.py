"""Mounts of type cgroup: what a container sees, with a cgroup namespace and without, in all kinds of host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from framework.bundle import needs_root
from framework.groups import Groups, leftovers

from hv.container.cgroups.detect import detect

LAYOUT = detect()
pytestmark = [needs_root, pytest.mark.skipif(not LAYOUT.v1 or not LAYOUT.v2, reason="not a hybrid host")]
ROOT = str(Path(__file__).resolve().parents[2])

# Runs in a mount namespace of its own, in the group whose paths it is given; prints what is at ROOT/sys/fs/cgroup.
PROBE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from hv.container.cgroups.detect import Layout, parse_mounts
from hv.container.cgroups.manager import from_paths
from hv.container.cgroups import manager
from hv.container.mounts import Options
from hv.linux import ns
from hv.linux.hands import Own
from hv.linux.mount import PROPAGATION, set_propagation
order = json.loads(sys.argv[2])
sys.stdin.readline()
os.makedirs(order["root"] + "/sys/fs", exist_ok=True)
ns.unshare(ns.CLONE_NEWNS)
set_propagation("/", PROPAGATION["private"], recursive=True)
group = from_paths(order["paths"])
layout = group._layout()
if "layout" in order:
    for name, value in order["layout"].items():
        setattr(layout, name, value)
if order["namespace"]:
    ns.unshare(ns.CLONE_NEWCGROUP)
root = os.open(order["root"], os.O_PATH)
try:
    group.mount(Own(), root, {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"},
                Options(order["options"], "mounts[0]"))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    sys.exit()
place = order["root"] + "/sys/fs/cgroup"
found = {"mounts": {}, "leaves": {}, "links": {}}
for line in open("/proc/self/mountinfo"):
    words = line.split()
    if words[4].startswith(place):
        kind = words[words.index("-") + 1]
        found["mounts"][words[4][len(place):]] = [kind, words[5].split(","), words[3]]
for name in os.listdir(place) if os.path.isdir(place) else []:     # elsewhere, if a link in the image led there
    if os.path.islink(place + "/" + name):
        found["links"][name] = os.readlink(place + "/" + name)
    elif os.path.isdir(place + "/" + name):
        path = place + "/" + name + "/cgroup.procs"
        found["leaves"][name] = open(path).read().split() if os.path.exists(path) else []
try:
    os.mkdir(place + "/pids/inner" if order["options"] != ["v2"] else place + "/inner")
    found["writable"] = True
except OSError:
    found["writable"] = False
found["top writable"] = os.access(place, os.W_OK) and not os.statvfs(place).f_flag & os.ST_RDONLY
found["fds"] = len(os.listdir("/proc/self/fd"))
found["pid"] = os.getpid()
print(json.dumps(found))
"""


@pytest.fixture
def groups():
    made = Groups()
    yield made
    made.close()
    assert leftovers() == []


def probe(groups, folder, *, namespace, options=("nosuid", "noexec", "nodev", "relatime", "ro"), **order):
    group = groups.make()
    order |= {"root": str(folder), "paths": group.paths, "namespace": namespace, "options": list(options)}
    process = subprocess.Popen([sys.executable, "-Ic", PROBE, ROOT, json.dumps(order)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    group.add(process.pid)
    out, err = process.communicate("go\n", timeout=30)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize("namespace", [True, False])
def test_each_hierarchy_shows_the_container_alone(groups, tmp_path, namespace):
    found = probe(groups, tmp_path, namespace=namespace)
    leaves = {point.rpartition("/")[2] for point in LAYOUT.v1.values()}
    assert set(found["leaves"]) == leaves and found["links"] == {}
    assert all(pids == [str(found["pid"])] for pids in found["leaves"].values())
    assert set(found["mounts"]) == {""} | {f"/{leaf}" for leaf in leaves}
    for place, (kind, options, root) in found["mounts"].items():
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(options), place
        assert kind == ("cgroup" if place else "tmpfs")
        assert root == ("/" if not place or namespace else f"{groups.base}/box")
    assert not found["writable"] and not found["top writable"]


def test_read_write_when_asked_for(groups, tmp_path):
    found = probe(groups, tmp_path, namespace=True, options=["rw"])
    assert found["writable"] and found["top writable"]
    assert {"rw", "nosuid", "nodev", "noexec"} <= set(found["mounts"]["/pids"][1])


def test_no_descriptors_are_left(groups, tmp_path):
    (tmp_path / "b").mkdir()
    bare = probe(groups, tmp_path, namespace=True, options=["rw"])["fds"]
    assert bare <= 6        # standard streams, the root, the listing itself


def test_controllers_that_share_a_hierarchy_are_links(groups, tmp_path):
    both = {**LAYOUT.v1, "cpuacct": LAYOUT.v1["cpu"]}
    found = probe(groups, tmp_path, namespace=False, layout={"v1": both})
    assert found["links"] == {"cpuacct": "cpu"} and "cpuacct" not in found["leaves"]


def test_version_2_alone_is_one_mount(groups, tmp_path):
    found = probe(groups, tmp_path, namespace=True, options=["rw"], layout={"v1": {}})
    assert list(found["mounts"]) == [""]
    kind, options, _ = found["mounts"][""]
    assert kind == "cgroup2" and {"rw", "nosuid", "nodev", "noexec"} <= set(options)


def test_a_link_in_the_image_leads_nowhere_else(groups, tmp_path):
    (tmp_path / "image/sys").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "image/sys/fs").symlink_to(tmp_path / "outside")
    found = probe(groups, tmp_path / "image", namespace=True)
    assert list((tmp_path / "outside").iterdir()) == []
    assert "error" in found or found["mounts"] == {}


def test_a_host_without_cgroups_says_so(groups, tmp_path):
    found = probe(groups, tmp_path, namespace=True, layout={"v1": {}, "v2": ""})
    assert found == {"error": "HvError: mounts[0]: this host has no cgroups mounted"}


