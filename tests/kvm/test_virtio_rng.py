"""The entropy device in a real Linux guest, on both transports."""

from __future__ import annotations

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import needs_kvm

from hv.devices.virtio.rng import RngConfig

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]


def test_linux_reads_random_bytes() -> None:
    skip_without_build_tools()
    with Shell(kernel("micro") / "vmlinux", devices=(RngConfig(), RngConfig()), timeout=120).booted() as shell:
        assert "virtio_rng.0" in shell.run("cat /sys/class/misc/hw_random/rng_available")
        first = shell.run("head -c 32 /dev/hwrng | md5sum")
        assert first != shell.run("head -c 32 /dev/hwrng | md5sum")
        assert "600+0 records in" in shell.run("dd if=/dev/hwrng of=/dev/null bs=64 count=600")
        assert all(device.driven and not device.faults for device in shell.machine.devices.values())
