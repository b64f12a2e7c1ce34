"""Which kernel a sandbox boots: the newest of a flavour in the cache, or a file that is named.

The cache is hv/kernels/cache.py's, without its imports. Driven by tests/unit/test_sandbox_spec.py.
"""

from __future__ import annotations

__all__ = ["find_kernel"]

import os

from hv.errors import ConfigError

# flavour (guests/linux/FLAVOUR.config), processors it can have. Images may hold what needs more than the others have.
DEFAULTS = (("image", 4), ("micro", 1), ("smp", 64))
_FLAVOURS = tuple(flavour for flavour, _ in DEFAULTS)
_FILES = ("vmlinux", "bzImage", "vmlinuz")      # the first is unpacked already


def find_kernel(named: str, cpus: int) -> str:
    """The path of `named`, a file or a flavour; "": the first of DEFAULTS that is there. ConfigError."""
    if "/" in named or os.path.isfile(named):
        if not os.path.isfile(named):
            raise ConfigError(f"kernel {named}: no such file", "name a vmlinux or bzImage, or a flavour: image, micro")
        return os.path.abspath(named)
    wanted = [named] if named else [flavour for flavour, most in DEFAULTS if cpus <= most]
    for flavour in wanted:
        if found := _built(flavour):
            return found
    if named and named not in _FLAVOURS:
        raise ConfigError(f"there is no {named} kernel for the VM", "`pyhv kernel list` shows those there are")
    raise ConfigError(f"there is no {wanted[0]} kernel for the VM", f"once: pyhv kernel build {wanted[0]}")


def _built(flavour: str) -> str:
    base = f"{cache_folder()}/kernels"
    try:
        found = [f"{base}/{leaf}" for leaf in os.listdir(base) if leaf.startswith(f"{flavour}-")]
    except OSError:
        return ""
    for folder in sorted(found, key=lambda path: os.stat(path).st_mtime, reverse=True):
        for leaf in _FILES:
            if os.path.isfile(f"{folder}/{leaf}"):
                return f"{folder}/{leaf}"
    return ""


def cache_folder() -> str:
    """As hv/kernels/cache.py has it."""
    return os.environ.get("PYHV_CACHE") or (
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) + "/pyhv"
