"""Which kernel a sandbox boots: the newest of its flavour in the cache, or a file that is named.

The cache is hv/kernels/cache.py's, without its imports. Driven by tests/unit/test_sandbox_spec.py.
"""

from __future__ import annotations

__all__ = ["find_kernel"]

import os

from hv.errors import ConfigError

_FILES = ("vmlinux", "bzImage", "vmlinuz")      # the first is unpacked already


def find_kernel(named: str, cpus: int) -> str:
    """The path of `named`, a file or a flavour; "": micro, or smp for more than one processor. ConfigError."""
    if "/" in named or os.path.isfile(named):
        if not os.path.isfile(named):
            raise ConfigError(f"kernel {named}: no such file", "name a vmlinux or bzImage, or a flavour: micro, smp")
        return os.path.abspath(named)
    flavour = named or ("micro" if cpus == 1 else "smp")
    base = f"{cache_folder()}/kernels"
    try:
        found = [f"{base}/{leaf}" for leaf in os.listdir(base) if leaf.startswith(f"{flavour}-")]
    except OSError:
        found = []
    for folder in sorted(found, key=lambda path: os.stat(path).st_mtime, reverse=True):
        for leaf in _FILES:
            if os.path.isfile(f"{folder}/{leaf}"):
                return f"{folder}/{leaf}"
    raise ConfigError(f"there is no {flavour} kernel for the VM",
                      f"once: pyhv kernel build {flavour}" if flavour in ("micro", "smp") else
                      "`pyhv kernel list` shows those there are")


def cache_folder() -> str:
    """As hv/kernels/cache.py has it."""
    return os.environ.get("PYHV_CACHE") or (
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) + "/pyhv"
