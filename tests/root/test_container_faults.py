"""What goes wrong from outside: a full disk, cgroups that can't be had, programs that can't be run, commands that come
at the wrong time. One line each, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle

pytestmark = container


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """It failed, by one line that has `words`."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("pyhv-runtime: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of four pages and few inodes."""
    place = tmp_path / "tiny"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=12", "tiny", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("filled", [0, 1, 2, 3, 4])
def test_the_state_folder_on_a_full_disk(bundle: Bundle, tiny: Path, filled: int) -> None:
    bundle.config["annotations"] = {"much": "x" * 16000}
    (tiny / "file").write_bytes(bytes(4096 * filled))
    bundle.state = tiny / "state"
    done = bundle.run("true")
    refused(done, "No space left on device")
    assert not bundle.state.exists() or not list(bundle.state.iterdir())


def test_no_inodes_left(bundle: Bundle, tiny: Path) -> None:
    for number in range(20):
        try:
            (tiny / str(number)).touch()
        except OSError:
            break
    bundle.state = tiny / "state"
    refused(bundle.run("true"), "No space left on device")


def test_a_full_disk_in_the_container(bundle: Bundle, tiny: Path) -> None:
    """Targets of mounts that can't be made: the mount is named."""
    for leaf in ("bin", "dev", "proc", "sys"):
        (tiny / leaf).mkdir()
    for number in range(20):
        try:
            (tiny / str(number)).touch()
        except OSError:
            break
    bundle.config["root"] = {"path": str(tiny)}
    bundle.config["mounts"].append({"destination": "/new/place", "type": "tmpfs", "source": "tmpfs"})
    refused(bundle.run("true"), "/new/place", "No space left on device")


@pytest.mark.parametrize("path", ["/proc", "/proc/self/ns", "/sys/kernel"])
def test_a_state_folder_that_cannot_be(bundle: Bundle, path: str) -> None:
    bundle.state = Path(path) / "pyhv"
    refused(bundle.run("true"), path, "--root")
    bundle.state = bundle.folder / "state"


def test_a_cgroup_that_cannot_be_made(bundle: Bundle) -> None:
    """A file with its name, which no cgroup file system takes away: a control file of the root."""
    bundle.config["linux"]["cgroupsPath"] = "/cgroup.procs/box"
    refused(bundle.run("true"), "cgroup.procs/box", "Not a directory")


def test_a_cgroup_whose_parent_may_have_no_more(bundle: Bundle) -> None:
    unified = Path("/sys/fs/cgroup/unified")
    if not (unified / "cgroup.procs").exists():
        unified = Path("/sys/fs/cgroup")
    above = unified / f"pyhv-full-{os.getpid()}"
    if not (unified / "cgroup.subtree_control").exists():
        pytest.skip("no cgroup version 2 on this host")
    above.mkdir()
    try:
        (above / "cgroup.max.descendants").write_text("0")
        bundle.config["linux"]["cgroupsPath"] = f"/{above.name}/box"
        refused(bundle.run("true"), "box", "Resource temporarily unavailable")
        assert not list(Path("/sys/fs/cgroup").glob(f"*/{above.name}/box"))
    finally:
        for place in Path("/sys/fs/cgroup").glob(f"*/{above.name}"):
            place.rmdir()


@pytest.mark.parametrize(("text", "words"), [
    ("#!/no/such/interpreter\n", "no such file"), ("#!\n", ""), ("#!/etc\n", ""), ("no magic at all", "exec format")])
def test_a_bad_interpreter(bundle: Bundle, text: str, words: str) -> None:
    program = bundle.rootfs / "bin" / "program"
    program.write_text(text)
    program.chmod(0o755)
    done = bundle.run("/bin/program")
    refused(done, "/bin/program")
    assert words in done.stderr.lower(), done.stderr


def test_an_interpreter_that_is_its_own(bundle: Bundle) -> None:
    program = bundle.rootfs / "bin" / "program"
    program.write_text("#!/bin/program\n")
    program.chmod(0o755)
    refused(bundle.run("/bin/program"), "/bin/program")


