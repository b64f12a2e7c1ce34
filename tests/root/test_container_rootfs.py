"""The root file system: what is there, what is hidden, and that nothing of the image's making leads out of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle  # a fixture

pytestmark = container


def test_the_old_root_is_gone(bundle: Bundle) -> None:
    out = bundle.shell("cat /proc/self/mountinfo; echo ---; ls /")
    table, listing = out.split("---\n")
    assert str(bundle.folder) not in table.replace(f"{bundle.folder}/rootfs / ", "")
    assert set(listing.split()) == {"bin", "etc", "proc", "sys", "dev", "tmp", "root"}
    assert len([line for line in table.splitlines() if line.split()[4] == "/"]) == 1


def test_devices(bundle: Bundle) -> None:
    out = bundle.shell("cd /dev; stat -c '%n %F %a %t:%T' null zero full random urandom tty; "
                       "for l in fd stdin stdout stderr ptmx; do readlink $l; done; echo x >null; "
                       "head -c 3 zero | od -An -tx1")
    expected = [f"{name} character special file 666 {major}:{minor}" for name, major, minor in (
        ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))]
    lines = out.splitlines()
    assert lines[:6] == expected
    assert lines[6:11] == ["/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", "pts/ptmx"]
    assert lines[11].split() == ["00"] * 3


def test_devices_of_the_configuration(bundle: Bundle) -> None:
    bundle.config["linux"]["devices"] = [
        {"type": "c", "path": "/dev/mine", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 7, "gid": 8},
        {"type": "p", "path": "/dev/pipe"}, {"type": "b", "path": "/dev/deep/er/disk", "major": 7, "minor": 200}]
    out = bundle.shell("stat -c '%F %a %u:%g %t:%T' /dev/mine /dev/pipe /dev/deep/er/disk")
    assert out.splitlines() == ["character special file 640 7:8 1:3", "fifo 666 0:0 0:0",
                                "block special file 666 0:0 7:c8"]


def test_masked_and_readonly_paths(bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    secret = bundle.rootfs / "etc/secret"
    secret.write_text("secret")
    (bundle.rootfs / "etc/folder").mkdir()
    (bundle.rootfs / "etc/folder/file").write_text("secret")
    (bundle.rootfs / "etc/kept").write_text("kept\n")
    bundle.config["linux"]["maskedPaths"] += ["/etc/secret", "/etc/folder", "/etc/missing"]
    bundle.config["linux"]["readonlyPaths"] += ["/etc/kept", "/etc/missing"]
    out = bundle.shell("cat /etc/secret; ls -A /etc/folder; cat /etc/kept; (echo x >/etc/kept) 2>&1; "
                       "(echo x >/etc/folder/x) 2>&1; "
                       "(echo 1 >/proc/sys/kernel/panic) 2>&1; echo fine >/etc/other; cat /etc/other")
    assert out.splitlines()[0] == "kept" and out.splitlines()[-1] == "fine"
    assert out.count("Read-only file system") == 3


def test_readonly_root_and_writable_mounts(bundle: Bundle) -> None:
    out = bundle.shell("(echo x >/tmp/x) 2>&1; echo ok >/dev/shm/x; cat /dev/shm/x")
    assert "Read-only file system" in out and out.endswith("ok\n")
    assert not (bundle.rootfs / "tmp/x").exists()


@pytest.mark.parametrize("link", ["/outside", "../../../../../../outside", "/proc/self/root/outside"])
def test_a_link_as_mount_target_stays_inside(bundle: Bundle, link: str) -> None:
    """CVE-2021-30465, CVE-2019-19921 and their kin."""
    outside = Path("/outside")
    assert not outside.exists()
    (bundle.rootfs / "victim").symlink_to(link)
    bundle.config["mounts"].append({"destination": "/victim/x", "type": "tmpfs", "source": "tmpfs"})
    done = bundle.run("sh", "-c", "cat /proc/self/mountinfo")
    assert not outside.exists()
    if done.returncode == 0:
        assert re.search(r" (/outside/x|/victim/x) ", done.stdout)


@pytest.mark.parametrize("target", ["null", "fd", "ptmx", "console"])
def test_a_prepared_dev_is_harmless(bundle: Bundle, target: str) -> None:
    """The image has links in its own /dev, and no tmpfs is mounted over it (CVE-2025-31133, CVE-2025-52565)."""
    bundle.config["mounts"] = [row for row in bundle.config["mounts"] if not row["destination"].startswith("/dev")]
    bundle.config["root"]["readonly"] = False
    (bundle.rootfs / "dev" / target).symlink_to("/etc/passwd")
    done = bundle.run("sh", "-c", "cat /proc/keys /proc/timer_list; ls -l /dev")
    if target == "null":
        assert done.returncode == 1 and "something else is there" in done.stderr
    else:
        assert done.returncode == 0 and "root:x:0" not in done.stdout


def test_a_prepared_null_does_not_unmask(bundle: Bundle) -> None:
    """With the host's /dev bound over, the image's own null is not what covers."""
    bundle.config["mounts"] = [row for row in bundle.config["mounts"] if not row["destination"].startswith("/dev")]
    bundle.config["mounts"].append({"destination": "/dev", "source": str(bundle.folder / "fakedev"),
                                    "options": ["rbind", "ro"]})
    (bundle.folder / "fakedev").mkdir()
    (bundle.folder / "fakedev/null").symlink_to("/etc/passwd")
    assert "root:x:0" not in bundle.shell("cat /proc/keys")


def test_cwd(bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    bundle.config["process"]["cwd"] = "/made/for/me"
    assert bundle.shell("pwd; stat -c %a .") == "/made/for/me\n755\n"


@pytest.mark.parametrize("cwd", ["/proc/self/fd/3", "/proc/self/fd/7", "/proc/1/root", "/proc/self/cwd"])
def test_a_cwd_outside(bundle: Bundle, cwd: str) -> None:
    """CVE-2024-21626: a descriptor of a host's directory as the program's directory."""
    bundle.config["process"]["cwd"] = cwd
    done = bundle.run("sh", "-c", "pwd; ls ../../../../..")
    assert done.returncode == 1 and "process.cwd" in done.stderr and not done.stdout


def test_no_pivot(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["ls", "/"]
    bundle.write()
    done = bundle.call("run", "--no-pivot", bundle.name)
    assert done.returncode == 0 and "bin" in done.stdout.split() and "usr" not in done.stdout.split(), done.stderr


def test_without_a_mount_namespace(bundle: Bundle) -> None:
    linux = bundle.config["linux"]
    linux["namespaces"] = [{"type": "pid"}]
    linux["maskedPaths"] = linux["readonlyPaths"] = []
    bundle.config |= {"mounts": [], "hostname": ""}
    bundle.config["root"]["readonly"] = False
    assert bundle.shell("ls /; pwd").split() == ["bin", "dev", "etc", "proc", "root", "sys", "tmp", "/"]


@pytest.mark.parametrize("kind", ["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable"])
def test_propagation(bundle: Bundle, kind: str) -> None:
    bundle.config["linux"]["rootfsPropagation"] = kind
    before = Path("/proc/self/mountinfo").read_text()
    line = next(line for line in bundle.shell("cat /proc/self/mountinfo").splitlines() if line.split()[4] == "/")
    tags = line.split(" - ")[0].split()[6:]
    wanted = kind.removeprefix("r")
    assert any(tag.startswith("shared:") for tag in tags) == (wanted == "shared")
    assert ("unbindable" in tags) == (wanted == "unbindable")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.getpid()
