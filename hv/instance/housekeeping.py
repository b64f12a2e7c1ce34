"""What a keeper does when there is nothing left to keep: networks of dead instances go, unpacked layers reach the disk.

The latter may take seconds and is done by a process of its own, which holds nothing: commands that come meanwhile do
not wait for it. Without it all is right as well, but images are unpacked again after a reboot (hv/image/layers.py).
Driven by tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["settle_layers", "sweep_networks"]

import os

from hv.errors import HvError
from hv.places import data_root, run_root

_FD_MOST = 1 << 20


def sweep_networks() -> None:
    """Remove what is left in networks of instances that nobody knows any more."""
    if os.geteuid() or not os.path.isdir(f"{data_root()}/networks"):
        return
    from hv.network.networks import Networks

    try:
        Networks().sweep(_known)
    except (HvError, OSError):
        pass                            # the next keeper's


def _known() -> list[str]:
    """Those that run, or are about to: each has its folder before it joins a network (launch.py)."""
    try:
        return os.listdir(f"{run_root()}/instances")
    except OSError:
        return []


def settle_layers() -> None:
    """Have a process of its own do it. The caller is about to end, and does not wait."""
    from hv.image.layers import Layers
    from hv.image.store import Store

    try:
        layers = Layers(Store())
        if not layers.unsettled() or os.fork():
            return
    except (HvError, OSError):
        return                          # the next keeper's
    os.closerange(0, _FD_MOST)
    try:
        layers.settle()
    finally:
        os._exit(0)
