"""Where pyhv keeps things: what must outlive a boot under data_root(), what must not under run_root().

    data_root()/images, instances, networks, volumes, snapshots   $PYHV_DATA, or /var/lib/pyhv, or $XDG_DATA_HOME/pyhv
    run_root()/instances, networks, ...                           $PYHV_RUN, or /run/pyhv, or $XDG_RUNTIME_DIR/pyhv

Tests and people with a disk to spare point the variables elsewhere. Driven by tests/unit/test_places.py.
"""

from __future__ import annotations

__all__ = ["ROOTLESS", "data_root", "rootless", "run_root"]

import os

ROOTLESS = "PYHV_ROOTLESS"      # in the environment of commands that are in a user's own namespace (hv/cli/userns.py)


def data_root() -> str:
    """The folder for images, instances, networks, volumes; it may not be there yet."""
    if given := os.environ.get("PYHV_DATA"):
        return os.path.abspath(given)
    if os.geteuid() == 0:
        return "/var/lib/pyhv"
    return (os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")) + "/pyhv"


def run_root() -> str:
    """The folder for sockets, locks and what is running; on a tmpfs, so a reboot empties it."""
    if given := os.environ.get("PYHV_RUN"):
        return os.path.abspath(given)
    if os.geteuid() == 0:
        return "/run/pyhv"
    return (os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/pyhv-{os.geteuid()}") + "/pyhv"


def rootless() -> bool:
    """Whether a user without root runs us, as root of a user namespace."""
    return ROOTLESS in os.environ
