"""Where pyhv keeps things: what must outlive a boot under data_root(), what must not under run_root().

    data_root()/images, instances, networks, volumes, snapshots   $PYHV_DATA, or /var/lib/pyhv, or $XDG_DATA_HOME/pyhv
    run_root()/instances, networks, ...                           $PYHV_RUN, or /run/pyhv, or $XDG_RUNTIME_DIR/pyhv,
                                                                  or /tmp/pyhv-UID/pyhv

Tests and people with a disk to spare point the variables elsewhere. Driven by tests/unit/test_places.py.
"""

from __future__ import annotations

__all__ = ["ROOTLESS", "data_root", "rootless", "run_root"]

import os

ROOTLESS = "PYHV_ROOTLESS"      # in the environment of commands that are in a user's own namespace (hv/cli/userns.py)
_TEMPORARY = "/tmp"
_FOLDER, _KIND_AND_OTHERS = 0o040000, 0o170022      # man 7 inode: S_IFDIR; S_IFMT, and writing by others


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
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return given + "/pyhv"
    folder = f"{_TEMPORARY}/pyhv-{os.geteuid()}"
    return folder + "/pyhv" if _is_ours(folder) else data_root() + "/run"


def rootless() -> bool:
    """Whether a user without root runs us, as root of a user namespace."""
    return ROOTLESS in os.environ


def _is_ours(folder: str) -> bool:
    """Whether `folder`, made if need be, is ours alone: anybody may make one of that name in /tmp before us, and would
    have our sockets and records."""
    try:
        os.mkdir(folder, 0o700)
    except OSError:
        pass        # it is there
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return status.st_uid == os.geteuid() and status.st_mode & _KIND_AND_OTHERS == _FOLDER
