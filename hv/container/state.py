"""Containers on disk: one folder each under the runtime's root, and what state a container is in.

    ROOT/ID/                locked (flock) by the command that changes something
    ROOT/ID/state.json      written whole, by rename
    ROOT/ID/config.json     the configuration as it was when the container was made
    ROOT/ID/start.sock      while created: whoever connects lets the program go

A process is known by pid and start time, so that a pid that came again is not taken for it. Driven by
tests/unit/test_container_state.py.
"""

from __future__ import annotations

__all__ = ["CREATED", "CREATING", "OCI_VERSION", "PAUSED", "RUNNING", "STOPPED", "Record", "default_root", "now",
           "rootless", "start_time", "write_whole"]

import os
from fcntl import LOCK_EX, flock
from time import gmtime, time_ns

from hv.container.fields import check
from hv.errors import ConfigError, HvError, StateError
from hv.linux.signals import Held
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION = "1.2.0"
CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"
_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_ID_MOST = 1024


def rootless() -> bool:
    """Whether we lack the host's root: another user, or root of a user namespace (man 7 user_namespaces)."""
    if os.geteuid():
        return True
    try:
        with open("/proc/self/uid_map", "rb", 0) as file:
            return file.read().split() != [b"0", b"0", b"4294967295"]
    except OSError:
        return False


def default_root() -> str:
    """/run/pyhv for root, else a folder of the user's own.

    An engine of such a user calls us as root of a user namespace, with the user's environment; one who has logged in
    as root there has USER=root. runc draws the same line.
    """
    own = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0 and not (own and os.environ.get("USER") != "root" and rootless()):
        return "/run/pyhv"
    return (own or f"/tmp/pyhv-{os.geteuid()}") + "/pyhv"


def start_time(pid: int) -> int:
    """When process `pid` was started, in clock ticks since boot (proc(5), field 22); 0: there is none, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def now() -> str:
    """The time as RFC 3339 has it, in UTC."""
    moment = time_ns()
    clock = gmtime(moment // 1_000_000_000)
    year, month, day, hour, minute, second = clock[:6]
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{moment % 1_000_000_000:09}Z"


class Record:
    """One container's folder. `data` is what state.json holds."""

    def __init__(self, root: str, name: str) -> None:
        if not name or len(name) > _ID_MOST or not _ALLOWED.issuperset(name) or name in (".", ".."):
            raise ConfigError(f"container id {name!r:.80}", "letters, digits and _ + - . only")
        self.name = name
        self.folder = f"{root}/{name}"
        self.socket = f"{self.folder}/start.sock"
        self.data: dict[str, Any] = {}
        self.made = False           # by make(), and so ours to remove
        self._lock = -1

    # making, loading -------------------------------------------------------------------------------

    def make(self) -> None:
        """The folder, new and locked. StateError where the name is taken."""
        try:
            with Held():
                try:
                    os.mkdir(self.folder, 0o700)
                except FileNotFoundError:
                    os.makedirs(os.path.dirname(self.folder), 0o700, exist_ok=True)
                    os.mkdir(self.folder, 0o700)
                self.made = True
        except FileExistsError:
            raise StateError(f"container {self.name} exists", f"choose another id, or: delete {self.name}") from None
        except OSError as error:
            raise HvError(f"{self.folder}: {os.strerror(error.errno or 0)}", "choose a writable --root") from None
        self.lock()

    def load(self) -> Record:
        """Read state.json. StateError where there is no such container."""
        try:
            with open(f"{self.folder}/state.json", "rb", 0) as file:
                self.data = check(loads(file.read().decode()), dict, "the state")
        except FileNotFoundError:
            if os.path.isdir(self.folder):
                raise HvError(f"container {self.name} was never finished",
                              f"its creation is under way or was broken off: delete --force {self.name}") from None
            raise StateError(f"container {self.name} does not exist", "`list` shows those that do") from None
        except (OSError, ValueError, HvError) as error:
            raise HvError(f"{self.folder}/state.json: {error}", f"delete --force {self.name}") from None
        return self

    def save(self) -> None:
        """Write state.json, whole or not at all."""
        write_whole(f"{self.folder}/state.json", dumps(self.data).encode())

    def save_config(self, text: bytes) -> None:
        """Keep a copy of config.json as it was when the container was made."""
        write_whole(f"{self.folder}/config.json", text)

    @property
    def config(self) -> str:
        """The path of that copy."""
        return f"{self.folder}/config.json"

    def lock(self) -> None:
        """Wait until no other command changes this container, and keep others out until unlock()."""
        while self._lock < 0:
            fd = -1
            try:
                # the folder itself: a file in it could be made again while somebody removes the folder
                fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                flock(fd, LOCK_EX)
                held, found = os.fstat(fd), os.stat(self.folder)
            except OSError:
                if fd >= 0:
                    os.close(fd)
                raise StateError(f"container {self.name} does not exist", "`list` shows those that do") from None
            if (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino):
                self._lock = fd
            else:
                os.close(fd)        # deleted while we waited; there is a new one of that name

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, -1 where it is not held."""
        return self._lock

    def unlock(self) -> None:
        """Let others in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the folder."""
        try:
            leaves = os.listdir(self.folder)
        except OSError:
            return
        for leaf in leaves:
            try:
                os.unlink(f"{self.folder}/{leaf}")
            except OSError:
                pass
        try:
            os.rmdir(self.folder)
        except OSError as error:
            raise HvError(f"{self.folder}: {os.strerror(error.errno or 0)}", "remove it by hand") from None

    # what state it is in ---------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The first process's pid, 0 where there is none (yet, or any more)."""
        pid = int(self.data.get("pid", 0))
        started = start_time(pid) if pid else 0
        return pid if started and started == self.data.get("pid_start") else 0

    def status(self, frozen: bool = False) -> str:
        """runtime-spec, runtime.md, State; `frozen`: what the cgroup's freezer says."""
        pid = self.pid
        if self.data.get("creating"):
            return CREATING if pid or not self.data.get("pid") else STOPPED
        if not pid:
            return STOPPED
        if frozen:
            return PAUSED
        return CREATED if os.path.exists(self.socket) else RUNNING

    def oci_state(self, status: str) -> dict[str, Any]:
        """The state that hooks get on standard input and `state` prints (runtime-spec, runtime.md, State)."""
        state = {"ociVersion": OCI_VERSION, "id": self.name, "status": status, "pid": 0 if status == STOPPED else
                 int(self.data.get("pid", 0)), "bundle": self.data.get("bundle", "")}
        if self.data.get("annotations"):
            state["annotations"] = self.data["annotations"]
        return state


def write_whole(path: str, content: bytes) -> None:
    """The file has its old content or all of the new, never a part. HvError where the disk is full or the like."""
    fresh = f"{path}.new"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            while content:
                content = content[os.write(fd, content):]
        finally:
            os.close(fd)
        os.rename(fresh, path)
    except OSError as error:
        raise HvError(f"{path}: {os.strerror(error.errno or 0)}") from None
