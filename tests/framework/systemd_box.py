"""A real systemd: process 1 of a container of our own runtime, its root an overlay of the host's, nothing of it kept.

    with Box("hybrid") as box:
        box.output("systemctl", "is-system-running")

`kind` says which hierarchies it sees: those of the host (hybrid), version 1 alone (legacy), version 2 alone (unified).
It starts a target of its own with the bus and nothing else, and sees none of the host's processes, groups or networks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, config, rootfs
from framework.groups import until
from framework.run import ROOT

SYSTEMD = "/lib/systemd/systemd"
needs_systemd = pytest.mark.skipif(not os.path.exists(SYSTEMD) or not shutil.which("dbus-daemon"),
                                   reason="systemd or dbus is not installed")
_CAPABILITIES = ["CAP_" + name for name in (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_ADMIN",
    "NET_BIND_SERVICE", "NET_RAW", "IPC_OWNER", "SYS_CHROOT", "SYS_PTRACE", "SYS_ADMIN", "SYS_RESOURCE", "SYS_NICE",
    "MKNOD", "SETFCAP", "AUDIT_WRITE", "BPF", "PERFMON")]
# man 7 kernel-command-line; in a version 1 layout systemd mounts version 2 beside it unless it is told not to
_COMMAND_LINE = {"legacy": "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1"}
_BEFORE = {"unified": "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && "}
# instead of Debian's, which would set the clock, kernel variables, file systems
_UNITS = {
    "sysinit.target": "[Unit]\nDefaultDependencies=no\n", "basic.target": "[Unit]\nDefaultDependencies=no\n",
    "box.target": "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\nAfter=dbus.socket\n"}
INSIDE = {"PATH": f"{os.path.dirname(sys.executable)}:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}


class Box:
    """systemd, and a bundle at /bundle for containers in it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.folder = Path(tempfile.mkdtemp(prefix="pyhv-sd-"))
        self.name = f"pyhv-box-{os.getpid()}-{kind}"
        self.root = self.folder / "rootfs"
        self._mounted: list[Path] = []
        self.config = config("true")

    def __enter__(self) -> Box:
        try:
            self._mount("tmpfs", self.folder, "mode=755")
            for leaf in ("upper", "work", "rootfs"):
                (self.folder / leaf).mkdir()
            self._mount("overlay", self.root, f"lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work")
            units = self.root / "etc/systemd/system"
            for place in (units, *(self.root / "usr/lib/systemd/system").glob("*.wants")):
                shutil.rmtree(place)
            units.mkdir()
            for name, text in _UNITS.items():
                (units / name).write_text(text)
            rootfs(self.root / "bundle/rootfs")
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _mount(self, kind: str, place: Path, options: str) -> None:
        subprocess.run(["mount", "-t", kind, "-o", options, kind, str(place)], check=True, timeout=20)
        self._mounted.append(place)

    def _start(self) -> None:
        made = config("sh", "-c", f"{_BEFORE.get(self.kind, '')}exec {SYSTEMD} --log-target=console --log-level=info "
                                  "--show-status=no --unit=box.target")
        process = made["process"]
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES)
        process["env"] = ["container=pyhv", f"SYSTEMD_PROC_CMDLINE={_COMMAND_LINE.get(self.kind, '')}",
                          *(f"{key}={text}" for key, text in INSIDE.items())]
        process["noNewPrivileges"] = False
        process.pop("rlimits", None)
        made["root"] = {"path": "rootfs", "readonly": False}
        made["linux"] |= {"resources": {"devices": [{"allow": True, "access": "rwm"}]}, "maskedPaths": []}
        made["linux"].pop("seccomp", None)
        made["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network", "cgroup")]
        made["mounts"] = [row for row in made["mounts"] if not row["destination"].startswith("/sys")] + [
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "rw"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
            {"destination": str(ROOT), "type": "bind", "source": str(ROOT), "options": ["rbind", "ro"]}]
        (self.folder / "config.json").write_text(json.dumps(made))
        with (self.folder / "log").open("w") as log:
            subprocess.run([*RUNTIME, "--root", str(self.folder / "state"), "run", "--detach", "--bundle",
                            str(self.folder), self.name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True,
                           timeout=30)
        try:
            until(lambda: self.call("systemctl", "is-active", "box.target").returncode == 0, 20)
        except AssertionError:
            raise AssertionError((self.folder / "log").read_text()) from None

    def call(self, *words: str, user: int = 0, environment: dict[str, str] | None = None,
             **options: Any) -> subprocess.CompletedProcess[str]:
        """A command inside, output as text."""
        pairs = INSIDE | (environment or {})
        flags = [part for key, text in pairs.items() for part in ("--env", f"{key}={text}")]
        options = {"stdin": subprocess.DEVNULL} | options
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            # into files: what a detached container holds open is not waited for
            done = subprocess.run([*RUNTIME, "--root", str(self.folder / "state"), "exec", *flags, "--user", str(user),
                                   self.name, *words], stdout=out, stderr=errors, text=True, timeout=60, check=False,
                                  **options)
            for file in (out, errors):
                file.seek(0)
            done.stdout, done.stderr = out.read(), errors.read()
        return done

    def output(self, *words: str, **options: Any) -> str:
        """What a command that must succeed prints."""
        done = self.call(*words, **options)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout.strip()

    def runtime(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Our runtime in there, with --systemd-cgroup."""
        return self.call(*self.command(*words), **options)

    def command(self, *words: str) -> list[str]:
        """The words of that."""
        return [*RUNTIME, "--systemd-cgroup", *words]

    def write(self) -> None:
        (self.root / "bundle/config.json").write_text(json.dumps(self.config))

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit."""
        text = self.output("systemctl", "show", unit, *(part for name in names for part in ("-p", name)))
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def close(self) -> None:
        if (self.folder / "state").exists():
            subprocess.run([*RUNTIME, "--root", str(self.folder / "state"), "delete", "--force", self.name],
                           check=False, timeout=60)
        for place in reversed(self._mounted):
            subprocess.run(["umount", "-l", str(place)], check=False, timeout=20)
        self.folder.rmdir()
        left = [str(found) for found in Path("/sys/fs/cgroup").glob(f"*/{self.name}*")]
        left += [found for found in Path("/proc/self/mounts").read_text().splitlines() if str(self.folder) in found]
        assert not left, left
