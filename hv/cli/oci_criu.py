"""`checkpoint` and `restore`: refused, by name and with the reason.

Both would be CRIU's work (criu.org), which this runtime does not drive yet: a restore needs the container's mounts,
cgroups and descriptors laid out again for it, and nothing here has been run with it. Driven by
tests/root/test_container_commands.py.
"""

from __future__ import annotations

__all__ = ["command_checkpoint", "command_restore", "find_criu"]

import os

from hv.cli.oci import Context
from hv.errors import ConfigError, HvError

_PLACES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def find_criu(name: str = "criu") -> str:
    """The path of criu; "" where it is not installed."""
    for place in [""] if "/" in name else [folder + "/" for folder in _PLACES]:
        if os.access(place + name, os.X_OK):
            return place + name
    return ""


def _refuse(command: str) -> HvError:
    if not find_criu():
        return ConfigError(f"{command}: criu is not installed on this host", "nor would this runtime drive it yet")
    return ConfigError(f"{command}: this runtime does not drive criu yet", "`pause` stops the processes in place")


def command_checkpoint(context: Context, arguments: list[str]) -> int:
    """checkpoint [flags] ID"""
    raise _refuse("checkpoint")


def command_restore(context: Context, arguments: list[str]) -> int:
    """restore [flags] ID"""
    raise _refuse("restore")
