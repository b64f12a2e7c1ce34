"""Disks in real Linux guests: eight at once, one as the root file system, and what is left after kill -9.

Little data goes through the guest's kernel: where that is emulated, it copies a few MB a second.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import PYHV, ROOT, needs_kvm

from hv import Machine, MachineConfig
from hv.devices.virtio.blk_config import DiskConfig

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

INIT = """#!/bin/sh
export PATH=/bin PS1='pyhv# '
mount -t proc proc /proc
mount -t sysfs sys /sys
exec setsid cttyhack sh
"""
NEEDED = ("mke2fs", "e2fsck", "debugfs", "busybox")
pytestmark += [pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool} here") for tool in NEEDED]


def host(*command: str, timeout: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def filesystem(image: Path, tree: Path | None = None, size: str = "24M") -> Path:
    """An ext4 file system with the files of `tree`."""
    content = ("-d", str(tree)) if tree else ()
    host("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", *content, str(image), size)
    return image


def root_tree(folder: Path) -> Path:
    """A root file system: busybox, its init, places to mount on, e2fsck with its libraries."""
    for name in ("bin", "sbin", "dev", "proc", "sys", "mnt", "tmp"):
        (folder / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, folder / "bin/busybox")
    for name in ("sh", "mount", "umount", "setsid", "cttyhack", "poweroff", "sync"):
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "sbin/init").write_text(INIT)
    (folder / "sbin/init").chmod(0o755)
    return folder


class RootShell(Shell):
    """A guest whose root file system is its first disk: no initramfs."""

    def __init__(self, *disks: DiskConfig) -> None:
        config = MachineConfig(str(kernel("micro") / "vmlinux"), cmdline="root=/dev/vda rw", devices=disks, timeout=150)
        self.machine = Machine(config)
        self.machine.start()
        self.at = 0


def test_root_file_system(tmp_path: Path) -> None:
    skip_without_build_tools()
    image = filesystem(tmp_path / "root.img", root_tree(tmp_path / "root"))
    with RootShell(DiskConfig(str(image))) as shell:
        shell.wait_for(b"pyhv# ")
        assert "/dev/root / ext4 rw" in shell.run("cat /proc/mounts")
        assert "END 0" not in shell.run("cat /file")
        shell.run("mkdir /dir; for n in 1 2 3 4 5; do echo line $n of the guest >>/dir/file; done")
        shell.run("dd if=/bin/busybox of=/dir/copy bs=64k count=4; ln -s file /dir/link; rm /sbin/init")
        assert "END 0" in shell.run("mount -o remount,ro /")
        assert shell.power_off() in ("poweroff", "halt", "reset")
        assert not shell.machine.devices["disk0"].faults
    host("e2fsck", "-fn", str(image))
    lines = host("debugfs", "-R", "cat /dir/file", str(image)).splitlines()
    assert lines == [f"line {n} of the guest" for n in range(1, 6)]
    host("debugfs", "-R", f"dump /dir/copy {tmp_path / 'copy'}", str(image))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "root/bin/busybox").read_bytes()[:256 << 10]


# eight disks of one guest -------------------------------------------------------------------------


class Eight:
    """vda ext4, vdb read-only, vdc overlay=temp, vdd overlay=FILE, vde random bytes to discard, vdf on a full host disk
    (or not), vdg direct with four queues, vdh an odd size and a slow one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = folder / "tiny"
        self.tiny.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(self.tiny)], check=False,
                                 capture_output=True, timeout=20)
        self.full = mounted.returncode == 0
        filesystem(folder / "a", size="8M")
        for name in "bceg":
            (folder / name).write_bytes(os.urandom(256 << 10))
        (folder / "f").symlink_to(self.tiny / "f")
        (folder / "f").write_bytes(b"")
        os.truncate(folder / "f", 4 << 20)
        (folder / "h").write_bytes(os.urandom((64 << 10) + 1000))
        self.base = (folder / "c").read_bytes()
        self.disks = tuple(DiskConfig(str(folder / name), **options) for name, options in (     # type: ignore[arg-type]
            ("a", {"serial": "first-disk"}), ("b", {"readonly": True, "serial": "b" * 20}), ("c", {"overlay": "temp"}),
            ("c", {"overlay": str(folder / "d")}), ("e", {}), ("f", {}), ("g", {"direct": True, "queues": 4}),
            ("h", {"bps": "50M"})))

    def close(self) -> None:
        if self.full:
            subprocess.run(["umount", str(self.tiny)], check=True, timeout=20)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Eight, Shell]]:
    skip_without_build_tools()
    made = Eight(tmp_path_factory.mktemp("eight"))
    try:
        with Shell(kernel("micro") / "vmlinux", devices=made.disks, timeout=400).booted() as shell:
            yield made, shell
            assert [device.fault_texts for device in shell.machine.devices.values() if device.faults] == []
    finally:
        made.close()


