"""The same bundles under pyhv-runtime, runc and crun: a program inside must see the same container.

guests/container/probe.c says what it sees; cgroup files are read from the host. What differs, and may, stands in
REWRITES and KNOWN with its reason; anything else fails.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from framework.bundle import Bundle, container
from framework.differential import build, differences, outside, peers, probe, remove

from hv.container.cgroups.folder import Folder
from hv.container.runtime import CreateOptions, Runtime
from hv.linux.creds import CAPABILITIES

PEERS = peers()
pytestmark = [*container, pytest.mark.skipif(not PEERS, reason="neither runc nor crun is installed"),
              pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed: it builds the probe")]

# (pattern, replacement, reason): on both sides
REWRITES = [
    (r"^fd 0 (p pipe:|c /dev/null) .*", "fd 0", "runc copies standard input through a pipe"),
    (r"^(mount .* options ro\S* (?:\S+ )*- (?:sysfs|tmpfs|proc|mqueue) \S+ .*?)\br[ow]\b", r"\1",
     "a read-only mount: whether its file system is so too can't be told without changing the mount"),
    (r"^(mount /\S+ .* - cgroup) \S+", r"\1", "the source of a cgroup mount is a mere name"),
    (r"^(mount /(?:proc|sys|masked)/\S+ .* - tmpfs tmpfs .*?),?size=0k", r"\1",
     "crun's mask is an empty folder of no size"),
    (r"^(mount .* - tmpfs \S+ .*?)mode=1?755,?", r"\1", "said or not, it is the mode; which one is compared elsewhere"),
]
# peer -> (pattern of a difference, reason)
TMPFS_MODE = (r"^. (mnt|path) /mnt/three[ /]", "runc 1.1.5 forgets the mode where the folder is there already")
CGROUP_ROOT = (r"^. (mount|path) /sys/fs/cgroup |^. try a folder in /sys/fs/cgroup",
               "the folder of the version 1 hierarchies: ours is read-only where the mount says so, theirs isn't")
KNOWN = {
    "runc": [CGROUP_ROOT, TMPFS_MODE,
             (r"^. dev /dev/mqueue d1777 0:(0|65534)$", "under runc its group is one from outside")],
    "crun": [CGROUP_ROOT,
             (r"^. keyring ", "crun names the session keyring after the container, runc and ours _ses.ID"),
             (r"^- dev /dev/core l0777 0:0 -> /proc/kcore$", "crun's own; config-linux.md has no such link"),
             (r"^. dev /dev/null c0666 \d+:\d+ 1:3$", "crun gives standard input to the user, be it the null device"),
             (r"^. mount /dev/(null|zero|full|random|urandom|tty|console) root /\w+ options ",
              "crun binds nodes with flags of its own, and does not hide where they lie"),
             (r"^. mnt /mnt/(alone|away|four|shared) d(0755|1777) ",
              "a tmpfs without a mode: ours and runc's has that of the image's folder"),
             (r"^. mount /mnt/(alone|shared) ", "crun forgets the propagation of a tmpfs"),
             (r"^~ mount ", "crun has an order of its own for paths that don't lie in one another"),
             (r"^. cgroup 0::", "crun runs where version 2 is not mounted"),
             (r"^. try open tun ", "crun has no rule for tun; runc and ours have"),
             (r"^- mount \S+ root /null options ro|^\+ mount \S+ root \S*/null options rw",
              "crun masks a file with the host's null device, read-only; runc and ours with the container's")],
}

Change = Callable[[Bundle], None]
VARIANTS: dict[str, Change] = {}
WITHOUT: dict[str, dict[str, str]] = {}       # variant -> peer -> why it is left out


def variant(**without: str) -> Callable[[Change], Change]:
    def add(function: Change) -> Change:
        VARIANTS[function.__name__] = function
        WITHOUT[function.__name__] = without
        return function
    return add


def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


@variant()
def as_spec_writes_it(bundle: Bundle) -> None:
    pass


@variant()
def few_namespaces(bundle: Bundle) -> None:
    bundle.config["linux"]["namespaces"] = [{"type": "mount"}, {"type": "pid"}]
    bundle.config.pop("hostname")


@variant()
def no_cgroup_namespace(bundle: Bundle) -> None:
    rows = bundle.config["linux"]["namespaces"]
    bundle.config["linux"]["namespaces"] = [row for row in rows if row["type"] != "cgroup"]
    bundle.config["linux"]["cgroupsPath"] = f"/{bundle.name}"


@variant()
def somebody(bundle: Bundle) -> None:
    """A user without rights, groups, umask, ambient capabilities, a folder of work that is not there."""
    bundle.config["process"] |= {
        "user": {"uid": 1000, "gid": 1000, "additionalGids": [7, 8, 9], "umask": 0o077}, "cwd": "/made/for/it",
        "env": ["PATH=/bin", "EMPTY=", "TWICE=1", "TWICE=2", "SPACE=a b"], "noNewPrivileges": False}
    capabilities = bundle.config["process"]["capabilities"]
    capabilities |= {"bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"], "permitted": ["CAP_KILL", "CAP_NET_RAW"],
                     "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL", "CAP_NET_RAW"], "ambient": ["CAP_KILL"]}
    bundle.config["root"]["readonly"] = False


@variant()
def no_capabilities(bundle: Bundle) -> None:
    bundle.config["process"]["capabilities"] = {}


@variant()
def limits(bundle: Bundle) -> None:
    rows = [("NOFILE", 64, 128), ("CORE", 0, 0), ("NPROC", 100, 200), ("STACK", 4 << 20, 8 << 20), ("CPU", 10, 20),
            ("FSIZE", 1 << 20, 1 << 20), ("MEMLOCK", 4096, 4096), ("AS", 1 << 30, 1 << 31)]
    bundle.config["process"]["rlimits"] = [{"type": f"RLIMIT_{name}", "soft": soft, "hard": hard}
                                           for name, soft, hard in rows]
    bundle.config["process"]["oomScoreAdj"] = 500


@variant()
def user_namespace(bundle: Bundle) -> None:
    bundle.config["linux"]["namespaces"].append({"type": "user"})
    for name in ("uidMappings", "gidMappings"):
        bundle.config["linux"][name] = [{"containerID": 0, "hostID": 100000, "size": 2000},
                                        {"containerID": 5000, "hostID": 200000, "size": 10}]


@variant()
def writable_and_bare(bundle: Bundle) -> None:
    """Nothing masked, the root writable, all capabilities that the host has: what engines call privileged."""
    bounding = int(Path("/proc/self/status").read_text().split("CapBnd:\t")[1].split()[0], 16)
    names = [name for number, name in enumerate(CAPABILITIES) if bounding >> number & 1]
    bundle.config["process"] |= {"noNewPrivileges": False,
                                 "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names)}
    bundle.config["root"]["readonly"] = False
    bundle.config["linux"] |= {"maskedPaths": [], "readonlyPaths": [],
                               "resources": {"devices": [{"allow": True, "access": "rwm"}]}}
    for row in bundle.config["mounts"]:
        row["options"] = [word for word in row.get("options", []) if word != "ro"]


@variant()
def paths_of_its_own(bundle: Bundle) -> None:
    for kind in ("masked", "readonly"):
        (bundle.rootfs / kind / "folder").mkdir(parents=True)
        (bundle.rootfs / kind / "folder" / "inside").write_text("inside")
        (bundle.rootfs / kind / "file").write_text("content")
    bundle.config["root"]["readonly"] = False
    bundle.config["linux"] |= {"maskedPaths": ["/masked/file", "/masked/folder", "/absent"],
                               "readonlyPaths": ["/readonly/file", "/readonly/folder", "/absent"]}


@variant()
def mounts_of_all_kinds(bundle: Bundle) -> None:
    source = bundle.folder / "source"
    (source / "below").mkdir(parents=True)
    (source / "file").write_text("content")
    (bundle.rootfs / "kept").mkdir()
    (bundle.rootfs / "kept" / "file").write_text("kept")
    (bundle.rootfs / "link").symlink_to("/kept")
    (bundle.rootfs / "away").symlink_to("../../../../mnt/away")
    bundle.config["root"]["readonly"] = False
    bundle.config["mounts"] += [
        mount("/mnt/one", "bind", str(source), "bind", "ro", "nosuid", "nodev", "noexec"),
        mount("/mnt/two", "none", str(source), "rbind", "rw", "noatime"),
        mount("/mnt/file", "bind", str(source / "file"), "bind", "ro"),
        mount("/tmp", "tmpfs", "tmpfs"),
        mount("/mnt/three", "tmpfs", "named", "size=1m", "mode=0750", "uid=5", "gid=6", "nosuid", "nr_inodes=100"),
        mount("/mnt/four", "tmpfs", "tmpfs", "ro", "noatime", "nodiratime"),
        mount("/link/under", "bind", str(source), "bind", "nosuid"),
        mount("/away", "tmpfs", "tmpfs", "size=64k"),
        mount("/mnt/deep/er", "bind", str(source / "below"), "bind", "private", "strictatime"),
        mount("/mnt/shared", "tmpfs", "tmpfs", "shared"), mount("/mnt/slave", "bind", str(source), "rbind", "rslave"),
        mount("/mnt/alone", "tmpfs", "tmpfs", "unbindable")]


@variant()
def copied_up(bundle: Bundle) -> None:
    (bundle.rootfs / "mnt" / "three").mkdir()
    (bundle.rootfs / "mnt" / "three" / "file").write_text("of the image")
    (bundle.rootfs / "mnt" / "three" / "file").chmod(0o640)
    bundle.config["mounts"].append(mount("/mnt/three", "tmpfs", "tmpfs", "tmpcopyup", "mode=0711"))


@variant(runc="before 1.1 it has no recursive flags, and this one's version is not asked")
def read_only_all_the_way_down(bundle: Bundle) -> None:
    source = bundle.folder / "source"
    source.mkdir()
    bundle.config["mounts"].append(mount("/mnt/one", "bind", str(source), "rbind", "rro", "rnosuid"))


@variant()
def devices(bundle: Bundle) -> None:
    bundle.config["linux"]["devices"] = [
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/below/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o600},
        {"path": "/dev/block", "type": "b", "major": 7, "minor": 0, "fileMode": 0o660, "uid": 0, "gid": 6},
        {"path": "/dev/fifo", "type": "p", "fileMode": 0o622, "uid": 0, "gid": 0},
        {"path": "/dev/full", "type": "c", "major": 1, "minor": 7, "fileMode": 0o600, "uid": 3, "gid": 4}]
    bundle.config["linux"]["resources"]["devices"] += [
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
        {"allow": True, "type": "b", "major": 7, "minor": 0, "access": "r"}]
    kinds = bundle.config["process"]["capabilities"]
    for kind in ("bounding", "effective", "permitted"):
        kinds[kind] = [*kinds[kind], "CAP_MKNOD"]


@variant()
def names_and_sysctls(bundle: Bundle) -> None:
    bundle.config["hostname"] = "elsewhere"
    bundle.config["linux"]["sysctl"] = {
        "net.ipv4.ip_forward": "1", "net.ipv4.ping_group_range": "0 100", "kernel.shmmax": "65536",
        "kernel.msgmax": "4096", "fs.mqueue.msg_max": "20", "kernel.sem": "100 200 30 40",
        "net.ipv4.ip_unprivileged_port_start": "80"}


@variant()
def filtered(bundle: Bundle) -> None:
    bundle.config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": [
            {"names": ["keyctl", "bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["ptrace", "getcpu", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
             "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97,
             "args": [{"index": 0, "value": 17, "op": "SCMP_CMP_GE"}]},
            {"names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
             "args": [{"index": 0, "value": 0x10000000, "valueTwo": 0x10000000, "op": "SCMP_CMP_MASKED_EQ"}]}]}
    bundle.config["process"]["noNewPrivileges"] = False


@variant()
def joined_namespaces(bundle: Bundle) -> None:
    """Network, ipc and uts of a process that is there."""
    for row in bundle.config["linux"]["namespaces"]:
        if row["type"] in ("network", "ipc", "uts"):
            row["path"] = f"/proc/{bundle.other}/ns/{'net' if row['type'] == 'network' else row['type']}"
    bundle.config.pop("hostname")


@variant()
def propagation(bundle: Bundle) -> None:
    bundle.config["linux"]["rootfsPropagation"] = "rslave"


@variant()
def no_dev(bundle: Bundle) -> None:
    """No file system of its own on /dev: the image's is left as it is."""
    rows = bundle.config["mounts"]
    bundle.config["mounts"] = [row for row in rows if not row["destination"].startswith("/dev")]
    (bundle.rootfs / "dev" / "of-the-image").write_text("")
    bundle.config["root"]["readonly"] = False


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def probed(program: Path) -> Iterator[Bundle]:
    """A bundle with the probe in it, and a process with namespaces of its own beside it."""
    folder = Path(tempfile.mkdtemp(prefix="pyhv-d-"))
    folder.chmod(0o755)                             # runc looks at it from inside the user namespace
    bundle = Bundle(folder)
    shutil.copy(program, bundle.rootfs / "probe")
    (bundle.rootfs / "mnt").mkdir()
    bundle.config["ociVersion"] = "1.0.2"           # crun takes no newer one
    bundle.config["linux"]["cgroupsPath"] = f"/{bundle.name}"
    script = "hostname joined; echo; exec sleep 99"
    with subprocess.Popen(["unshare", "--net", "--ipc", "--uts", "sh", "-c", script], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        bundle.other = other.pid
        yield bundle
        other.kill()
    for runtime in ("pyhv-runtime", *PEERS):
        remove(bundle, runtime)
    mounts = Path("/proc/self/mounts").read_text()
    if str(folder) not in mounts:
        shutil.rmtree(folder)
    assert str(folder) not in mounts
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{bundle.name}"))


def rewritten(lines: list[str]) -> list[str]:
    for pattern, replacement, _ in REWRITES:
        lines = [re.sub(pattern, replacement, line) for line in lines]
    # each mounts the hierarchies of cgroups, and binds nodes to /dev, in an order of its own
    some = [line for line in lines if re.match("mount (/sys/fs/cgroup|/dev)/", line)]
    return [line for line in lines if line not in some] + sorted(some)


def unexplained(found: list[str], peer: str) -> list[str]:
    return [line for line in found if not any(re.search(pattern, line) for pattern, _ in KNOWN[peer])]


def told(found: dict[str, list[str]]) -> str:
    return "\n".join(line for peer, lines in found.items() for line in (f"beside {peer}:", *lines))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_program_sees_the_same(probed: Bundle, name: str) -> None:
    VARIANTS[name](probed)
    ours = rewritten(probe(probed, "pyhv-runtime"))
    assert len(ours) > 100
    found = {peer: unexplained(differences(ours, rewritten(probe(probed, peer))), peer)
             for peer in PEERS if peer not in WITHOUT[name]}
    assert not any(found.values()), told(found)


def test_a_program_on_a_terminal_sees_the_same(probed: Bundle) -> None:
    probed.config["process"] |= {"terminal": True, "consoleSize": {"height": 30, "width": 100}}
    ours = rewritten(probe(probed, "pyhv-runtime", terminal=(30, 100)))
    assert any(line.startswith("terminal controlling yes") for line in ours)
    found = {peer: unexplained(differences(ours, rewritten(probe(probed, peer, terminal=(30, 100)))), peer)
             for peer in PEERS}
    assert not any(found.values()), told(found)


FILES = ("memory/memory.limit_in_bytes", "memory/memory.soft_limit_in_bytes", "memory/memory.memsw.limit_in_bytes",
         "memory/memory.swappiness", "memory/memory.oom_control", "cpu/cpu.shares", "cpu/cpu.cfs_quota_us",
         "cpu/cpu.cfs_period_us", "cpuset/cpuset.cpus", "cpuset/cpuset.mems", "pids/pids.max", "devices/devices.list",
         "blkio/blkio.throttle.read_bps_device", "blkio/blkio.throttle.write_iops_device", "freezer/freezer.state")


@pytest.mark.skipif(not os.path.isdir("/sys/fs/cgroup/memory"), reason="cgroups of version 1 are not mounted here")
@pytest.mark.parametrize("limited", [False, True])
def test_the_cgroup_is_the_same(probed: Bundle, limited: bool) -> None:
    if limited:
        disk = os.stat("/").st_dev
        throttle = {"major": os.major(disk), "minor": os.minor(disk), "rate": 1 << 20}
        probed.config["linux"]["resources"] = {
            "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 80 << 20, "swappiness": 30,
                       "disableOOMKiller": True},
            "cpu": {"shares": 512, "quota": 20000, "period": 50000, "cpus": "0", "mems": "0"}, "pids": {"limit": 17},
            "blockIO": {"throttleReadBpsDevice": [throttle], "throttleWriteIOPSDevice": [throttle | {"rate": 100}]},
            "devices": [{"allow": False, "access": "rwm"},
                        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                        {"allow": True, "type": "b", "major": 7, "access": "r"}]}
    ours = outside(probed, "pyhv-runtime", FILES)
    assert ("memory/memory.limit_in_bytes 67108864" in ours) == limited and "pids/pids.max absent" not in ours
    for peer in PEERS:
        theirs = outside(probed, peer, FILES)
        # each runtime has its own idea of the nodes that a container may always use
        known = r"devices.list c (10:200|5:1) "
        found = [line for line in differences(ours, theirs) if not re.search(known, line)]
        assert not found, f"beside {peer}:\n" + "\n".join(found)


def test_nodes_are_made_once_the_device_rules_are_whole(probed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rules would refuse mknod: the first process waits for all."""
    write_lines = Folder.write_lines

    def slowly(folder: Folder, leaf: str, *rest: object) -> None:
        if leaf == "devices.allow":
            time.sleep(0.2)
        write_lines(folder, leaf, *rest)

    monkeypatch.setattr(Folder, "write_lines", slowly)
    rows = probed.config["mounts"]          # without cgroups, for whose mount it waits as well
    probed.config["mounts"] = [row for row in rows if row["destination"] in ("/proc", "/dev")]
    probed.write()
    runtime = Runtime(str(probed.state / "pyhv-runtime"))
    runtime.create(probed.name, str(probed.folder), CreateOptions())
    try:
        node = os.stat(f"/proc/{runtime.state(probed.name)['pid']}/root/dev/null")
        assert stat.S_ISCHR(node.st_mode) and node.st_rdev == os.makedev(1, 3)
    finally:
        runtime.delete(probed.name, force=True)
