"""Mounts: each option seen from inside, beside runc; targets made; what must not be is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle  # a fixture

pytestmark = container

needs_runc = pytest.mark.skipif(shutil.which("runc") is None, reason="runc is not installed")


def mount(bundle: Bundle, destination: str, kind: str = "bind", *options: str, source: Any = "", **more: Any) -> None:
    bundle.config["mounts"].append({"destination": destination, "type": kind, "source": str(source or kind),
                                    "options": list(options), **more})


def source(bundle: Bundle) -> Path:
    """A folder with a mount below it, to be bound."""
    place = bundle.folder / "source"
    (place / "below").mkdir(parents=True)
    (place / "file").write_text("content\n")
    return place


def shown(bundle: Bundle, destination: str, **options: Any) -> list[str]:
    """Flags, and the file system's kind, of the mounts at and below `destination`, without what differs by run."""
    rows = []
    for line in bundle.shell("cat /proc/self/mountinfo", **options).splitlines():
        left, right = line.split(" - ")
        words = left.split()
        if words[4].startswith(destination):
            rows.append(f"{words[4]} {words[5]} {right.split()[0]}")
    return rows


@needs_runc
@pytest.mark.parametrize("options", [
    ["bind"], ["bind", "ro"], ["rbind", "ro"], ["bind", "nosuid", "nodev", "noexec"], ["rbind", "noatime"],
    ["bind", "ro", "rw"], ["bind", "nodiratime"], ["rbind", "rprivate"]])
def test_bind_mounts_as_under_runc(bundle: Bundle, options: list[str]) -> None:
    place = source(bundle)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place / "below")], check=True)
    try:
        mount(bundle, "/new/place", "bind", *options, source=place)
        bundle.config["root"]["readonly"] = False
        mine = shown(bundle, "/new")
        assert mine and mine == shown(bundle, "/new", runtime=["runc"])
        assert len(mine) == (2 if "rbind" in options else 1)
    finally:
        subprocess.run(["umount", str(place / "below")], check=True)


@needs_runc
def test_the_default_mounts_as_under_runc(bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    (bundle.rootfs / "sys/fs").mkdir(exist_ok=True)
    mine, theirs = shown(bundle, "/"), shown(bundle, "/", runtime=["runc"])
    # the tmpfs that holds version 1 hierarchies is read-only here, as config.json asks; runc 1.1 leaves it writable
    assert [row for row in mine if "/sys/fs/cgroup tmpfs" not in row and not row.startswith("/sys/fs/cgroup ")] == [
        row for row in theirs if not row.startswith("/sys/fs/cgroup ")]


def test_a_file_over_a_file_that_is_made(bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    mount(bundle, "/deep/er/file", "bind", "bind", source=source(bundle) / "file")
    assert bundle.shell("cat /deep/er/file") == "content\n"


def test_a_relative_source_is_the_bundles(bundle: Bundle) -> None:
    source(bundle)
    mount(bundle, "/tmp", "bind", "bind", "ro", source="source")
    assert bundle.shell("cat /tmp/file") == "content\n"


def test_recursive_attributes(bundle: Bundle) -> None:
    place = source(bundle)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place / "below")], check=True)
    try:
        mount(bundle, "/tmp", "bind", "rbind", "rro", "rnosuid", source=place)
        rows = shown(bundle, "/tmp")
        assert len(rows) == 2 and all("ro" in row.split()[1].split(",") and "nosuid" in row for row in rows)
    finally:
        subprocess.run(["umount", str(place / "below")], check=True)


def test_tmpfs_with_options(bundle: Bundle) -> None:
    mount(bundle, "/tmp", "tmpfs", "nosuid", "size=64k", "mode=700", "nr_inodes=50", source="tmpfs")
    out = bundle.shell("stat -c %a /tmp; dd if=/dev/zero of=/tmp/x bs=1k count=100 2>&1; grep ' /tmp ' /proc/mounts")
    assert out.startswith("700\n") and "No space left" in out and "size=64k" in out