def md5(data: bytes) -> str:
    import hashlib

    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_all_eight_are_there(eight: tuple[Eight, Shell]) -> None:
    made, shell = eight
    sizes = shell.run("cat /sys/block/vd?/size").split()[:8]
    assert [int(size) * 512 for size in sizes] == [8 << 20, *[256 << 10] * 4, 4 << 20, 256 << 10, (64 << 10) + 512]
    sums = shell.run("md5sum /dev/vdb /dev/vdc /dev/vdd /dev/vde /dev/vdg /dev/vdh")
    files = [made.folder / name for name in "bccegh"]
    expected = [md5(path.read_bytes()[:(64 << 10) + 512] if path.name == "h" else path.read_bytes()) for path in files]
    assert re.findall(r"(\w{32})  /dev/vd", sums) == expected


def test_serials(eight: tuple[Eight, Shell]) -> None:
    _, shell = eight
    serials = shell.run("cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial; echo").split()
    assert serials[:2] == ["first-disk", "b" * 20]


def test_the_guest_turns_the_write_cache_off(eight: tuple[Eight, Shell]) -> None:
    _, shell = eight
    device = shell.machine.devices["disk0"]
    assert device.writeback                                                     # type: ignore[attr-defined]
    assert "END 0" in shell.run("echo write through >/sys/block/vda/cache_type")
    assert not device.writeback                                                 # type: ignore[attr-defined]


def test_a_file_system_and_fstrim(eight: tuple[Eight, Shell]) -> None:
    made, shell = eight
    image = made.folder / "a"
    assert "END 0" in shell.run("mkdir /a; mount -t ext4 /dev/vda /a && dd if=/dev/zero of=/a/file bs=64k count=16 "
                                "&& sync")
    held = image.stat().st_blocks * 512
    assert held > 1 << 20
    assert "END 0" in shell.run("rm /a/file && sync && fstrim /a")
    assert image.stat().st_blocks * 512 < held - (900 << 10)
    assert "END 0" in shell.run("echo kept >/a/kept; umount /a")
    host("e2fsck", "-fn", str(image))
    assert host("debugfs", "-R", "cat /kept", str(image)) == "kept\n"


def test_read_only(eight: tuple[Eight, Shell]) -> None:
    made, shell = eight
    before = (made.folder / "b").read_bytes()
    assert shell.run("cat /sys/block/vdb/ro").startswith("1")
    assert "END 0" not in shell.run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync")
    assert (made.folder / "b").read_bytes() == before


@pytest.mark.parametrize("disk", ["vdc", "vdd"])
def test_overlays_leave_the_base_alone(eight: tuple[Eight, Shell], disk: str) -> None:
    made, shell = eight
    data = shell.run(f"dd if=/dev/zero of=/dev/{disk} bs=512 seek=77 count=100 conv=fsync; "
                     f"echo 3 >/proc/sys/vm/drop_caches; md5sum /dev/{disk}")
    assert md5(made.base[:77 * 512] + bytes(51200) + made.base[177 * 512:]) in data
    assert (made.folder / "c").read_bytes() == made.base


