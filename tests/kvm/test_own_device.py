"""The device of docs/adding-a-virtio-device.md in a real Linux, given on the command line as its page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from framework.linux import initrd, kernel, skip_without_build_tools
from framework.run import boot, needs_kvm, no_traceback

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

TEXT = (Path(__file__).resolve().parents[2] / "docs/adding-a-virtio-device.md").read_text()


def test_linux_throws_the_dice(tmp_path: Path) -> None:
    skip_without_build_tools()
    (tmp_path / "dice.py").write_text(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0])
    (tmp_path / "rootfs.cpio").write_bytes(initrd())
    commands = b"""cat /sys/class/misc/hw_random/rng_current
head -c 600 /dev/hwrng | hexdump -v -e '1/1 "<%u>"'
poweroff -f
"""
    done = boot(str(kernel("micro") / "vmlinux"), "--initrd", str(tmp_path / "rootfs.cpio"),
                "--device", f"{tmp_path / 'dice.py'}:Dice,sides=20", stdin=commands, timeout=120)
    no_traceback(done)
    assert done.returncode == 0 and b"virtio_rng.0" in done.stdout, done.stdout + done.stderr
    thrown = [int(number) for number in re.findall(rb"<(\d+)>", done.stdout)]
    assert len(thrown) == 600 and set(thrown) == set(range(1, 21))
    assert b"never drove" not in done.stderr


def test_a_guest_without_its_driver_is_told(tmp_path: Path) -> None:
    (tmp_path / "dice.py").write_text(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0])
    done = boot("guest:tiny", "--device", f"{tmp_path / 'dice.py'}:Dice")
    assert b"dice0: the guest never drove it; its kernel needs CONFIG_HW_RANDOM_VIRTIO" in done.stderr
