"""Disks that can't be restored: files that have changed, damaged and hostile snapshots, each told in a line."""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from typing import Any

import pytest
from framework.disks import SIZE, Guest, guest, restored

from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.blk_overlay import CLUSTER, Overlay
from hv.errors import ConfigError, HvError, StateError
from hv.machine.config import MachineConfig
from hv.machine.recipe import config_from
from hv.snapshot.disks import _let_time_pass, disks_for_restore, save_disks


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


# stamps ------------------------------------------------------------------------------------------------

def refused(text: str, snapshot: Any, hint: str = "--disk 1=FILE", **options: Any) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        restored(snapshot, **options).close()
    assert "\n" not in str(caught.value) and hint in caught.value.hint, caught.value.hint


@pytest.mark.parametrize(("options", "copied"), [({}, True), ({"readonly": True}, False), ({"overlay": "temp"}, False)])
def test_missing_shorter_and_changed_files_are_refused(tmp_path, image, options, copied):
    other = tmp_path / "first.img"
    other.write_bytes(bytes(CLUSTER))
    one = guest(DiskConfig(str(other), readonly=True), DiskConfig(str(image), **options))
    taken = one.save(tmp_path / "one")
    one.close()
    status, content = image.stat(), image.read_bytes()
    hint = "--copy-disks" if copied else "--disk 1=FILE"
    image.write_bytes(content)
    refused("disk 1: .*base.img has changed since", taken, hint)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    restored(taken).close()
    with image.open("r+b") as file:
        file.write(b"other")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused("disk 1: .*base.img has changed since", taken, hint)
    os.truncate(image, 4 * CLUSTER)
    refused(f"disk 1: .*base.img has {4 * CLUSTER} bytes, in the snapshot {SIZE}", taken, hint)
    image.unlink()
    refused("disk 1: .*base.img: .*No such file", taken, hint)
    os.mkfifo(image)
    refused("disk 1: .*base.img: neither a file nor", taken, hint)
    image.unlink()
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    writer = DiskConfig(str(image)).create()
    refused("disk 1: .*base.img: somebody writes to it", taken, hint)
    writer.close()
    restored(taken).close()


def test_a_write_right_after_the_snapshot_is_seen(tmp_path, image):
    """Times of change move in steps of some ms: a snapshot waits until the next write gets another one."""
    one = guest(DiskConfig(str(image)))
    for number in range(12):
        one.write(30 * CLUSTER, bytes([number]) * 512)       # behind what the checksum covers
        taken = one.save(tmp_path / f"s{number}")
        one.write(30 * CLUSTER, b"\xff" * 512)
        one.close()
        with pytest.raises(ConfigError, match="has changed since"):
            restored(taken)
        one = guest(DiskConfig(str(image)))
    one.close()


def test_the_wait_for_another_time_of_change():
    """Linux 6.13 and later can tell two times apart without it."""
    for age, least, most in ((0, 0.015, 1.0), (-5, 0.010, 1.0), (60_000, 0.0, 0.010), (-60_000, 0.0, 0.010)):
        start = time.monotonic()
        _let_time_pass(time.time_ns() - age * 1_000_000)
        assert least <= time.monotonic() - start <= most, age


def test_another_file_takes_its_place(tmp_path, image):
    shutil.copy(image, image.parent / "b.img")
    one = guest(DiskConfig(str(image)), DiskConfig(str(image.parent / "b.img"), overlay="temp"))
    one.write(0, b"layer" + bytes(507), disk=1)
    taken = one.save(tmp_path / "one")
    one.close()
    moved = tmp_path / "moved.img"
    moved.write_bytes(b"other" + image.read_bytes()[5:])
    clone = restored(taken, disks={0: {"path": str(moved)}})
    assert clone.read()[:5] == b"other" and isinstance(clone.blocks[0].disk, Overlay)
    clone.close()
    refused(r"b.img has changed|does not fit", taken, "cp -p", disks={1: {"path": str(moved)}})
    os.rename(image.parent / "b.img", tmp_path / "c.img")
    clone = restored(taken, disks={1: {"path": str(tmp_path / "c.img")}})
    assert clone.read(1)[:5] == b"layer"
    clone.close()
    moved.write_bytes(bytes(CLUSTER))
    refused("disk 0: .*moved.img has 4096 bytes", taken, "--disk 0=FILE", disks={0: {"path": str(moved)}})


def test_a_named_overlay_keeps_what_a_restored_machine_writes(tmp_path, image):
    one = guest(DiskConfig(str(image), overlay="temp"))
    one.write(0, b"one" + bytes(509))
    taken = one.save(tmp_path / "one")
    keep = str(tmp_path / "keep")
    two = restored(taken, disks={0: {"overlay": keep}})
    two.write(512, b"two" + bytes(509))
    two.close()
    two = restored(taken, disks={0: {"overlay": keep}})
    assert two.read()[:3] == b"one" and two.read()[512:515] == b"two"
    two.close()
    with pytest.raises(ConfigError, match="other overlays between them"):
        guest(DiskConfig(str(image), overlay=keep))         # without the layer it would show a mixture
    one.write(0, b"new" + bytes(509))
    later = one.save(tmp_path / "two")
    restored(later, disks={0: {"overlay": str(tmp_path / "keep2")}}).close()
    with pytest.raises(ConfigError, match="does not fit"):      # the same clusters, but not the same content
        restored(taken, disks={0: {"overlay": str(tmp_path / "keep2")}})
    one.close()


