"""`pyhv-vm-runtime` for tests: bundles in VMs whose templates are the test session's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from framework.bundle import Bundle
from framework.linux import kernel
from framework.run import ROOT

from hv.kernels import cache

VM_RUNTIME = [sys.executable, "-ISE", str(ROOT / "bin" / "pyhv-vm-runtime")]
PATIENCE = 90               # seconds for a command: the first one boots the template, and hosts are slow


class VmHome:
    """Where VMs of this session keep their templates. `runtime` is an executable for engines, which pass on nothing."""

    def __init__(self, folder: Path) -> None:
        kernel("micro")
        self.folder = folder
        self.environment = {"PYHV_DATA": str(folder / "data"), "PYHV_RUN": str(folder / "run"),
                            "PYHV_CACHE": str(cache.folder())}
        self.runtime = folder / "runtime"
        settings = "\n".join(f"export {name}='{value}'" for name, value in self.environment.items())
        self.runtime.write_text(f"#!/bin/sh\n{settings}\nexec {' '.join(VM_RUNTIME)} \"$@\"\n")
        self.runtime.chmod(0o755)
        (folder / "first").mkdir()
        done = self.bundle(folder / "first").run("true")     # which boots the template
        assert done.returncode == 0 and done.stderr.count("\n") <= 1, done.stderr

    def bundle(self, folder: Path, name: str = "") -> Bundle:
        """A bundle whose commands are the VM runtime's."""
        return VmBundle(self, folder, name)


class VmBundle(Bundle):
    """See Bundle."""

    def __init__(self, home: VmHome, folder: Path, name: str = "") -> None:
        super().__init__(folder, name)
        self.home = home
        self.config["process"]["env"] = ["PATH=/bin", "TERM=xterm"]
        self.config["root"]["readonly"] = False

    def call(self, *words, runtime=None, timeout=PATIENCE, **options):     # type: ignore[no-untyped-def]
        options = {"env": os.environ | self.home.environment} | options
        return super().call(*words, runtime=runtime or VM_RUNTIME, timeout=timeout, **options)
