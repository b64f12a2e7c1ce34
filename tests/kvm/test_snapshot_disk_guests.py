"""A Linux guest writes to its disks, is saved in the middle of it, and goes on three times: contents and refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from framework.linux import Shell, kernel
from framework.run import needs_kvm

from hv import Machine
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError
from hv.machine.recipe_change import for_clone, with_changes
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(600)]
SIZE = 8 << 20
# Sectors, each with its number, behind the page cache: what one holds is written once.
COUNT = 30
STREAM = (f"{{ (i=0; while [ $i -lt {COUNT} ]; do i=$((i+1)); printf '%511d\\n' $i | "
          "dd of=/dev/vda bs=512 seek=$i oflag=direct 2>/dev/null || break; done; echo stream ended at $i) & }")


class Restored(Shell):
    """The shell of a machine that goes on."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.at = machine, 0
        machine.start()


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the images, and a snapshot of a guest whose stream was at some block."""
    folder = tmp_path_factory.mktemp("disks")
    for name in ("over.img", "plain.img"):
        with open(folder / name, "wb") as file:
            file.truncate(SIZE)
    devices = (DiskConfig(str(folder / "over.img"), overlay="temp"), DiskConfig(str(folder / "plain.img")),
               VsockConfig(str(folder / "vsock")))
    with Shell(kernel("micro") / "vmlinux", devices=devices, timeout=300).booted() as shell:
        shell.run("echo plain data | dd of=/dev/vdb bs=512 conv=sync oflag=direct 2>/dev/null")
        shell.run(STREAM)
        shell.run("sleep 0.5")
        save(shell.machine, str(folder / "snapshot"), copy_disks=True)
        shell.run("echo later data | dd of=/dev/vdb bs=512 conv=sync oflag=direct 2>/dev/null")
    return folder


def sectors(shell: Shell) -> list[int]:
    """The numbers that stand on the first disk."""
    text = shell.run(f"dd if=/dev/vda bs=512 skip=1 count={COUNT} iflag=direct 2>/dev/null | tr -d '\\0 '; echo end")
    return [int(word) for word in text.partition("end")[0].split()]


def test_two_clones_end_the_stream_each_on_its_own_disk(taken):
    snapshot = Snapshot(str(taken / "snapshot"))
    before = {name: (taken / "snapshot/disks" / name).read_bytes() for name in os.listdir(taken / "snapshot/disks")}
    assert set(before) == {"0.0.overlay", "1.img"}
    # Behind header and bitmap: the stream was under way.
    assert 0 < before["0.0.overlay"].count(b"\n", 8192) < COUNT
    made: list[Restored] = []
    try:
        for number in (1, 2):
            recipe: dict[str, Any] = for_clone(snapshot.part("config"), number)
            made.append(Restored(restore(snapshot, recipe=recipe)))
        assert sorted(name for name in os.listdir(taken) if "vsock" in name) == ["vsock.1", "vsock.2"]
        for number, shell in enumerate(made):
            shell.wait_for(b"stream ended at %d" % COUNT, 120)
            shell.run(f"echo clone {number} | dd of=/dev/vdb bs=512 seek=1 conv=sync oflag=direct 2>/dev/null")
        for number, shell in enumerate(made):
            assert sectors(shell) == list(range(1, COUNT + 1))
            both = shell.run("dd if=/dev/vdb bs=512 count=2 iflag=direct 2>/dev/null | tr -d '\\0'")
            assert both.split("\n")[:2] == ["plain data", f"clone {number}"]
    finally:
        for shell in made:
            shell.machine.close()
    assert before == {name: (taken / "snapshot/disks" / name).read_bytes() for name in before}
    assert (taken / "over.img").read_bytes() == bytes(SIZE)
    assert (taken / "plain.img").read_bytes()[:10] == b"later data"


def test_the_files_it_names_are_held_to_what_they_were(taken):
    snapshot = Snapshot(str(taken / "snapshot"))
    status = os.stat(taken / "over.img")
    os.utime(taken / "over.img")
    try:
        with pytest.raises(ConfigError, match=r"disk 0: .*over\.img has changed since") as caught:
            restore(snapshot)
        assert "--disk 0=FILE" in caught.value.hint
        recipe = with_changes(snapshot.part("config"), disks={0: {"path": str(taken / "none.img")}})
        with pytest.raises(ConfigError, match=r"disk 0: .*none\.img: .*No such file"):
            restore(snapshot, recipe=recipe)
    finally:
        os.utime(taken / "over.img", ns=(status.st_atime_ns, status.st_mtime_ns))
