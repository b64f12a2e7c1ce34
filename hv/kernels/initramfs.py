"""Initramfs images: a directory as it is, a busybox with a shell on the console, or the agent alone as init.

Files and modules go on top. Modules lie in /lib/modules, and /lib/modules/order lists them as they must be loaded; the
busybox system's init loads them, and starts the agent if there is one, before the shell starts; so does the agent as
init. Driven by tests/unit/test_initramfs.py and tests/kvm/test_guest_agent.py.
"""

from __future__ import annotations

__all__ = ["AGENT", "agent_alone", "busybox", "from_directory", "place"]

import os
import shutil
import stat
from pathlib import Path

from hv.boot.cpio import Archive
from hv.errors import ConfigError
from hv.kernels.packages import install

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIRST_LINE = "pyhv: init is up"
AGENT = "bin/pyhv-agent"        # where the guest's agent is, if it is there (guests/agent)
INIT = f"""#!/bin/sh
echo {FIRST_LINE}
export PATH=/bin HOME=/root TERM=linux PS1='pyhv# '
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
[ -e /lib/modules/order ] && while read m; do insmod /lib/modules/$m.ko; done </lib/modules/order
if [ -x /{AGENT} ]; then /{AGENT} & fi
cd /root
setsid cttyhack sh
[ -d /sys/firmware/acpi ] && poweroff -f
reboot -f
"""


def busybox(say: Callable[[str], None] = lambda text: None, init: str = INIT,
            files: Sequence[tuple[str, str]] = (), modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """An initramfs of the system's static busybox (package busybox-static, installed if need be).

    `files` are (file or directory of the host, path in the guest), `modules` (name, content) in loading order.
    """
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
    _on_top(archive, files, modules)
    archive.add_file("init", init.encode(), 0o755)
    return archive.finish()


def agent_alone(program: str, files: Sequence[tuple[str, str]] = (),
                modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """An initramfs of the agent `program` as init and nothing else (docs/agent.md); the others as for busybox()."""
    archive = Archive()
    for name in ("dev", "proc", "root", "run", "sys"):
        archive.add_dir(name)
    archive.add_node("dev/console", stat.S_IFCHR | 0o600, 5, 1)
    _on_top(archive, files, modules)
    try:
        archive.add_file("init", Path(program).read_bytes(), 0o755)
    except OSError as error:
        raise ConfigError(f"{program}: {os.strerror(error.errno or 0)}", "name the agent's program") from None
    return archive.finish()


def from_directory(root: str, files: Sequence[tuple[str, str]] = (),
                   modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """An initramfs of everything under `root`; `files` and `modules` as for busybox()."""
    if not Path(root).is_dir():
        raise ConfigError(f"initramfs {root}: not a directory", "name a directory with an executable /init")
    archive = Archive()
    archive.add_tree(root)
    _on_top(archive, files, modules)
    return archive.finish()


def place(text: str) -> tuple[str, str]:
    """(file of the host, path in the guest) from `FILE[:PATH]`; without PATH it goes to /root, the shell's folder."""
    file, colon, path = text.rpartition(":")
    if not colon or Path(text).exists():
        file, path = text, ""
    if not Path(file).exists():
        raise ConfigError(f"--add {file}: no such file or directory", "FILE, or FILE:PATH for another place than /root")
    if path in ("", "/") or path.endswith("/"):
        path = f"{path or 'root/'}{Path(file).resolve().name}"
    return file, path.strip("/")


def _on_top(archive: Archive, files: Sequence[tuple[str, str]], modules: Sequence[tuple[str, bytes]]) -> None:
    for file, path in files:
        source = Path(file)
        if source.is_dir():
            archive.add_dir(path)
            archive.add_tree(file, path)
            continue
        try:
            archive.add_file(path, source.read_bytes(), source.stat().st_mode)
        except OSError as error:
            raise ConfigError(f"{file}: {os.strerror(error.errno or 0)}", "name a file that can be read") from None
    for name, content in modules:
        archive.add_file(f"lib/modules/{name}.ko", content)
    if modules:
        archive.add_file("lib/modules/order", "".join(f"{name}\n" for name, _ in modules).encode())


def _static_busybox() -> Path | None:
    for candidate in ("/bin/busybox", shutil.which("busybox") or "", "/usr/lib/initramfs-tools/bin/busybox"):
        path = Path(candidate)
        if candidate and path.is_file() and b"/ld-linux" not in path.read_bytes()[:4096]:
            return path
    return None