def test_save_says_what_it_cannot(tmp_path, image, monkeypatch):
    one = guest(DiskConfig(str(image)))
    with pytest.raises(StateError, match="disk 0 is at work"):
        save_disks(one, str(tmp_path / "x"))        # type: ignore[arg-type]
    image.rename(tmp_path / "elsewhere")
    image.write_bytes(b"new")
    with pytest.raises(ConfigError, match=r"base\.img is not the file any more"):
        one.save(tmp_path / "one")
    monkeypatch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(HvError, match=r"disk 0 \(.*base.img\): what the guest wrote can't be flushed"):
        one.save(tmp_path / "two")
    one.close()


# hostile -----------------------------------------------------------------------------------------------

@pytest.fixture
def taken(tmp_path, image):
    """A snapshot of a disk with two layers and of a copied one."""
    one = guest(DiskConfig(str(image), overlay="temp"))
    one.write(0, b"x" * CLUSTER)
    first = one.save(tmp_path / "first")
    one.close()
    plain = tmp_path / "plain.img"
    plain.write_bytes(bytes(SIZE))
    two = Guest(MachineConfig(devices=(*config_from(disks_for_restore(*first, private=True)).devices,
                                       DiskConfig(str(plain)))))
    two.write(2 * CLUSTER, b"y" * CLUSTER)
    made = two.save(tmp_path / "two", copy=True)
    two.close()
    for name in os.listdir(f"{made[2]}/disks"):
        shutil.copy2(f"{made[2]}/disks/{name}", tmp_path / "spare")      # no links into `first`
        os.replace(tmp_path / "spare", f"{made[2]}/disks/{name}")
        os.chmod(f"{made[2]}/disks/{name}", 0o600)
    restored(made).close()
    return made


@pytest.mark.parametrize(("name", "change", "text"), [
    ("0.0.overlay", lambda f: f.truncate(0), "damaged|not an overlay"),
    ("0.0.overlay", lambda f: f.truncate(3000), "cut short"),
    ("0.1.overlay", lambda f: f.truncate(4096 + 4096 + SIZE - 1), "cut short"),
    ("0.1.overlay", lambda f: f.write(b"WRONGCOW"), "not an overlay"),
    ("0.1.overlay", lambda f: (f.seek(16), f.write(struct.pack("<Q", 1 << 60))), "header is damaged"),
    # the layer above knows it otherwise
    ("0.0.overlay", lambda f: (f.seek(4096), f.write(b"\x03")), "0.1.overlay: does not fit"),
    ("0.0.overlay", lambda f: (f.seek(64), f.write(b"\x03")), "0.1.overlay: does not fit"),
    ("0.1.overlay", lambda f: (f.seek(4096 + 100), f.write(b"\x01")), "clusters behind the end"),
    ("0.1.overlay", lambda f: (f.seek(4096 + 5), f.write(b"\x02")), "clusters behind the end"),
    ("1.img", lambda f: f.truncate(SIZE - 512), f"disk 1: .*1.img has {SIZE - 512} bytes, not {SIZE}"),
])
def test_damaged_files_of_a_snapshot_are_refused(taken, name, change, text):
    path = f"{taken[2]}/disks/{name}"
    with open(path, "r+b") as file:
        change(file)
    with pytest.raises(ConfigError, match=text) as caught:
        restored(taken).close()
    assert (name in str(caught.value) or "0.1.overlay" in text) and "\n" not in str(caught.value)
    assert not [link for link in os.listdir("/proc/self/fd") if taken[2] in os.path.realpath(f"/proc/self/fd/{link}")]


@pytest.mark.parametrize("name", ["0.0.overlay", "1.img"])
def test_what_is_not_a_file_is_refused(taken, name, tmp_path):
    path = f"{taken[2]}/disks/{name}"
    os.rename(path, tmp_path / "real")
    refused("No such file", taken, "incomplete")
    os.symlink(tmp_path / "real", path)
    refused("is not a file", taken, "hostile")
    os.unlink(path)
    os.mkfifo(path)
    refused("is not a file", taken, "hostile")


@pytest.mark.parametrize(("field", "value", "text"), [
    ("layers", ["../../etc/passwd"], "no name of a file"), ("layers", [".."], "no name of a file"),
    ("layers", [3], r"disks\[0\]\.layers"), ("layers", "x", r"disks\[0\]\.layers"),
    ("layers", ["0.0.overlay"] * 9, "9 overlays"), ("layers", ["0.1.overlay"], "does not fit"),
    ("layers", ["1.img"], "not an overlay"), ("image", "/etc/passwd", "no name of a file"),
    ("image", "0.0.overlay", "has"), ("image", True, r"disks\[0\]\.image"), ("size", -1, r"disks\[0\]\.size"),
    ("size", 512, "bytes, in the snapshot 512"), ("size", 1 << 62, "in the snapshot 4611"),
    ("path", None, r"disks\[0\]\.path"), ("path", "/a\0b", r"disks\[0\]\.path"), ("mtime_ns", 5, "has changed"),
    ("sample", 5, "has changed"), ("more", 1, r"disks\[0\]\.more: no such field"),
    ("inode", "gone", "inode: is missing"),
])
def test_hostile_notes_are_refused(taken, field, value, text):
    recipe, saved, folder = taken
    changed = {**saved[0], field: value}
    if value == "gone":
        del changed[field]
    with pytest.raises(ConfigError, match=text) as caught:
        restored((recipe, [changed, *saved[1:]], folder)).close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("saved", [None, {}, [], [1, 2], [{}, {}], [{}] * 3])
def test_hostile_lists_are_refused(taken, saved):
    with pytest.raises(ConfigError, match="snapshot: disks"):
        restored((taken[0], saved, taken[2]))
    if saved != []:
        with pytest.raises(ConfigError, match="recipe"):
            disks_for_restore({"devices": saved}, taken[1], taken[2], private=True)
