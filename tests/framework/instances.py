"""`pyhv run` and its kind in a world of their own: a store with busybox, folders, and a look at what is left."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from framework.run import PYHV

Done = subprocess.CompletedProcess[bytes]


class World:
    """A host of instances. `way`: --container or --vm, which run() and create() add."""

    def __init__(self, folder: Path, way: str = "--container") -> None:
        self.folder, self.way = folder, way
        self.data, self.run_root = folder / "data", folder / "run"
        self.env = {name: value for name, value in os.environ.items() if name not in ("PYHV_WAY", "TERM")} | {
            "PYHV_DATA": str(self.data), "PYHV_RUN": str(self.run_root)}
        self.ids: set[str] = set()

    def image(self, name: str = "busybox", **options: Any) -> None:
        """Put a busybox image into the store."""
        from framework.images import busybox_image

        from hv.image.store import Store

        busybox_image(Store(str(self.data / "images")), name, **options)

    def __call__(self, *words: str, stdin: bytes = b"", timeout: float = 60, **options: Any) -> Done:
        """`pyhv WORDS` to its end."""
        return subprocess.run([*PYHV, *words], input=stdin, capture_output=True, timeout=timeout, check=False,
                              env=self.env, **options)

    def ok(self, *words: str, **options: Any) -> str:
        """The same, which must succeed; its output."""
        done = self(*words, **options)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout.decode()

    def fails(self, code: int, *words: str, **options: Any) -> str:
        """The same, which must fail with that code, in one line; the line."""
        done = self(*words, **options)
        text = done.stderr.decode()
        assert done.returncode == code, (words, done.returncode, done.stdout, text)
        assert text.startswith("pyhv: ") and text.count("\n") == 1 and "Traceback" not in text, text
        return text

    def run(self, *words: str, **options: Any) -> Done:
        """`pyhv run` without a network, if no other is named."""
        return self("run", *self.common(words), *words, **options)

    def start(self, *words: str) -> str:
        """`pyhv run -d`; its ID."""
        return self.ok("run", "-d", *self.common(words), *words).strip()

    def common(self, words: tuple[str, ...]) -> list[str]:
        """Options that all have."""
        return [self.way, *(() if any(word.startswith("--network") for word in words) else ("--network", "none"))]

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """`pyhv WORDS`, left running."""
        return subprocess.Popen([*PYHV, *words], env=self.env, **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)

    def inspect(self, name: str) -> Any:
        """What `inspect` says of one."""
        return json.loads(self.ok("inspect", name))[0]

    def status(self, name: str) -> str:
        """running, exited, ..."""
        return str(self.inspect(name)["State"]["Status"])

    def kept(self, id: str) -> dict[str, Any]:
        """keep.json of an instance."""
        return dict(json.loads((self.run_root / "instances" / id / "keep.json").read_text()))

    def keeper(self) -> int:
        """The pid of the keeper, 0 where there is none."""
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if any("keeper.lock" in os.readlink(f"/proc/{pid}/fd/{fd}") and str(self.run_root)
                       in os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")):
                    return int(pid)
            except OSError:
                pass
        return 0

    def processes(self) -> list[tuple[int, str]]:
        """Processes that are this world's: by their environment, or by what they hold open or mapped."""
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            if int(pid) == os.getpid():
                continue
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                mine = str(self.run_root).encode() in Path(f"/proc/{pid}/environ").read_bytes()
                mine = mine or any(id[:12] in words for id in self._ids())
                mine = mine or any(id in Path(f"/proc/{pid}/cgroup").read_text() for id in self._ids())
                if mine and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append((int(pid), words))
            except OSError:
                pass
        return found

    def _ids(self) -> set[str]:
        for folder in (self.data / "instances", self.run_root / "instances", self.run_root / "runtime"):
            if folder.is_dir():
                self.ids |= {leaf for leaf in os.listdir(folder) if len(leaf) == 32}
        return self.ids

    def empty(self) -> None:
        """Remove all instances."""
        self("rm", "-f", "-v", "--all")

    def assert_nothing_left(self) -> None:
        """No process, mount, cgroup, socket, folder of an instance."""
        ids = self._ids()
        assert until(lambda: not self.processes(), 10), self.processes()
        mounts = Path("/proc/self/mounts").read_text()
        assert str(self.folder) not in mounts, [line for line in mounts.splitlines() if str(self.folder) in line]
        groups = [str(path) for id in ids for path in Path("/sys/fs/cgroup").glob(f"*/pyhv/{id}*")]
        assert not groups, groups
        instances = self.data / "instances"
        left = [leaf for leaf in os.listdir(instances) if leaf != "names"] if instances.is_dir() else []
        assert not left, left
        assert not list((instances / "names").iterdir()) if (instances / "names").is_dir() else True
        for place in ("instances", "runtime"):
            folder = self.run_root / place
            assert not folder.is_dir() or not list(folder.iterdir()), list(folder.iterdir())
        assert not (self.run_root / "keeper.sock").exists()
        users = self.data / "images" / "users"
        assert not users.is_dir() or not list(users.glob("*/*")), list(users.glob("*/*"))


class Screen:
    """`pyhv WORDS` on a terminal of 30 rows and 90 columns."""

    def __init__(self, world: World, *words: str) -> None:
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if not self.pid:
            termios.tcsetwinsize(0, (30, 90))
            os.execve(PYHV[0], [*PYHV, *words], world.env | {"TERM": "dumb"})

    def expect(self, text: bytes, seconds: float = 10) -> None:
        """Wait until it is there; what comes next is behind it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, (text, self.seen)
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    assert text in self.seen, (text, self.seen)
        _, _, self.seen = self.seen.partition(text)

    def type(self, data: bytes) -> None:
        """Press these keys."""
        os.write(self.fd, data)

    def end(self) -> int:
        """Wait for the command's end; its exit code."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return code


def world(folder: Path, way: str = "--container") -> Iterator[World]:
    """For a fixture of a module: with an image, and at the end nothing may be left."""
    made = World(folder, way)
    made.image()
    yield made
    made.empty()
    made.assert_nothing_left()


def until(condition: Callable[[], Any], seconds: float = 5) -> Any:
    """What `condition` gives once that is true; else what it gives at last."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
