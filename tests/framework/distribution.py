"""A real distribution's root file system, with Python and nginx in it: Debian's, by debootstrap; made once, and cached.

    layer = debian()            a tar archive, below pyhv's cache
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from hv.kernels import cache

SUITE = "bookworm"
PACKAGES = ("python3", "nginx-light")
_MAKE_SECONDS = 600
# What no test reads, and what is of this machine.
_LEFT_OUT = ("./var/cache/apt", "./var/lib/apt/lists", "./var/log/*.log", "./usr/share/doc", "./usr/share/locale",
             "./usr/share/man", "./etc/apt/sources.list", "./etc/resolv.conf", "./proc/*", "./sys/*", "./dev/*")


def debian() -> Path:
    """The archive; the test is skipped where there is neither one in the cache nor a way to make it."""
    key = hashlib.sha256(repr((SUITE, PACKAGES, _LEFT_OUT)).encode()).hexdigest()[:8]
    folder = cache.folder() / "roots"
    folder.mkdir(exist_ok=True)
    archive = folder / f"{SUITE}-{key}.tar"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # one of several test processes makes it, the others wait
        if not archive.exists():
            _make(archive)
    return archive


def _make(archive: Path) -> None:
    if shutil.which("debootstrap") is None or os.geteuid():
        pytest.skip("not installed: debootstrap (Debian's package), or not root")
    mirror = _mirror()
    if not mirror:
        pytest.skip("no package archive in /etc/apt/sources.list to make a Debian root from")
    with tempfile.TemporaryDirectory(dir=archive.parent) as place:
        root, fresh = f"{place}/root", f"{place}/root.tar"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, root, mirror]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=_MAKE_SECONDS, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        subprocess.run(["tar", "-C", root, "--sort=name", "--numeric-owner", "--xattrs",
                        *(f"--exclude={path}" for path in _LEFT_OUT), "-cf", fresh, "."], timeout=120, check=True)
        os.rename(fresh, archive)


def _mirror() -> str:
    """Where this host's own packages come from."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(place.read_text() for place in places if place.is_file())
    found = re.search(r"^(?:deb\s+(?:\[[^\]]*\]\s*)?|URIs:\s*)((?:https?|file|copy):\S+/debian/?)(?:\s|$)",
                      text, re.MULTILINE)
    return found[1] if found else ""
