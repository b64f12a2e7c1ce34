"""vhost-user in a real Linux guest: qemu-storage-daemon's disk, virtiofsd's share, a network of the test's own."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import needs_kvm
from framework.vhost_backend import BackEnd

from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.chain import Chain
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
OUR_MAC = bytes.fromhex("0200000000bb")
HEADER = 12             # struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6)


class Switch:
    """A back end that answers ARP and ICMP echo requests as 10.0.0.2."""

    def __init__(self, path: Path) -> None:
        self.received: list[bytes] = []
        self.waiting: list[bytes] = []
        self.back_end = BackEnd(path, self.serve)
        self.back_end.passive = {0}         # the receive ring: its buffers stay there until there is a frame

    def serve(self, back_end: BackEnd, index: int, chain: Chain) -> int | None:
        frame = chain.reader().read(1 << 16)[HEADER:]
        self.received.append(frame)
        if answer := self.answer(frame):
            self.waiting.append(answer)
            back_end.run(self.deliver)
        return 0

    def deliver(self) -> None:
        queue = self.back_end.rings[0]
        while self.waiting and (chain := queue.pop()) is not None:
            queue.push(chain, chain.writer().write(bytes(10) + b"\1\0" + self.waiting.pop(0)))
        self.back_end.signal(0)

    @staticmethod
    def answer(frame: bytes) -> bytes:
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == bytes((10, 0, 0, 2)):
            return frame[6:12] + OUR_MAC + frame[12:20] + b"\0\2" + OUR_MAC + frame[38:42] + frame[22:32]
        if frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[34] == 8:
            check = (int.from_bytes(frame[36:38], "big") + 0x0800) % 0xFFFF       # RFC 1624: type 8 became 0
            return (frame[6:12] + OUR_MAC + frame[12:26] + frame[30:34] + frame[26:30] + b"\0\0"
                    + struct.pack(">H", check) + frame[38:])
        return b""


def wait_for_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{process.args} does not listen"
        time.sleep(0.02)


def storage_daemon(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={folder}/disk.img,discard=unmap",
         "--export", f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={folder}/disk.sock,"
         "writable=on,num-queues=2"], stderr=subprocess.PIPE)
    wait_for_socket(folder / "disk.sock", process)
    return process


def virtiofsd(folder: Path) -> subprocess.Popen[bytes]:
    # chroot: a container may not make the namespaces that it makes by default
    process = subprocess.Popen([VIRTIOFSD, "-f", f"--socket-path={folder}/share.sock", "-o", f"source={folder}/share",
                                "-o", "sandbox=chroot", "-o", "log_level=err"], stderr=subprocess.PIPE)
    wait_for_socket(folder / "share.sock", process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


class Guest:
    """Three back ends, and a machine that has all its devices from them."""

    def __init__(self, folder: Path, flavour: str, **options: object) -> None:
        self.folder, self.flavour, self.options = folder, flavour, options
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.switch: Switch | None = None
        self.shell: Shell | None = None

    def start(self) -> None:
        folder = self.folder
        (folder / "share").mkdir()
        (folder / "share" / "from-host").write_text("a file of the host\n")
        with open(folder / "disk.img", "wb") as image:
            image.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^metadata_csum",
                        "-E", "lazy_itable_init=0", str(folder / "disk.img")], check=True, timeout=60)
        self.processes["disk"] = storage_daemon(folder)
        self.processes["share"] = virtiofsd(folder)
        self.switch = Switch(folder / "net.sock")
        self.shell = Shell(kernel(self.flavour) / "vmlinux", timeout=240, devices=(
            DiskConfig(vhost_user=f"{folder}/disk.sock", queues="2"),
            NetConfig(vhost_user=f"{folder}/net.sock", mac="02:00:00:00:00:aa"),
            ShareConfig(tag="files", vhost_user=f"{folder}/share.sock")), **self.options)
        assert self.shell.machine.config.backing == "memfd"
        self.shell.booted()

    def stop(self) -> None:
        if self.shell is not None:
            self.shell.machine.close()
        if self.switch is not None:
            self.switch.back_end.close()
            self.switch = None
        while self.processes:
            end(self.processes.popitem()[1])


def made(factory: pytest.TempPathFactory, flavour: str, **options: object) -> Iterator[Guest]:
    skip_without_build_tools()
    if not os.access(VIRTIOFSD, os.X_OK) or not shutil.which("qemu-storage-daemon") or os.getuid():
        pytest.skip("needs qemu-storage-daemon, virtiofsd and root")
    guest = Guest(factory.mktemp("vhost"), flavour, **options)
    try:
        guest.start()
        yield guest
    finally:
        guest.stop()


@pytest.fixture(scope="module")
def guest(tmp_path_factory) -> Iterator[Guest]:
    yield from made(tmp_path_factory, "micro")


@pytest.fixture
def pci_guest(tmp_path_factory) -> Iterator[Guest]:
    yield from made(tmp_path_factory, "smp", cpus=2, transport="pci")


def test_the_disk_mounts_and_keeps_what_is_written(guest):
    run = guest.shell.run
    run("mkdir -p /disk /share")
    assert "131072" in run("cat /sys/block/vda/size")
    assert "ext4" in run("mount -t ext4 /dev/vda /disk; grep /disk /proc/mounts")
    run("dd if=/bin/busybox of=/disk/data bs=64k count=4; sync")
    inside = run("md5sum /disk/data").split()[0]
    run("umount /disk; mount -t ext4 /dev/vda /disk")
    assert run("md5sum /disk/data").split()[0] == inside


def test_the_share_is_read_and_written(guest):
    run = guest.shell.run
    run("mount -t virtiofs files /share")
    assert "a file of the host" in run("cat /share/from-host")
    run("echo a word of the guest >/share/from-guest")
    run("dd if=/bin/busybox of=/share/big bs=64k count=4")
    run("mv /share/big /share/b2")
    assert (guest.folder / "share" / "from-guest").read_text() == "a word of the guest\n"
    there = (guest.folder / "share" / "b2").read_bytes()
    assert len(there) == 256 << 10 and hashlib.md5(there).hexdigest() == run("md5sum /share/b2").split()[0]
    assert "a file of the host" in run("cat /share/from-host")


def test_frames_go_both_ways(guest):
    run = guest.shell.run
    assert "02:00:00:00:00:aa" in run("cat /sys/class/net/eth0/address")
    run("ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up")
    said = run("ping -c 3 -W 5 10.0.0.2")
    assert "3 packets received" in said, said
    assert len(guest.switch.received) >= 4


def test_the_disk_survives_its_back_end(guest):
    """kill -9 of the storage daemon while the guest is quiet, then a new one; the guest waits and goes on."""
    device = guest.shell.machine.devices["disk0"]
    guest.shell.run("sync")
    guest.processes["disk"].send_signal(signal.SIGKILL)
    guest.processes["disk"].communicate()
    (guest.folder / "disk.sock").unlink()
    guest.shell.machine.console.send(b"echo through the gap >/disk/gap; sync; echo SYN''CED\n")
    time.sleep(1)
    assert not device.connected
    guest.processes["disk"] = storage_daemon(guest.folder)
    guest.shell.wait_for(b"SYNCED", 30)
    guest.shell.wait_for(b"pyhv# ")
    assert device.connected and "the back end is back" in device.warnings
    guest.shell.run("umount /disk; mount -t ext4 /dev/vda /disk")
    assert "through the gap" in guest.shell.run("cat /disk/gap")


def test_a_share_is_mounted_again_behind_a_new_back_end(guest):
    device = guest.shell.machine.devices["share0"]
    guest.processes["share"].send_signal(signal.SIGKILL)
    guest.processes["share"].communicate()
    (guest.folder / "share.sock").unlink()
    guest.processes["share"] = virtiofsd(guest.folder)
    end = time.monotonic() + 10
    while "the back end is back" not in device.warnings:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "Input/output error" in guest.shell.run("cat /share/from-host")      # the FUSE session died with the other
    guest.shell.run("umount -l /share; mount -t virtiofs files /share")
    assert "a file of the host" in guest.shell.run("cat /share/from-host")


def test_stop_and_go_on(guest):
    """Pause with the rings taken back, and go on: what a snapshot does."""
    machine = guest.shell.machine
    machine.pause()
    for device in machine.devices.values():
        device.stop()
        assert device.state()["queues"]
    for device in machine.devices.values():
        device.resume()
    machine.resume()
    guest.shell.run("umount /disk; mount -t ext4 /dev/vda /disk")
    assert "data" in guest.shell.run("ls /disk")
    assert "3 packets received" in guest.shell.run("ping -c 3 -W 5 10.0.0.2")
    guest.shell.run("umount /share; mount -t virtiofs files /share")
    assert "from-guest" in guest.shell.run("ls /share")


def test_the_file_system_is_sound_afterwards(guest):
    guest.shell.run("umount /disk; umount /share; sync")
    assert guest.shell.power_off() == "halt"         # this kernel has no ACPI
    for name, device in guest.shell.machine.devices.items():
        assert device.driven and not device.faults, (name, device.fault_texts)
    guest.stop()
    checked = subprocess.run(["e2fsck", "-f", "-n", str(guest.folder / "disk.img")], capture_output=True, timeout=60,
                             check=False)
    assert checked.returncode == 0, checked.stdout


def test_on_pci_the_back_end_raises_interrupts_itself(pci_guest):
    shell = pci_guest.shell
    shell.run("mkdir -p /disk /share; mount -t ext4 /dev/vda /disk", 120)
    shell.run("dd if=/bin/busybox of=/disk/data bs=64k count=2; sync", 120)
    shell.run("mount -t virtiofs files /share", 120)
    assert "a file of the host" in shell.run("cat /share/from-host", 120)
    for name, device in shell.machine.devices.items():
        assert device.driven and device.connected and not device.faults, (name, device.fault_texts)
        direct = [device.interrupts.queue_fd(index) for index in device._started]
        assert direct and None not in direct
        for fd in device._call_fds:     # none of ours was ever signalled
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)
    assert len(shell.machine.devices["disk0"]._started) == 2
