"""podman, conmon and containerd with `pyhv-runtime` beneath them, each with folders of its own that are removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import rootfs
from framework.groups import until
from framework.run import ROOT

RUNTIME = str(ROOT / "bin" / "pyhv-runtime")
# the interpreter that the executable finds is the one that runs the tests
ENVIRONMENT = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
CGROUPS = Path("/sys/fs/cgroup")
IMAGE = "localhost/pyhv-test:1"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where a program is missing."""
    missing = [name for name in programs if not shutil.which(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (Debian's packages)")


def image(folder: Path) -> Path:
    """A tar archive of a root file system."""
    tree, archive = rootfs(folder / "tree"), folder / "image.tar"
    with tarfile.open(archive, "w") as file:
        file.add(tree, ".")
    return archive


def groups_under(name: str) -> list[Path]:
    """The cgroups named so, in all hierarchies, and all below them: the deepest first."""
    tops = [top for top in (*CGROUPS.glob(name), *CGROUPS.glob(f"*/{name}")) if top.is_dir()]
    return [path for top in tops for path in (*sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True), top)]


def remove_groups(name: str) -> None:
    """Remove them; whoever is in them is about to end."""
    def gone() -> bool:
        for path in groups_under(name):
            try:
                path.rmdir()
            except OSError:
                pass
        return not groups_under(name)

    until(gone)


class Engine:
    """A folder with a short path (sockets are bound beneath it), and a cgroup above all containers'."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pyhv-e-"))
        self.parent = f"pyhv-test-{os.getpid()}-{self.folder.name}"

    def command(self, *words: str) -> list[str]:
        raise NotImplementedError

    def call(self, *words: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command of the engine, which must end with `code`; None: with any."""
        if "input" not in options:
            options = {"stdin": subprocess.DEVNULL} | options
        # into files: what a detached container holds open is not waited for
        with (tempfile.TemporaryFile("w+", dir=self.folder) as out,
              tempfile.TemporaryFile("w+", dir=self.folder) as errors):
            done = subprocess.run(self.command(*words), text=True, stdout=out, stderr=errors, env=ENVIRONMENT,
                                  timeout=60, check=False, cwd=self.folder, **options)
            for file in (out, errors):
                file.seek(0)
            done.stdout, done.stderr = out.read(), errors.read()
        assert code is None or done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return done

    def said(self, *words: str, **options: Any) -> str:
        """Its output, without the white space around."""
        return self.call(*words, **options).stdout.strip()

    def close(self) -> None:
        remove_groups(self.parent)
        left = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.folder) in line]
        for line in reversed(left):
            subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, left
        assert not groups_under(self.parent)


class Podman(Engine):
    """podman with storage, locks and state of its own, and one image."""

    def __init__(self) -> None:
        super().__init__()
        settings = self.folder / "containers.conf"
        settings.write_text('[engine]\nlock_type = "file"\n'
                            f'[engine.runtimes]\npyhv = ["{RUNTIME}"]\n')
        self.environment = {"CONTAINERS_CONF": str(settings), "PATH": ENVIRONMENT["PATH"]}
        self.driver = "overlay" if "overlay" in Path("/proc/filesystems").read_text() else "vfs"
        self.call("import", str(image(self.folder)), IMAGE)

    def command(self, *words: str, runtime: str = RUNTIME) -> list[str]:
        places = [part for flag, leaf in (("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp"))
                  for part in (flag, str(self.folder / leaf))]
        return ["env", *(f"{name}={value}" for name, value in self.environment.items()), "podman", *places,
                "--storage-driver", self.driver, "--cgroup-manager", "cgroupfs", "--events-backend", "file",
                "--runtime", runtime, *words]

    def new(self, verb: str, *words: str, network: str = "none") -> tuple[str, ...]:
        """The words of `run` or `create`: what this host needs (limits can't be raised), then `words`."""
        return (verb, "--network", network, "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096",
                "--cgroup-parent", f"/{self.parent}", *words)

    def run(self, *words: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """A container in the foreground that is removed after; `words`: flags, then IMAGE and the program."""
        return self.call(*self.new("run", "--rm", *words), code=code, **options)

    def shell(self, script: str, *flags: str) -> str:
        """Output of a shell in a container."""
        return self.run(*flags, IMAGE, "sh", "-c", script).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.said("inspect", name))[0]
        return found

    def close(self) -> None:
        self.call("rm", "--all", "--force", "--time", "0", code=None)
        self.call("rmi", "--all", "--force", code=None)
        super().close()


class Containerd(Engine):
    """A containerd with a configuration, a root, a state folder and a socket of its own, and one image."""

    program = ("sh",)               # of the image

    def __init__(self) -> None:
        super().__init__()
        self.socket = self.folder / "c.sock"
        settings = self.folder / "config.toml"
        settings.write_text(self.settings())
        with (self.folder / "log").open("w") as log:
            self.daemon = subprocess.Popen(["containerd", "--config", str(settings)], stdout=log, stderr=log,
                                           env=ENVIRONMENT)
        assert until(lambda: self.socket.exists() and self.call("version", code=None).returncode == 0, 20)
        self.call("images", "import", str(self._archive()))

    def settings(self) -> str:
        """config.toml: nothing but what `ctr` needs."""
        return f'''version = 2
root = "{self.folder}/root"
state = "{self.folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{self.socket}"
[ttrpc]
  address = "{self.folder}/t.sock"
'''

    def _archive(self) -> Path:
        """An image as `docker save` writes it: one layer, a configuration, a manifest."""
        import hashlib

        layer = image(self.folder)
        digest = hashlib.sha256(layer.read_bytes()).hexdigest()
        about = {"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], "Cmd": self.program},
                 "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}
        (self.folder / "about.json").write_text(json.dumps(about))
        (self.folder / "manifest.json").write_text(json.dumps(
            [{"Config": "about.json", "RepoTags": [IMAGE], "Layers": ["image.tar"]}]))
        archive = self.folder / "saved.tar"
        with tarfile.open(archive, "w") as file:
            for leaf in ("manifest.json", "about.json", "image.tar"):
                file.add(self.folder / leaf, leaf)
        return archive

    def command(self, *words: str) -> list[str]:
        return ["ctr", "--address", str(self.socket), *words]

    def new(self, name: str, *flags: str) -> tuple[str, ...]:
        """The words of `run` up to the program; the container's name is `name`."""
        return ("run", "--runc-binary", RUNTIME, "--runc-root", str(self.folder / "runc"), "--cgroup",
                f"/{self.parent}/{name}", *flags, IMAGE, name)

    def run(self, name: str, *words: str, flags: tuple[str, ...] = (), code: int | None = 0,
            **options: Any) -> subprocess.CompletedProcess[str]:
        """A container in the foreground that is removed after."""
        return self.call(*self.new(name, "--rm", *flags), *words, code=code, **options)

    def task(self, name: str) -> str:
        """Its status, as `ctr task ls` has it; nothing: there is none."""
        rows = [line.split() for line in self.said("task", "ls").splitlines()[1:]]
        return next((row[2] for row in rows if row[0] == name), "")

    def close(self) -> None:
        for name in self.said("task", "ls", "-q").split():
            self.call("task", "delete", "--force", name, code=None)
        for name in self.said("container", "ls", "-q").split():
            self.call("container", "rm", name, code=None)
        self.daemon.terminate()
        self.daemon.wait(20)
        super().close()
