"""`exec` into containers of every kind: user and time namespaces, the host's, joined ones, no root at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import Bundle, container
from framework.run import ROOT

pytestmark = container

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
NOBODY = 54321          # a user without a name


@pytest.fixture
def bundle() -> Iterator[Bundle]:
    """A bundle that other users can reach, unlike those in pytest's own folder."""
    folder = Path(tempfile.mkdtemp(prefix="pyhv-exec-"))
    folder.chmod(0o755)
    try:
        with Bundle(folder) as made:
            yield made
        made.gone()
    finally:
        shutil.rmtree(folder)


def begin(made: Bundle) -> int:
    done = made.create("sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert made.call("start", made.name).returncode == 0
    return made.pid()


def same_namespaces(made: Bundle, first: int) -> None:
    pid_file = made.folder / "pid"
    assert made.call("exec", "-d", "--pid-file", str(pid_file), made.name, "sleep", "1000", capture_output=False,
                     stdout=subprocess.DEVNULL).returncode == 0
    pid = int(pid_file.read_text())
    for leaf in NAMESPACES:
        assert os.readlink(f"/proc/{pid}/ns/{leaf}") == os.readlink(f"/proc/{first}/ns/{leaf}"), leaf


def inside(made: Bundle, script: str, *flags: str) -> list[str]:
    done = made.call("exec", *flags, made.name, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_user_namespace_of_its_own(bundle):
    linux = bundle.config["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 300000, "size": 65536}]
    bundle.config["root"]["readonly"] = False
    os.chown(bundle.rootfs, 300000, 300000)
    bundle.config["process"]["capabilities"] = {kind: ["CAP_SYS_ADMIN", "CAP_SETUID"]
                                                for kind in ("bounding", "effective", "permitted")}
    same_namespaces(bundle, begin(bundle))
    script = "id; read -r a b c < /proc/self/uid_map; echo $b; grep CapEff /proc/self/status"
    who, host, capabilities = inside(bundle, script)
    assert who.startswith("uid=0(root) gid=0") and host == "300000" and capabilities.endswith("0000000000200080")
    assert inside(bundle, "id", "--user", "5:6", "-g", "9")[0] == "uid=5 gid=6 groups=9"
    assert inside(bundle, "tty", "-t") == ["/dev/pts/0"]
    # a directory that is missing is made as root of the container, not as the host's
    assert inside(bundle, "stat -c %u /made", "--cwd", "/made") == ["0"]
    done = bundle.call("exec", "--user", "70000", bundle.name, "true")
    assert done.returncode == 255 and "mapping" in done.stderr


def test_a_time_namespace(bundle):
    bundle.config["linux"]["namespaces"].append({"type": "time"})
    bundle.config["linux"]["timeOffsets"] = {"boottime": {"secs": 1000000}}
    same_namespaces(bundle, begin(bundle))
    assert float(inside(bundle, "cat /proc/uptime")[0].split()[0]) > 1000000


@pytest.mark.parametrize("kind", ["pid", "network", "ipc", "uts", "cgroup"])
def test_a_namespace_of_the_hosts(bundle, kind):
    linux = bundle.config["linux"]
    linux["namespaces"] = [row for row in linux["namespaces"] if row["type"] != kind]
    if kind == "uts":
        del bundle.config["hostname"]
    first = begin(bundle)
    same_namespaces(bundle, first)
    leaf = {"network": "net"}.get(kind, kind)
    assert os.readlink(f"/proc/{first}/ns/{leaf}") == os.readlink(f"/proc/self/ns/{leaf}")


def test_namespaces_of_another_container(bundle):
    """As the containers of one pod have them."""
    first = begin(bundle)
    with tempfile.TemporaryDirectory(prefix="pyhv-exec-") as folder, Bundle(Path(folder), bundle.name + "-2") as other:
        linux = other.config["linux"]
        for row in linux["namespaces"]:
            leaf = {"network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid"}.get(row["type"])
            if leaf:
                row["path"] = f"/proc/{first}/ns/{leaf}"
        same_namespaces(other, begin(other))
        assert len(inside(other, "ls -d /proc/[0-9]*")) >= 3


def test_no_mount_namespace_but_a_root(bundle):
    bundle.config |= {"mounts": [], "root": {"path": "rootfs"}}
    del bundle.config["hostname"]
    bundle.config["linux"] = {"namespaces": [{"type": "pid"}]}
    same_namespaces(bundle, begin(bundle))
    assert inside(bundle, "ls /; pwd") == [*sorted(leaf.name for leaf in bundle.rootfs.iterdir()), "/"]


def test_as_a_user_without_rights(bundle):
    """Rootless: one user is mapped, there is no cgroup, setgroups is not allowed."""
    for folder, _, leaves in os.walk(bundle.folder):
        for leaf in [".", *leaves]:
            os.chown(os.path.join(folder, leaf), NOBODY, NOBODY, follow_symlinks=False)
    runtime = ["/usr/bin/python3", "-ISE", str(ROOT / "bin/pyhv-runtime")]
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "runtime": runtime}
    if subprocess.run(["/bin/sh", "-c", f"{runtime[0]} -V && cat {runtime[2]}"], user=NOBODY, group=NOBODY, check=False,
                      extra_groups=[], capture_output=True).returncode:
        pytest.skip("other users can't run Python, or can't read this checkout")
    (bundle.folder / "config.json").unlink(missing_ok=True)
    assert bundle.call("spec", "--rootless", **who).returncode == 0
    text = (bundle.folder / "config.json").read_text()
    (bundle.folder / "config.json").write_text(text.replace('"terminal": true', '"terminal": false').replace(
        '"sh"', '"sleep", "1000"'))
    with (bundle.folder / "errors").open("w") as errors:
        done = bundle.call("run", "-d", bundle.name, capture_output=False, stdout=subprocess.DEVNULL, stderr=errors,
                           **who)
    if done.returncode:
        text = (bundle.folder / "errors").read_text()
        assert "user" in text, text
        pytest.skip(f"no user namespaces for users here: {text}")
    try:
        script = "id -u; read -r a b c < /proc/self/uid_map; echo $b $c"
        done = bundle.call("exec", bundle.name, "sh", "-c", script, **who)
        assert done.stdout.split() == ["0", str(NOBODY), "1"], done.stderr
        assert bundle.call("exec", "-t", bundle.name, "tty", **who).stdout == "/dev/pts/0\n"
        done = bundle.call("exec", "-g", "5", bundle.name, "true", **who)
        assert done.returncode == 255 and "setgroups is not allowed" in done.stderr
        assert bundle.call("ps", "-f", "json", bundle.name, **who).stdout.count(",") == 0
        assert "sleep 1000" in bundle.call("ps", bundle.name, **who).stdout
    finally:
        assert bundle.call("delete", "--force", bundle.name, **who).returncode == 0
