"""Bundles for container tests: a busybox root file system and a config.json like the one `runc spec` writes."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from framework.run import ROOT

BUSYBOX = "/bin/busybox"
RUNTIME = [sys.executable, "-ISE", str(ROOT / "bin" / "pyhv-runtime")]
APPLETS = ("sh", "true", "false", "cat", "echo", "id", "ls", "mount", "ps", "env", "sleep", "stat", "hostname", "kill",
           "pwd", "touch", "mkdir", "rm", "readlink", "chmod", "chown", "head", "dd", "test", "sync", "stty", "tty",
           "ip", "nproc", "umount", "ln", "mknod", "nc", "uname", "find", "wc", "sort", "cut", "grep", "seq", "cp",
           "setsid", "od", "sed", "tr")
CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces and mounts: needs root")
needs_busybox = pytest.mark.skipif(not os.path.exists(BUSYBOX), reason="busybox is not installed (busybox-static)")
container = [needs_root, needs_busybox]


def rootfs(place: Path) -> Path:
    """A root file system of busybox alone."""
    for leaf in ("bin", "etc", "proc", "sys", "dev", "tmp", "root"):
        (place / leaf).mkdir(parents=True, exist_ok=True)
    (place / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, place / "bin/busybox")
    for name in APPLETS:
        (place / "bin" / name).symlink_to("busybox")
    (place / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nsomebody:x:1000:1000::/tmp:/bin/sh\n")
    return place


def config(*args: str) -> dict[str, Any]:
    """What `spec` of the runtime writes, without a terminal, running `args`."""
    from hv.cli.oci_spec import default_config

    made = copy.deepcopy(default_config())
    made["process"] |= {"args": list(args), "terminal": False}
    return made


def plain_signals(text: str) -> str:
    """`text` of /proc/self/status without what glibc's posix_spawn ignores of its own, where a process has cancelled a
    thread: SIGCANCEL and SIGSETXID (sysdeps/unix/sysv/linux/spawni.c). Who started the tests decides that."""
    return re.sub(r"(SigIgn:\s+)([0-9a-f]{16})",
                  lambda found: f"{found[1]}{int(found[2], 16) & ~(3 << 31):016x}", text)


class Bundle:
    """A bundle folder, and the runtime's commands on it with a state folder of its own."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = folder
        self.name = name or f"t{os.getpid()}-{folder.name}"
        self.state = folder / "state"
        self.rootfs = rootfs(folder / "rootfs")
        self.config = config("true")

    def write(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.config))

    def call(self, *words: str, runtime: list[str] | None = None, timeout: float = 30,
             **options: Any) -> subprocess.CompletedProcess[str]:
        """Any command of the runtime; output as text."""
        command = [*(runtime or RUNTIME), "--root", str(self.state), *words]
        options = {"stdin": subprocess.DEVNULL, "capture_output": True} | options
        return subprocess.run(command, text=True, timeout=timeout, check=False, cwd=self.folder, **options)

    def run(self, *args: str, runtime: list[str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """`run` of `args`, to its end."""
        if args:
            self.config["process"]["args"] = list(args)
        self.write()
        return self.call("run", self.name, runtime=runtime, **options)

    def shell(self, script: str, **options: Any) -> str:
        """Output of a script that must succeed."""
        done = self.run("sh", "-c", script, **options)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return plain_signals(str(done.stdout))

    def create(self, *args: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """`create` of `args`. Output is discarded: the container would hold it open."""
        self.config["process"]["args"] = list(args)
        self.write()
        errors = self.folder / "errors"
        with errors.open("w") as file:
            done = self.call("create", *flags, self.name, capture_output=False, stdout=subprocess.DEVNULL, stderr=file)
        done.stderr = errors.read_text()
        return done

    def status(self) -> str:
        done = self.call("state", self.name)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else "gone"

    def pid(self) -> int:
        return int(json.loads(self.call("state", self.name).stdout)["pid"])

    def gone(self) -> None:
        """Nothing is left: no state, no cgroup, no mount."""
        assert not self.state.exists() or not list(self.state.iterdir())
        left = list(Path("/sys/fs/cgroup").glob(f"*/pyhv-{self.name}*"))
        assert not left, left
        assert str(self.folder) not in Path("/proc/self/mounts").read_text()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.state.exists():
            for name in os.listdir(self.state):
                self.call("delete", "--force", name)


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    with Bundle(tmp_path) as made:
        yield made
        for name in os.listdir(made.state) if made.state.exists() else ():
            made.call("delete", "--force", name)
        made.gone()