def test_tmpfs_has_the_mode_that_the_image_has(bundle: Bundle) -> None:
    (bundle.rootfs / "root").chmod(0o711)
    mount(bundle, "/root", "tmpfs", source="tmpfs")
    mount(bundle, "/tmp", "tmpfs", source="tmpfs")
    assert bundle.shell("stat -c %a /root /tmp") == "711\n1777\n"


def test_tmpfs_copy_up(bundle: Bundle) -> None:
    folder = bundle.rootfs / "etc/deep"
    folder.mkdir()
    (folder / "file").write_text("x" * 100_000)
    os.chown(folder / "file", 12, 34)
    (folder / "file").chmod(0o4751)
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo", 0o600)
    mount(bundle, "/etc", "tmpfs", "ro", "tmpcopyup", source="tmpfs")
    out = bundle.shell("cd /etc/deep; stat -c '%n %F %a %u:%g %s' file link fifo; readlink link; cat /etc/passwd; "
                       "(echo >/etc/x) 2>&1; true")
    lines = out.splitlines()
    # the owner is set before the mode, or the set-user-ID bit would be lost
    assert lines[0] == "file regular file 4751 12:34 100000" and lines[1].startswith("link symbolic link")
    assert lines[2].startswith("fifo fifo 600") and lines[3] == "/etc/passwd" and "somebody" in out
    assert "Read-only file system" in lines[-1]


def test_propagation_into_a_volume(bundle: Bundle) -> None:
    place = source(bundle)
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    subprocess.run(["mount", "--make-shared", str(place)], check=True)
    try:
        mount(bundle, "/tmp", "bind", "rbind", "rslave", source=place)
        bundle.create("sh", "-c", "until [ -e /tmp/below/late ]; do sleep 0.05; done; echo seen; sleep 1000")
        bundle.call("start", bundle.name)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place / "below")], check=True)
        (place / "below/late").touch()
        inside = Path(f"/proc/{bundle.pid()}/root/tmp/below/late")
        assert inside.exists()
        subprocess.run(["umount", str(place / "below")], check=True)
    finally:
        bundle.call("delete", "--force", bundle.name)
        subprocess.run(["umount", str(place)], check=True)


def test_mounts_of_the_container_stay_inside(bundle: Bundle) -> None:
    before = Path("/proc/self/mounts").read_text()
    names = ["CAP_SYS_ADMIN"]
    bundle.config["process"]["capabilities"] = {"bounding": names, "effective": names, "permitted": names}
    bundle.config["linux"]["rootfsPropagation"] = "rslave"
    out = bundle.shell("mount -t tmpfs tmpfs /tmp && echo x >/tmp/x && cat /tmp/x")
    assert out == "x\n" and Path("/proc/self/mounts").read_text() == before


@pytest.mark.parametrize(("destination", "kind", "options", "words"), [
    ("/proc", "tmpfs", [], "/proc"), ("/proc/sys", "bind", ["bind"], "/proc"), ("/x", "nosuchfs", [], "nosuchfs"),
    ("/tmp", "tmpfs", ["nonsense=1"], "nonsense"), ("/tmp", "bind", ["bind", "remount"], "remount"),
    ("/etc/passwd/x", "tmpfs", [], "/etc/passwd/x"), ("/tmp", "bind", ["bind", "idmap"], "idmap")])
def test_refused_with_the_mounts_name(bundle: Bundle, destination: str, kind: str, options: list[str],
                                      words: str) -> None:
    mount(bundle, destination, kind, *options, source="/etc" if kind == "bind" else kind)
    done = bundle.run("true")
    assert done.returncode == 1 and words in done.stderr and "mounts[" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_source(bundle: Bundle) -> None:
    mount(bundle, "/tmp", "bind", "bind", source="/nowhere/at/all")
    done = bundle.run("true")
    assert done.returncode == 1 and "/nowhere/at/all" in done.stderr and "mounts[7]" in done.stderr
