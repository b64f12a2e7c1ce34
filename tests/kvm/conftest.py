"""What the tests of snapshots and migration share: one booted Linux."""

from __future__ import annotations

import pytest
from framework.linux import skip_without_build_tools
from framework.snapshots import Taken


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """One processor, virtio-mmio, a device of each kind."""
    skip_without_build_tools()
    return Taken(tmp_path_factory.mktemp("micro"), "micro")


@pytest.fixture(scope="session")
def smp(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """Two processors, virtio-pci, a device of each kind."""
    skip_without_build_tools()
    return Taken(tmp_path_factory.mktemp("smp"), "smp", cpus=2, transport="pci")
