"""What tests share: one booted Linux for snapshots and migration, templates of VMs for bundles."""

from __future__ import annotations

import pytest
from framework.linux import skip_without_build_tools
from framework.snapshots import Taken
from framework.vms import VmHome


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


@pytest.fixture(scope="session")
def vm_home(tmp_path_factory: pytest.TempPathFactory) -> VmHome:
    """Where bundles that run as VMs have their templates."""
    skip_without_build_tools()
    return VmHome(tmp_path_factory.mktemp("vms"))
