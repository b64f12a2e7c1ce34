"""This interpreter, and this checkout's code, inside a real Linux guest: tests of what the host's kernel can't do.

The guest's root file system is a shared folder with busybox, a few libraries and the init below; the interpreter's
installation and the checkout are two more, read-only, at the places that they have on the host. Functions of a module
under tests/ are called by name (framework/guest_agent.py answers), so that their results can be looked at out here.
"""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from framework.linux import kernel
from framework.run import ROOT

from hv import Machine, MachineConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.kernels.initramfs import _static_busybox

PORT = 5000
PYTHON = Path(os.path.realpath(sys.executable))
PREFIX = Path(sys.base_prefix)
FOLDERS = ("bin", "dev", "proc", "sys", "tmp", "run", "root", "etc", "lib", "lib64")
APPLETS = ("sh", "mount", "echo", "sleep")
CACHED = 100000.0       # seconds for which the guest trusts what can't change under it

# process 1 is a shell: it reaps what ends without a parent
INIT = """#!/bin/sh
export PATH=/bin HOME=/root
mount -a
{python} -ISE {checkout}/tests/framework/guest_agent.py {port} {checkout} {checkout}/tests
echo agent: $?
sleep 1000
"""
# one program mounts all: starting one takes half a second where ring 0 is emulated
FSTAB = """proc /proc proc defaults 0 0
sysfs /sys sysfs defaults 0 0
cgroup2 /sys/fs/cgroup cgroup2 nsdelegate 0 0
tmpfs /run tmpfs defaults 0 0
python {prefix} virtiofs ro 0 0
checkout {checkout} virtiofs ro 0 0
"""
# Expedited grace periods: nobody else is slowed down. nokmem: accounting of each object takes an emulated processor
# long. One processor to begin with: one waits for the other whenever memory is unmapped. noreplace-smp: no patching of
# lock prefixes away and back. Huge pages are for a limit.
CMDLINE = ("rootfstype=virtiofs root=root rw init=/init rcupdate.rcu_expedited=1 rcupdate.rcu_cpu_stall_suppress=1 "
           "cgroup.memory=nokmem maxcpus=1 noreplace-smp hugepages=4")


class GuestError(AssertionError):
    """A function failed in the guest; the text is its traceback there."""


class GuestPython:
    """A booted guest that calls functions of `module`. `folder` is empty and becomes its root file system."""

    def __init__(self, folder: Path, module: str, *, cpus: int = 2, memory: int = 192 << 20,
                 devices: tuple[Any, ...] = (), timeout: float = 900) -> None:
        self.module = module
        self.seconds: dict[str, float] = {}
        _fill(folder)
        shares = (ShareConfig(folder, tag="root"), ShareConfig(PREFIX, tag="python", readonly=True, timeout=CACHED),
                  ShareConfig(ROOT, tag="checkout", readonly=True, timeout=CACHED))
        self.machine = Machine(MachineConfig(str(kernel("image") / "vmlinux"), cmdline=CMDLINE, cpus=cpus,
                                             memory=memory, devices=(*shares, VsockConfig(None), *devices),
                                             timeout=timeout))
        try:
            listener = self.machine.devices["vsock0"].listen(PORT)      # type: ignore[attr-defined]
            self.machine.start()
            try:
                self.stream = listener.accept(120)
            finally:
                listener.close()
        except BaseException as error:
            text = self.printed()
            self.machine.close()
            raise AssertionError(f"no Python in the guest: {error}\n{text}") from error

    def printed(self) -> str:
        """What came on the guest's console."""
        return bytes(self.machine.console.output).decode(errors="replace")

    def call(self, function: str, timeout: float = 120, **arguments: Any) -> Any:
        """Call a function of the module in there; what it returned, through JSON."""
        self.stream.settimeout(timeout)
        request = {"function": f"{self.module}.{function}", "arguments": arguments}
        self.stream.sendall(json.dumps(request).encode() + b"\n")
        line = b""
        try:
            while not line.endswith(b"\n"):
                data = self.stream.recv(1 << 16)
                assert data, f"the guest hung up\n{self.printed()}"
                line += data
        except TimeoutError:
            raise GuestError(f"{function}: no answer in {timeout} s\n{self.printed()[-3000:]}") from None
        answer = json.loads(line)
        if "error" in answer:
            raise GuestError(answer["error"])
        self.seconds[function] = answer["seconds"]
        return answer["value"]

    def close(self) -> None:
        self.stream.close()
        self.machine.close()

    def __enter__(self) -> GuestPython:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _fill(root: Path) -> None:
    """A root file system that has what the interpreter needs from outside its installation."""
    busybox = _static_busybox()
    assert busybox is not None
    root.chmod(0o755)               # the guest's other users look into it as well
    for name in FOLDERS:
        (root / name).mkdir(exist_ok=True)
    for place in (PREFIX, ROOT):
        (root / str(place).lstrip("/")).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox, root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    programs = [str(PYTHON), getattr(_ctypes, "__file__", "")]
    listed = subprocess.run(["ldd", *filter(None, programs)], capture_output=True, text=True, check=True,
                            timeout=60).stdout
    for word in listed.split():
        if word.startswith("/") and not word.endswith(":") and not Path(word).is_relative_to(PREFIX):
            target = root / word.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(os.path.realpath(word), target)
            target.chmod(0o755)
    (root / "etc/fstab").write_text(FSTAB.format(prefix=PREFIX, checkout=ROOT))
    (root / "init").write_text(INIT.format(checkout=ROOT, python=PYTHON, port=PORT))
    (root / "init").chmod(0o755)
