"""Containers on disk: one folder each under the runtime's root, and what state a container is in.

    ROOT/ID/state.json      written whole, by rename
    ROOT/ID/start.sock      while created: whoever connects lets the program go
    ROOT/ID/lock            held (flock) by the command that changes something

A process is known by pid and start time, so that a pid that came again is not taken for it. Driven by
tests/unit/test_container_state.py.
"""

from __future__ import annotations

__all__ = ["Record", "default_root", "start_time"]

import fcntl
import os

from hv.container.plainjson import dumps, loads
from hv.errors import ConfigError, HvError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION = "1.2.0"
CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"
_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_ID_MOST = 1024


def default_root() -> str:
    """/run/pyhv for root, else a folder of the user's own."""
    if os.geteuid() == 0:
        return "/run/pyhv"
    return (os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/pyhv-{os.geteuid()}") + "/pyhv"


def start_time(pid: int) -> int:
    """When process `pid` was started, in clock ticks since boot (proc(5), field 22); 0 where there is none, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


class Record:
    """One container's folder. `data` is what state.json holds."""

    def __init__(self, root: str, name: str) -> None:
        if not name or len(name) > _ID_MOST or not _ALLOWED.issuperset(name) or name in (".", ".."):
            raise ConfigError(f"container id {name!r}", "letters, digits and _ + - . only")
        self.name = name
        self.folder = f"{root}/{name}"
        self.socket = f"{self.folder}/start.sock"
        self.data: dict[str, Any] = {}
        self._lock = -1

    # making, loading -------------------------------------------------------------------------------

    def make(self) -> None:
        """The folder, new and locked. StateError where the name is taken."""
        try:
            os.makedirs(os.path.dirname(self.folder), 0o700, exist_ok=True)
            os.mkdir(self.folder, 0o711)
        except FileExistsError:
            raise StateError(f"container {self.name} exists", f"choose another id, or: delete {self.name}") from None
        except OSError as error:
            raise HvError(f"{self.folder}: {os.strerror(error.errno or 0)}", "choose a writable --root") from None
        self.lock()

    def load(self) -> Record:
        """Read state.json. StateError where there is no such container."""
        try:
            with open(f"{self.folder}/state.json") as file:
                self.data = loads(file.read())
        except FileNotFoundError:
            raise StateError(f"container {self.name} does not exist", "`list` shows those that do") from None
        except (OSError, ValueError) as error:
            raise HvError(f"{self.folder}/state.json: {error}", f"delete --force {self.name}") from None
        return self

    def save(self) -> None:
        """Write state.json, whole or not at all."""
        fresh = f"{self.folder}/state.json.new"
        with open(fresh, "w") as file:
            file.write(dumps(self.data))
        os.rename(fresh, f"{self.folder}/state.json")

    def lock(self) -> None:
        """Wait until no other command changes this container, and keep others out until unlock()."""
        if self._lock < 0:
            try:
                self._lock = os.open(f"{self.folder}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                raise StateError(f"container {self.name} does not exist", "`list` shows those that do") from None
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def unlock(self) -> None:
        """Let others in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the folder."""
        for leaf in ("start.sock", "state.json.new", "state.json", "lock"):
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
        return pid if pid and start_time(pid) == self.data.get("pid_start") else 0

    def status(self, frozen: bool = False) -> str:
        """runtime-spec, runtime.md, State; `frozen`: what the cgroup's freezer says."""
        if not self.data.get("pid"):
            return CREATING if self.data.get("creating") else STOPPED
        if not self.pid:
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
