"""Initramfs images: a directory as it is, or a busybox with a shell on the console."""

from __future__ import annotations

__all__ = ["busybox", "from_directory"]

import shutil
import stat
from pathlib import Path

from hv.boot.cpio import Archive
from hv.errors import ConfigError
from hv.kernels.packages import install

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_LINE = "pyhv: init is up"
INIT = f"""#!/bin/sh
echo {FIRST_LINE}
export PATH=/bin HOME=/root TERM=linux PS1='pyhv# '
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
cd /root
setsid cttyhack sh
[ -d /sys/firmware/acpi ] && poweroff -f
reboot -f
"""


def busybox(say: Callable[[str], None] = lambda text: None, init: str = INIT) -> bytes:
    """An initramfs of the system's static busybox (package busybox-static, installed if need be)."""
    program = _static_busybox()
    if program is None:
        install(("busybox-static",), say)
        program = _static_busybox()
    if program is None:
        raise ConfigError("busybox is not statically linked", "install the package busybox-static")
    archive = Archive()
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        archive.add_dir(name, 0o1777 if name == "tmp" else 0o755)
    archive.add_node("dev/console", stat.S_IFCHR | 0o600, 5, 1)
    archive.add_node("dev/null", stat.S_IFCHR | 0o666, 1, 3)
    archive.add_file("bin/busybox", program.read_bytes(), 0o755)
    # One link only: the shell runs busybox's other commands by itself (FEATURE_SH_STANDALONE).
    for name in ("sh", "mount", "setsid", "cttyhack", "poweroff", "reboot"):
        archive.add_symlink(f"bin/{name}", "busybox")
    archive.add_file("init", init.encode(), 0o755)
    return archive.finish()


def from_directory(root: str) -> bytes:
    """An initramfs of everything under `root`."""
    if not Path(root).is_dir():
        raise ConfigError(f"initramfs {root}: not a directory", "name a directory with an executable /init")
    archive = Archive()
    archive.add_tree(root)
    return archive.finish()


def _static_busybox() -> Path | None:
    for candidate in ("/bin/busybox", shutil.which("busybox") or "", "/usr/lib/initramfs-tools/bin/busybox"):
        path = Path(candidate)
        if candidate and path.is_file() and b"/ld-linux" not in path.read_bytes()[:4096]:
            return path
    return None