@pytest.mark.parametrize("destination", ["/proc/sys", "/proc/1", "/proc/../proc/self", "/proc/self/fd", "//proc//sys"])
def test_mounts_over_proc(bundle: Bundle, destination: str) -> None:
    bundle.config["mounts"].append({"destination": destination, "type": "tmpfs", "source": "tmpfs"})
    refused(bundle.run("true"), "mounts[", "/proc")


def test_a_link_to_proc_as_mount_target(bundle: Bundle) -> None:
    """The check of the name is not all: where the target leads counts (CVE-2019-16884)."""
    (bundle.rootfs / "data").symlink_to("/proc/sys")
    bundle.config["mounts"].append({"destination": "/data", "type": "tmpfs", "source": "tmpfs"})
    refused(bundle.run("true"), "/data", "/proc")


@pytest.mark.parametrize("name", ["a/b", "../up", "", ".", "..", "a b", "x" * 2000, "né", "a\nb"])
def test_names(bundle: Bundle, name: str) -> None:
    bundle.write()
    for command in ("create", "run", "start", "state", "kill", "delete", "exec"):
        words = (command, name, "true") if command == "exec" else (command, name)
        done = bundle.call(*words)
        refused(done, "container id", code=255 if command == "exec" else 1)
        assert len(done.stderr) < 250
    assert not (bundle.folder / "up").exists()


def test_commands_at_the_wrong_time(bundle: Bundle) -> None:
    name = bundle.name
    for command in ("start", "state", "kill", "delete", "pause", "resume", "ps"):
        refused(bundle.call(command, name), "does not exist")
    assert bundle.call("delete", "--force", name).returncode == 0
    assert bundle.create("sleep", "1000").returncode == 0
    refused(bundle.call("create", name), "exists")
    refused(bundle.call("resume", name), "created")
    assert bundle.call("start", name).returncode == 0
    refused(bundle.call("start", name), "running")
    refused(bundle.call("delete", name), "not stopped: running")
    refused(bundle.call("resume", name), "running")
    assert bundle.status() == "running"
    pid = bundle.pid()
    assert bundle.call("kill", name, "KILL").returncode == 0
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        pass
    assert bundle.status() == "stopped"
    refused(bundle.call("kill", name), "not running")
    refused(bundle.call("start", name), "stopped")
    refused(bundle.call("pause", name), "stopped")
    refused(bundle.call("exec", name, "true"), "stopped", code=255)
    assert bundle.call("delete", name).returncode == 0
    assert bundle.status() == "gone"


def test_errors_as_engines_read_them(bundle: Bundle) -> None:
    log = bundle.folder / "log"
    bundle.config["linux"]["namespaces"].append({"type": "astral"})
    bundle.write()
    done = bundle.call("--log", str(log), "--log-format", "json", "run", bundle.name)
    refused(done, "linux.namespaces", "astral")
    record = json.loads(log.read_text().splitlines()[-1])
    assert record["level"] == "error" and "astral" in record["msg"] and record["time"]


def test_a_rootfs_that_goes_away(bundle: Bundle) -> None:
    """Between create and start, and after: commands work on what is left."""
    assert bundle.create("sleep", "1000").returncode == 0
    shutil.rmtree(bundle.rootfs)
    (bundle.folder / "config.json").unlink()
    done = bundle.call("start", bundle.name)
    refused(done, "sleep")
    assert bundle.status() == "stopped"
    assert bundle.call("delete", bundle.name).returncode == 0


@pytest.mark.parametrize("place", ["proc", "sys"])
def test_proc_and_sys_that_are_links(bundle: Bundle, place: str) -> None:
    """A link could be turned between the mount and the masking of what is below it."""
    (bundle.rootfs / place).rmdir()
    (bundle.rootfs / "elsewhere").mkdir()
    (bundle.rootfs / place).symlink_to("elsewhere")
    refused(bundle.run("true"), f"(/{place})", "symbolic link")
