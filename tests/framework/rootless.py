"""A user who is not root, with ranges in /etc/subuid and /etc/subgid, and bundles and podman of that user's.

The user is known in a mount namespace alone, where files of ours lie over those of /etc; the host's stay as they are.
`delegated`: the user's commands run in a version 2 group of the user's, and that namespace sees no other hierarchy.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from framework.bundle import Bundle
from framework.engines import IMAGE, Engine, Podman, image, remove_groups
from framework.groups import until
from framework.run import ROOT

from hv.container.cgroups.detect import detect

FILES = ("passwd", "group", "subuid", "subgid")
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class User:
    """`hidden`: programs that are not there for the user; `devices`: device nodes that everybody may open."""

    def __init__(self, *, delegated: bool = False, hidden: tuple[str, ...] = (), devices: tuple[str, ...] = ()) -> None:
        self.id = 700_000 + os.getpid()         # two runs of the tests at once don't meet
        self.first = 0x10000000 + os.getpid() % 4096 * 65536        # 65536 subordinate ids from here on
        self.folder = Path(tempfile.mkdtemp(prefix="pyhv-u-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.group = f"pyhv-test-{os.getpid()}-{self.folder.name}"
        self.session: Path | None = None
        self.holder: subprocess.Popen[str] | None = None
        try:
            for name in ("hv", "bin"):          # the checkout may lie where this user can't go
                shutil.copytree(ROOT / name, self.folder / "checkout" / name,
                                ignore=shutil.ignore_patterns("__pycache__"))
            self.runtime = str(self.folder / "checkout/bin/pyhv-runtime")
            for leaf in ("home", "run"):
                self.own(self.folder / leaf, 0o700)
            if delegated:
                self._delegate()
            self._hold(hidden, devices)
        except BaseException:
            self.close()
            raise

    def own(self, path: Path, mode: int = 0o755) -> Path:
        """A folder of the user's, made where it is missing."""
        path.mkdir(exist_ok=True)
        for place in (path, *path.rglob("*")):
            os.lchown(place, self.id, self.id)
        path.chmod(mode)
        return path

    def _delegate(self) -> None:
        top = Path(detect().v2) / self.group
        self.session = top / "session"
        self.session.mkdir(parents=True)
        for path in (top, self.session):
            for place in (path, *(path / leaf for leaf in ("cgroup.procs", "cgroup.threads",
                                                            "cgroup.subtree_control"))):
                os.chown(place, self.id, self.id)       # cgroup-v2.rst, Model of Delegation

    def _hold(self, hidden: tuple[str, ...], devices: tuple[str, ...]) -> None:
        texts = dict.fromkeys(("subuid", "subgid"), f"somebody:{self.first}:65536\n")
        texts["passwd"] = Path("/etc/passwd").read_text() + f"somebody:x:{self.id}:{self.id}::{self.folder}/home:\n"
        texts["group"] = Path("/etc/group").read_text() + f"somebody:x:{self.id}:\n"
        lines = ["set -e"]
        for leaf, text in texts.items():
            (self.folder / leaf).write_text(text)
            lines.append(f"mount --bind {self.folder}/{leaf} /etc/{leaf}")
        lines += [f"mount --bind /dev/null {shutil.which(program)}" for program in hidden]
        for path in devices:
            node = self.folder / path.replace("/", "-")
            os.mknod(node, 0o600 | stat.S_IFCHR, os.stat(path).st_rdev)
            node.chmod(0o666)
            lines.append(f"mount --bind {node} {path}")
        if self.session:
            lines += ["umount -R -l /sys/fs/cgroup", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"]
        lines += ["echo held", "exec cat"]      # it ends with us, whatever becomes of us
        self.holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c",
                                        "\n".join(lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout and self.holder.stdout.readline() == "held\n"

    def words(self, folder: Path | None = None) -> list[str]:
        """What comes before a command of the user's, which starts in `folder`."""
        assert self.holder
        enter = ["sh", "-c", f'echo 0 >{self.session}/cgroup.procs && exec "$@"', "sh"] if self.session else []
        return [*enter, "nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "setpriv",
                f"--reuid={self.id}", f"--regid={self.id}", "--clear-groups", "--inh-caps=-all", "env", "-i",
                f"--chdir={folder or self.folder}", f"HOME={self.folder}/home", f"XDG_RUNTIME_DIR={self.folder}/run",
                "USER=somebody", f"PATH={PATH}"]

    def processes(self) -> list[int]:
        """Those of the user and of the subordinate ids; one that waits for init to ask how it ended is none."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
            except (OSError, ValueError):
                continue
            uid = int(fields["Uid"].split()[0])
            if (uid == self.id or 0 <= uid - self.first < 65536) and fields["State"][0] not in "ZX":
                found.append(int(folder.name))
        return found

    def close(self) -> None:
        """All is ended and removed; podman's process that keeps its namespaces among it."""
        def ended() -> bool:
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            return not self.processes()

        until(ended)
        if self.holder and self.holder.stdin and self.holder.stdout:
            self.holder.stdin.close()
            self.holder.wait(20)
            self.holder.stdout.close()
        remove_groups(self.group)
        shutil.rmtree(self.folder)


class UsersBundle(Bundle):
    """A bundle of the user's, which maps that user to root and 65535 subordinate ids to those after it."""

    def __init__(self, user: User) -> None:
        self.user = user
        super().__init__(Path(tempfile.mkdtemp(prefix="b-", dir=user.folder)))
        self.config["root"]["readonly"] = False
        linux = self.config["linux"]
        linux["namespaces"].append({"type": "user"})
        for kind in ("uidMappings", "gidMappings"):
            linux[kind] = [{"containerID": 0, "hostID": user.id, "size": 1},
                           {"containerID": 1, "hostID": user.first, "size": 65535}]
        user.own(self.folder)

    def call(self, *words: str, runtime: list[str] | None = None, timeout: float = 30,
             **options: Any) -> subprocess.CompletedProcess[str]:
        python = "/usr/bin/python3"     # the tests' own may lie where this user can't go
        ours = [*self.user.words(self.folder), python, "-ISE", self.user.runtime]
        return super().call(*words, runtime=ours, timeout=timeout, **options)

class UsersPodman(Podman):
    """podman of the user, with `runtime` beneath it."""

    def __init__(self, user: User, runtime: str) -> None:
        Engine.__init__(self)
        self.user, self.runtime, self.driver = user, runtime, "vfs"
        settings = self.folder / "containers.conf"
        settings.write_text('[engine]\nlock_type = "file"\n')
        self.environment = {"CONTAINERS_CONF": str(settings)}
        archive = image(self.folder)
        user.own(self.folder)
        self.call("import", str(archive), IMAGE)

    def command(self, *words: str, runtime: str = "") -> list[str]:
        return [*self.user.words(), *super().command(*words, runtime=runtime or self.runtime)]

    def new(self, verb: str, *words: str, network: str = "none") -> tuple[str, ...]:
        return (verb, "--network", network, "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", *words)


class UsersPyhv:
    """`pyhv` of the user, from the user's copy of the checkout, with the packages that it needs."""

    PACKAGES = ("click", "urllib3", "rich", "markdown_it", "mdurl", "pygments", "zstandard", "isal", "pyroute2",
                "unicorn", "capstone", "lz4")

    def __init__(self, user: User) -> None:
        self.user, self.bin = user, user.folder / "env/bin"
        packages = user.folder / f"env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        self.bin.mkdir(parents=True)
        for name in self.PACKAGES:
            found = importlib.util.find_spec(name)
            if found and found.submodule_search_locations:
                shutil.copytree(found.submodule_search_locations[0], packages / name,
                                ignore=shutil.ignore_patterns("__pycache__"))
        (self.bin / "python3").symlink_to("/usr/bin/python3")
        (self.bin / "pyhv").symlink_to(user.folder / "checkout/bin/pyhv")
        self.data, self.run = user.folder / "home/.local/share/pyhv", user.folder / "run/pyhv"

    def command(self, *words: str) -> list[str]:
        """The words that run it as the user."""
        return [*self.user.words(self.user.folder / "home"), str(self.bin / "pyhv"), *words]

    def __call__(self, *words: str, stdin: bytes = b"", timeout: float = 90,
                 **options: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(*words), input=stdin, capture_output=True, timeout=timeout, check=False,
                              **options)

    def ok(self, *words: str, **options: Any) -> str:
        """The same, which must succeed; its output."""
        done = self(*words, **options)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout.decode()

    def fails(self, code: int, *words: str, **options: Any) -> str:
        """The same, which must fail with that code and one line; the line."""
        done = self(*words, **options)
        text = done.stderr.decode()
        assert done.returncode == code, (words, done.returncode, done.stdout, text)
        assert text.startswith("pyhv: ") and text.count("\n") == 1 and "Traceback" not in text, text
        return text
