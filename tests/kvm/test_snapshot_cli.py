"""`pyhv snapshot` and `pyhv boot --snapshot`, as a user has them: what they do, say, and refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.run import PYHV, Done, needs_kvm, no_traceback, pyhv
from framework.vm import Vm

from hv import Machine, MachineConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.machine.own_device import OwnConfig
from hv.snapshot.format import Snapshot, write_state
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(240)]
# real mode: inc dword [0x500]; cmp word [0x500], 0; jnz start; mov dx, 0x3f8; mov al, '.'; out; jmp start
DOTS = bytes.fromhex("66ff060005" "833e000500" "75f4" "baf803" "b02e" "ee" "ebec")
FLAT = ("--boot-protocol", "flat", "--memory", "16M")


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "dots.bin").write_bytes(DOTS)
    return str(tmp_path / "dots.bin")


def fill(place: Path) -> Path:
    """A store with `full`, `one`, which is a difference from it, and `two`, which is one from that."""
    with Machine(MachineConfig(DOTS, boot_protocol="flat", memory=16 << 20)) as machine:
        machine.start()
        save(machine, str(place / "full"), track=True)
        machine.memory.write(8 << 20, b"one")
        save(machine, str(place / "one"), diff=True)
        machine.memory.write(9 << 20, b"two")
        save(machine, str(place / "two"), diff=True)
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One to look at."""
    place = fill(tmp_path_factory.mktemp("store"))
    yield place
    assert sorted(os.listdir(place)) == ["full", "one", "two"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """One to spoil."""
    return fill(tmp_path / "copy")


def one_line(done: Done, *words: str, code: int | None = None) -> None:
    no_traceback(done)
    text = done.stderr.decode()
    assert done.returncode in ((1, 2) if code is None else (code,)), (done.returncode, text)
    assert len(text.splitlines()) == 1 and text.startswith("pyhv: "), text
    for word in words:
        assert word in text, text


def snapshot(*arguments: str, **options: object) -> Done:
    return pyhv("snapshot", *arguments, **options)      # type: ignore[arg-type]


def test_create_restore_and_what_ls_says(tmp_path, image):
    store = ("--store", str(tmp_path / "store"))
    with Vm("cli", image, *FLAT) as vm:
        done = snapshot("create", vm.name, "first", "--track", *store)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(rf"pyhv: saved {tmp_path}/store/first: .* of memory, the guest stood still for [\d.]+ ms\n",
                            done.stderr.decode())
        one_line(snapshot("create", vm.name, "first", *store), "is there already", code=1)
        assert snapshot("create", vm.name, "second", "--diff", *store).returncode == 0
        assert vm.process.poll() is None
        assert snapshot("create", vm.name, "third", "--stop", *store).returncode == 0
        assert vm.end() == 0
    table = snapshot("ls", *store).stdout.decode().splitlines()
    assert [line.split()[0] for line in table] == ["NAME", "first", "second", "third"]
    assert [line.split()[-1] for line in table] == ["PARENT", "-", "first", "-"]
    rows = json.loads(snapshot("ls", "--json", *store).stdout)
    assert [row["memory"] for row in rows] == [16 << 20] * 3 and rows[1]["parent"] == "first"
    for name in ("first", "second", "third"):
        done = snapshot("restore", name, "--timeout", "1.5", *store)
        assert done.returncode == 124 and b".." in done.stdout, (name, done)
    for options in (("--verify",), ("--clock", "now"), ("--quiet", "--no-control")):
        done = snapshot("restore", str(tmp_path / "store/first"), "--timeout", "1", *options)
        assert done.returncode == 124 and b"." in done.stdout, done


def test_inspect_diff_fsck_merge_rm(copy):
    store = ("--store", str(copy))
    told = snapshot("inspect", "two", *store).stdout.decode()
    assert re.search(r"^id +[0-9a-f]{32}$", told, re.M) and "vCPU 0     rax 0x" in told
    data = json.loads(snapshot("inspect", "two", "--json", *store).stdout)
    assert data["parent"]["folder"].endswith("/full") or data["parent"]["folder"].endswith("/one")
    assert data["config"]["memory"] == 16 << 20 and "rip" in data["vcpus"][0]
    told = snapshot("diff", "one", "two", *store).stdout.decode().splitlines()
    assert any(line.startswith("id: ") for line in told) and re.match(r"memory: \d+ pages differ", told[-1])
    assert snapshot("diff", "one", "one", *store).stdout == b"memory: equal\n"
    assert b"3 snapshots, one on the other" in snapshot("fsck", "two", *store).stderr
    one_line(snapshot("rm", "full", *store), "is a difference from full", code=2)
    one_line(snapshot("merge", "full", "other", *store), "is no difference", code=2)
    assert snapshot("merge", "two", "whole", *store).returncode == 0
    assert snapshot("fsck", "whole", *store).returncode == 0
    one_line(snapshot("merge", "two", "whole", *store), "is there already", code=2)
    assert snapshot("rm", "full", "one", "two", *store).returncode == 0
    assert os.listdir(copy) == ["whole"]
    assert (copy / "whole/memory").read_bytes()[9 << 20:][:3] == b"two"
    assert snapshot("restore", "whole", "--timeout", "1", *store).returncode == 124


def test_rm_with_force_leaves_what_is_worth_nothing(copy):
    store = ("--store", str(copy))
    assert snapshot("rm", "--force", "full", *store).returncode == 0
    for command in (("fsck", "two"), ("restore", "two"), ("merge", "two", "x"), ("diff", "one", "two")):
        one_line(snapshot(*command, *store), "is a difference from", code=1)
    assert snapshot("ls", *store).returncode == 0
    assert sorted(os.listdir(copy)) == ["one", "two"]


@pytest.mark.parametrize(("arguments", "word"), [
    (("create", "no-such-vm", "x"), "no VM no-such-vm is running"),
    (("create", "no-such-vm", "../x/."), ""),
    (("create", "no-such-vm", ".hidden"), "can't be the name"),
    (("create", "no-such-vm", "a b"), "can't be the name"),
    (("create", "no-such-vm", ""), "can't be the name"),
    (("create", "no-such-vm", "x" * 200), "can't be the name"),
    (("create", "no-such-vm"), "Missing argument"),
    (("restore", "missing"), "there is no snapshot"),
    (("restore", "/dev/null/x"), "there is no snapshot"),
    (("restore", "full", "--clock", "never"), "no such clock"),
    (("restore", "full", "--timeout", "-1"), "timeout"),
    (("restore", "full", "--disk", "0=/none"), "has no disk 0"),
    (("restore", "full", "--disk", "zero"), "is no N=FILE"),
    (("restore", "full", "--disk", "0="), "is no N=FILE"),
    (("restore", "full", "--disk", "0=a", "--disk", "0=b"), "is there twice"),
    (("restore", "full", "--memory-backend", "moon"), "moon"),
    (("restore", "full", "--no-such-option"), "No such option"),
    (("inspect", "missing"), "there is no snapshot"), (("fsck", "missing"), "there is no snapshot"),
    (("rm", "missing"), "there is no snapshot"), (("rm",), "Missing argument"),
    (("diff", "full", "missing"), "there is no snapshot"), (("merge", "one", "a b"), "can't be the name"),
    (("frobnicate",), "No such command"),
])
def test_bad_input_costs_one_line(store, arguments, word):
    one_line(snapshot(*arguments, *(("--store", str(store)) if arguments != ("frobnicate",) else ())), word)


def damage(folder: Path, how: str) -> str:
    """Spoil a snapshot; a word of what is to be said of it."""
    os.chmod(folder / "memory", 0o600)
    if how == "state":
        data = bytearray((folder / "state.json").read_bytes())
        data[len(data) // 2] ^= 4
        (folder / "state.json").write_bytes(data)
        return "its checksum is wrong"
    if how == "empty":
        (folder / "state.json").write_bytes(b"")
        return "does not begin as a snapshot"
    if how == "newer":
        data = (folder / "state.json").read_bytes()
        (folder / "state.json").write_bytes(data.replace(b"pyhv-snapshot 1 ", b"pyhv-snapshot 9 ", 1))
        return "is of version 9"
    if how == "cut":
        os.truncate(folder / "memory", 12 << 20)
        return "bytes, guest RAM is"
    if how == "flipped":
        with open(folder / "memory", "r+b") as file:
            file.seek(0x7c00)
            file.write(b"\xf4")
        return "the MiB at 0x0 is not what was saved"
    if how == "swapped":
        (folder / "memory").write_bytes(os.urandom(16 << 20))
        return "is not what was saved"
    if how == "sums":
        os.chmod(folder / "memory.sums", 0o600)
        (folder / "memory.sums").write_text("00\n")
        os.utime(folder / "memory")
        return "is not what was saved"
    if how == "gone":
        (folder / "memory").unlink()
        return "No such file"
    (folder / "memory").unlink()
    (folder / "memory").mkdir()
    return "memory"


@pytest.mark.parametrize("how", ["state", "empty", "newer", "cut", "flipped", "swapped", "sums", "gone", "folder"])
def test_damage_is_said_and_never_run(copy, how):
    word = damage(copy / "full", how)
    one_line(snapshot("restore", "full", "--timeout", "5", "--store", str(copy)), word, code=1)
    one_line(snapshot("fsck", "full", "--store", str(copy)), code=1)
    one_line(snapshot("fsck", "two", "--store", str(copy)), code=1)
    assert snapshot("ls", "--store", str(copy)).returncode == 0
    no_traceback(snapshot("inspect", "full", "--store", str(copy)))
    no_traceback(snapshot("diff", "full", "two", "--store", str(copy)))
    no_traceback(snapshot("merge", "two", "x", "--store", str(copy)))


def test_hard_damage_to_memory_alone_is_found_by_verify(copy):
    """As a disk does it: the file's times tell nothing."""
    path = copy / "full/memory"
    status = os.stat(path)
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(0x7c00)
        file.write(b"\xf4")
    state = Snapshot(str(copy / "full")).state
    state["memory"] |= {"inode": status.st_ino, "mtime_ns": status.st_mtime_ns}
    write_state(str(copy / "full"), state)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    one_line(snapshot("restore", "full", "--verify", "--store", str(copy)), "the MiB at 0x0", code=1)
    one_line(snapshot("fsck", "full", "--store", str(copy)), "the MiB at 0x0", code=1)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a read-only file system needs root")
def test_a_read_only_store(copy, image):
    mount = f"mount --bind {copy} {copy} && mount -o remount,bind,ro {copy} && exec "
    run = " ".join(PYHV)

    def inside(arguments: str) -> Done:
        return subprocess.run(["unshare", "-m", "sh", "-c", f"{mount}{run} snapshot {arguments} --store {copy}"],
                              capture_output=True, timeout=60, check=False)

    done = inside("restore full --timeout 1")
    assert done.returncode == 124 and b"." in done.stdout, done
    one_line(inside("rm full one two"), "Read-only file system", code=1)
    one_line(inside("restore two --timeout 1"), "Read-only file system", code=1)    # it is laid out there
    assert sorted(os.listdir(copy)) == ["full", "one", "two"]
    with Vm("ro", image, *FLAT) as vm:
        one_line(snapshot("create", vm.name, "/proc/nothing"), "making", code=1)
        assert vm.process.poll() is None


def test_other_disks_and_own_devices(tmp_path):
    (tmp_path / "disk.img").write_bytes(b"1" * 8192)
    (tmp_path / "other.img").write_bytes(b"2" * 8192)
    (tmp_path / "small.img").write_bytes(b"2" * 4096)
    (tmp_path / "mine.py").write_text(
        "from hv.devices.virtio.device import VirtioDevice\n\n\nclass Mine(VirtioDevice):\n    ID = 63\n"
        "    QUEUES = (8,)\n")
    place = f"{tmp_path}/mine.py:Mine"
    devices = (DiskConfig(str(tmp_path / "disk.img")), OwnConfig(place))
    with Machine(MachineConfig(DOTS, boot_protocol="flat", memory=16 << 20, devices=devices)) as machine:
        machine.start()
        save(machine, str(tmp_path / "s"))
    folder = str(tmp_path / "s")
    one_line(snapshot("restore", folder), "is a program that would run here", "--device", code=1)
    run = ("restore", folder, "--device", place, "--timeout", "1", "--quiet")
    assert snapshot(*run).returncode == 124
    assert snapshot(*run, "--disk", f"0={tmp_path}/other.img").returncode == 124
    assert snapshot(*run, "--shared-disks").returncode == 124
    one_line(snapshot(*run, "--disk", f"0={tmp_path}/small.img"), "disk 0", "4096")
    one_line(snapshot(*run, "--disk", f"0={tmp_path}/none.img"), "disk 0", "No such file")
    one_line(snapshot(*run, "--disk", f"1={tmp_path}/other.img"), "has no disk 1")
    (tmp_path / "disk.img").write_bytes(b"3" * 8192)
    one_line(snapshot(*run), "disk 0", "has changed since", "--disk 0=FILE")


# pyhv boot --snapshot ------------------------------------------------------------------------------------


def test_saved_when_the_console_says_so(tmp_path):
    folder = str(tmp_path / "s")
    done = pyhv("boot", "guest:echo", "--cmdline", "echo", "--memory", "16M", "--snapshot", folder, "--snapshot-when",
                "ready", "--snapshot-stop", "--timeout", "30", "--no-control")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"pyhv: saved {folder}: \d+ MiB of memory, the guest stood still for", done.stderr.decode())
    done = snapshot("restore", folder, "--timeout", "30", "--quiet", stdin=b"typed later\x04")
    assert done.returncode == 0 and b"typed later" in done.stdout
    done = pyhv("boot", "guest:echo", "--cmdline", "echo", "--memory", "16M", "--snapshot", str(tmp_path / "t"),
                "--snapshot-when", "ready", "--timeout", "30", "--no-control", stdin=b"goes on\x04")
    assert done.returncode == 0 and b"goes on" in done.stdout and b"saved" in done.stderr


def test_saved_by_a_signal_again_and_again(tmp_path, image):
    process = subprocess.Popen([*PYHV, "boot", image, *FLAT, "--snapshot", str(tmp_path / "s"), "--snapshot-on-signal",
                                "--no-control", "--timeout", "60"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(2) == b".."
        for name in ("s", "s-2", "s-3"):
            process.send_signal(signal.SIGUSR1)
            while b"saved" not in (line := process.stderr.readline()):
                assert b"software KVM" in line
            assert f"saved {tmp_path}/{name}:".encode() in line
            assert process.stdout.read(2) == b".."
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 143
    for name in ("s", "s-2", "s-3"):
        assert snapshot("fsck", str(tmp_path / name)).returncode == 0


@pytest.mark.parametrize(("options", "word"), [
    (("--snapshot", "/tmp/x/y"), "when?"), (("--snapshot-when", "x"), "go with --snapshot NAME"),
    (("--snapshot-stop",), "go with --snapshot NAME"), (("--snapshot-on-signal",), "go with --snapshot NAME"),
    (("--snapshot", "a b", "--snapshot-when", "x"), "can't be the name"),
    (("--snapshot", "/tmp", "--snapshot-when", "x"), "is there already"),
])
def test_boot_options_that_make_no_sense(options, word):
    one_line(pyhv("boot", "guest:tiny", "--memory", "16M", *options), word, code=2)


def test_a_place_that_can_not_be_written_is_said_and_the_guest_goes_on():
    done = pyhv("boot", "guest:echo", "--cmdline", "echo", "--memory", "16M", "--snapshot", "/proc/no/where",
                "--snapshot-when", "ready", "--timeout", "30", "--no-control", stdin=b"goes on\x04")
    no_traceback(done)
    assert done.returncode == 0 and b"goes on" in done.stdout and b"pyhv: making /proc/no/" in done.stderr