def test_discard_gives_blocks_back(eight: tuple[Eight, Shell]) -> None:
    made, shell = eight
    image = made.folder / "e"
    assert image.stat().st_blocks * 512 == 256 << 10
    assert "END 0" in shell.run("blkdiscard -o 65536 -l 131072 /dev/vde")
    assert image.stat().st_blocks * 512 == 128 << 10


def test_a_full_host_disk_is_an_error_in_the_guest(eight: tuple[Eight, Shell]) -> None:
    made, shell = eight
    if not made.full:
        pytest.skip("can't mount a tmpfs here")
    assert "END 0" not in shell.run("dd if=/dev/zero of=/dev/vdf bs=64k count=8 conv=fsync")
    device = shell.machine.devices["disk5"]
    assert "requests, first: No space left on device" in device.warnings[0]
    assert "I/O error" in shell.run("dmesg | tail -5")
    assert "END 0" in shell.run("echo alive; dd if=/dev/vdf of=/dev/null bs=64k count=4")


def test_direct_with_queues(eight: tuple[Eight, Shell]) -> None:
    made, shell = eight
    assert "END 0" in shell.run("dd if=/dev/vdb of=/dev/vdg bs=512 skip=3 seek=5 count=99 conv=fsync")
    source, target = (made.folder / "b").read_bytes(), (made.folder / "g").read_bytes()
    assert target[5 * 512:104 * 512] == source[3 * 512:102 * 512]


# power loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", [False, True], ids=["raw", "overlay"])
def test_kill_9_loses_nothing_that_was_synced(tmp_path: Path, overlay: bool) -> None:
    skip_without_build_tools()
    tree = tmp_path / "root"
    for name in ("dev", "sbin", "kept"):
        (tree / name).mkdir(parents=True)
    host("gcc", "-static", "-O2", "-o", str(tree / "sbin/init"), str(ROOT / "guests/linux/fsync_loop.c"))
    image = filesystem(tmp_path / "root.img", tree)
    base = image.read_bytes()
    disk = f"{image},overlay={tmp_path / 'over'}" if overlay else str(image)
    command = [*PYHV, "boot", str(kernel("micro") / "vmlinux"), "--disk", disk, "--cmdline", "root=/dev/vda rw",
               "--timeout", "200"]
    output = tmp_path / "output"
    with output.open("wb") as out, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out,
                                                    stderr=subprocess.STDOUT) as process:
        try:
            end = time.monotonic() + 190
            while b"synced 33\r" not in output.read_bytes():
                assert process.poll() is None and time.monotonic() < end, output.read_bytes()[-2000:]
                time.sleep(0.02)
        finally:
            process.kill()
    last = int(re.findall(rb"synced (\d+)\r", output.read_bytes())[-1])
    if overlay:
        assert image.read_bytes() == base
        flatten(image, tmp_path / "over", tmp_path / "flat.img")
        image = tmp_path / "flat.img"
    checked = subprocess.run(["e2fsck", "-fy", str(image)], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode in (0, 1), checked.stdout     # 1: errors corrected; here the journal was replayed
    host("e2fsck", "-fn", str(image))
    records = host("debugfs", "-R", "cat /log", str(image)).splitlines()
    assert records[:last + 1] == [f"record {number:08d} ".ljust(63, ".") for number in range(last + 1)]
    for number in range(15, last + 1, 16):
        assert host("debugfs", "-R", f"cat /kept/{number:08d}", str(image)).startswith(f"record {number:08d} ")


def flatten(base: Path, overlay: Path, target: Path) -> None:
    """What a guest would see of the two, as an image."""
    device = DiskConfig(str(base), overlay=str(overlay)).create()
    room = memoryview(bytearray(device.disk.size))      # type: ignore[attr-defined]
    device.disk.read([room], 0, len(room))              # type: ignore[attr-defined]
    target.write_bytes(room)
    device.close()
