"""User namespaces: ids mapped, devices bound, sources behind closed doors, idmapped mounts, and no root at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle  # a fixture

pytestmark = container

MAPS = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]


def userns(bundle: Bundle) -> None:
    bundle.config["linux"]["namespaces"].append({"type": "user"})
    bundle.config["linux"] |= {"uidMappings": MAPS, "gidMappings": MAPS}
    for folder, _, files in os.walk(bundle.rootfs):
        for leaf in (".", *files):
            os.lchown(os.path.join(folder, leaf), 100_000, 100_000)


def test_ids_and_devices(bundle: Bundle) -> None:
    userns(bundle)
    out = bundle.shell("id -u; id -g; cat /proc/self/uid_map; echo x >/dev/null; head -c 2 /dev/zero | od -An -tx1; "
                       "stat -c %u /bin; stat -c %t:%T /dev/null; ls /sys/fs/cgroup | head -1; cat /proc/keys")
    assert out.split()[:6] == ["0", "0", "0", "100000", "65536", "00"]
    assert "1:3" in out


def test_a_user_inside(bundle: Bundle) -> None:
    userns(bundle)
    bundle.config["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [7]}
    bundle.create("sleep", "1000")
    status = dict(line.split(":\t") for line in Path(f"/proc/{bundle.pid()}/status").read_text().splitlines()
                  if line.startswith(("Uid", "Gid", "Groups")))
    assert status["Uid"].split() == ["101000"] * 4 and status["Gid"].split() == ["101000"] * 4
    assert "100007" in status["Groups"].split()


def test_an_id_without_a_mapping(bundle: Bundle) -> None:
    userns(bundle)
    bundle.config["process"]["user"] = {"uid": 70_000, "gid": 0}
    done = bundle.run("true")
    assert done.returncode == 1 and "process.user" in done.stderr and "Traceback" not in done.stderr


def test_a_root_and_a_source_that_root_inside_cannot_reach(bundle: Bundle) -> None:
    """The runtime opens for it what lies behind a folder closed to others."""
    userns(bundle)
    closed = bundle.folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_text("content\n")
    bundle.rootfs.rename(closed / "rootfs")
    bundle.config["root"] = {"path": "closed/rootfs"}
    bundle.config["mounts"].append({"destination": "/etc/file", "type": "bind", "source": str(closed / "file"),
                                    "options": ["bind", "ro"]})
    assert bundle.shell("cat /etc/file") == "content\n"
    (closed / "rootfs").rename(bundle.rootfs)


def test_a_link_on_the_way_is_not_followed_outside(bundle: Bundle) -> None:
    userns(bundle)
    (bundle.rootfs / "victim").symlink_to("/etc")
    bundle.config["mounts"].append({"destination": "/victim/x", "type": "tmpfs", "source": "tmpfs"})
    assert bundle.run("true").returncode in (0, 1)
    assert not Path("/etc/x").exists()


@pytest.mark.parametrize("options", [["bind"], ["rbind"], ["bind", "idmap"], ["rbind", "ridmap"]])
def test_idmapped_mounts(bundle: Bundle, options: list[str]) -> None:
    userns(bundle)
    place = bundle.folder / "volume"
    place.mkdir()
    (place / "file").touch()
    maps: dict[str, Any] = {} if any(word.endswith("idmap") for word in options) else {
        "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 1000}],
        "gidMappings": [{"containerID": 0, "hostID": 100_000, "size": 1000}]}
    bundle.config["mounts"].append({"destination": "/tmp", "type": "bind", "source": str(place), "options": options,
                                    **maps})
    done = bundle.run("sh", "-c", "stat -c %u /tmp/file; touch /tmp/new; stat -c %u /tmp/new")
    if done.returncode and "may not support idmapped" in done.stderr:
        pytest.skip(f"the file system of {place} can't be idmapped")
    # root's file on the disk is root's inside, and what root inside makes is root's on the disk
    assert done.stdout == "0\n0\n", done.stderr
    assert (place / "new").stat().st_uid == 0


def test_maps_that_are_refused(bundle: Bundle) -> None:
    userns(bundle)
    bundle.config["linux"]["uidMappings"] = MAPS * 2
    done = bundle.run("true")
    assert done.returncode == 1 and "uidMappings" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_without_root(tmp_path: Path) -> None:
    """An unprivileged user, a user namespace that maps that user alone, no cgroup of its own."""
    place = Path("/var/tmp") / f"pyhv-rootless-{os.getpid()}"
    place.mkdir(mode=0o755)
    try:
        made = Bundle(place)
        for folder, _, files in os.walk(place):
            for leaf in (".", *files):
                os.lchown(os.path.join(folder, leaf), 1234, 1234)
        user = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", "--inh-caps=-all"]
        environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(place)}
        python = "/usr/bin/python3"     # the tests' own may lie where this user can't go
        checkout = place / "checkout"
        for name in ("hv", "bin"):
            shutil.copytree(Path(RUNTIME[-1]).parents[1] / name, checkout / name,
                            ignore=shutil.ignore_patterns("__pycache__"))
        command = [*user, python, "-ISE", str(checkout / "bin/pyhv-runtime")]
        done = subprocess.run([*command, "spec", "--rootless", "-b", str(place)], env=environment, capture_output=True,
                              text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        import json

        config = json.loads((place / "config.json").read_text())
        script = "id -u; hostname; cat /proc/self/uid_map; exit 5"
        config["process"] |= {"terminal": False, "args": ["sh", "-c", script]}
        (place / "config.json").write_text(json.dumps(config))
        done = subprocess.run([*command, "run", "-b", str(place), "rootless"], env=environment, capture_output=True,
                              text=True, timeout=20)
        assert (done.returncode, done.stdout.split()) == (5, ["0", "pyhv", "0", "1234", "1"]), done.stderr
        done = subprocess.run([*command, "list", "-q"], env=environment, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert made.name
    finally:
        shutil.rmtree(place)
