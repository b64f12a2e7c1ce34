"""Snapshots of a Linux that was booted once for a whole test run, and machines that go on with them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

from framework.linux import Shell, kernel
from framework.run import ROOT

from hv import Machine
from hv.devices.virtio.balloon import BalloonConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.console_config import ConsoleConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.rng import RngConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.kernels.initramfs import busybox
from hv.snapshot.restore import restore
from hv.snapshot.save import save

DISK = 1 << 20


class Going(Shell):
    """The shell of a machine that goes on; `said` is what it had said before it was saved."""

    def __init__(self, machine: Machine, start: bool = True) -> None:
        self.machine, self.at = machine, 0
        if start:
            machine.start()


class Taken:
    """A booted Linux in a snapshot: `folder`, and what its devices use beside it."""

    def __init__(self, place: Path, flavour: str, **options: Any) -> None:
        self.place = place
        self.folder = str(place / "taken")
        self.early = str(place / "early")       # taken while it booted
        self.disk = place / "disk.img"
        self.disk.write_bytes(random.Random(5).randbytes(DISK))
        self.share = place / "share"
        self.share.mkdir()
        (self.share / "note").write_text("shared\n")
        devices = (DiskConfig(str(self.disk), overlay="temp"), NetConfig(pair=str(place / "cable")), RngConfig(),
                   BalloonConfig(), VsockConfig(str(place / "vsock")), ShareConfig(str(self.share), tag="here"),
                   ConsoleConfig(False, (f"agent,file={place / 'agent'}",)))
        program = steady(place)
        initrd = busybox(files=((str(program), "bin/steady"),))
        with Shell(kernel(flavour) / "vmlinux", devices=devices, initrd=initrd, timeout=300, **options) as shell:
            shell.wait_for(b"console [ttyS0]")
            save(shell.machine, self.early)
            shell.booted()
            shell.run("mkdir /here; mount -t virtiofs here /here; ip link set lo up; X=7; echo kept > /tmp/file")
            save(shell.machine, self.folder)
            assert "7 kept\n" in shell.run("echo $X $(cat /tmp/file)")

    def go_on(self, **options: Any) -> Going:
        """A machine that goes on from it."""
        return Going(restore(self.folder, **options))


def steady(place: Path) -> Path:
    """guests/linux/steady.c, built."""
    program = place / "steady"
    subprocess.run(["gcc", "-static", "-O2", "-s", "-o", program, ROOT / "guests/linux/steady.c"], check=True,
                   timeout=60)
    return program
