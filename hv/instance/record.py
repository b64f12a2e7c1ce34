"""One instance on disk, and how it is.

    DATA/instances/ID/              locked (flock) by the command that changes something
        instance.json               what it is to be: settings, image; written once
        state.json                  how it last was: status, exit code, times, restarts; not there: never started
        upper/, work/               what it has written (overlayfs)
        hosts, hostname, resolv.conf    bound into it
        log.json, log.json.1, ...   its output (logfile.py)
    DATA/instances/names/NAME       symbolic link to ID; making it is how a name is taken
    RUN/instances/ID/               gone with a reboot
        keep.json                   the process that holds its streams (holder.py): pid, start time, descriptors
        status                      how its program ended, written by that process
        root/                       mount point, in that process's mount namespace only
        began                       it was started, and what it had is not given back yet
        stopping                    somebody has asked it to stop: it is not restarted
    RUN/runtime/ID/                 the container's own record (hv/container/state.py)

A process is known by pid and start time. Driven by tests/unit/test_instance_record.py.
"""

from __future__ import annotations

__all__ = ["CREATED", "EXITED", "PAUSED", "RESTARTING", "RUNNING", "UNKNOWN_CODE", "Instance", "instances_root",
           "run_folder"]

import os
from fcntl import LOCK_EX, LOCK_NB, flock

from hv.container.state import now, start_time, write_whole
from hv.errors import HvError, StateError
from hv.instance.settings import Settings
from hv.places import data_root, run_root
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CREATED, RUNNING, PAUSED, RESTARTING, EXITED = "created", "running", "paused", "restarting", "exited"
UNKNOWN_CODE = 255          # nobody was there to learn how it ended: a reboot, or its keeper was killed as well
_FILE_MOST = 16 << 20


def instances_root() -> str:
    """Where instances are kept."""
    return f"{data_root()}/instances"


def run_folder(id: str) -> str:
    """Where what runs of one is."""
    return f"{run_root()}/instances/{id}"


class Instance:
    """`about` is instance.json, `state` is state.json."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.folder = f"{instances_root()}/{id}"
        self.run = run_folder(id)
        self.about: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.name = ""
        self.lock_fd = -1

    # loading, saving ---------------------------------------------------------------------------------

    def load(self) -> Instance:
        """Read what is on disk. StateError where there is no such instance."""
        self.about = self.read("instance.json")
        self.state = self._read_state()
        self.name = str(self.about.get("name", ""))
        return self

    def refresh(self) -> Instance:
        """Read how it is now. StateError where it is there no more."""
        self.state = self._read_state()
        return self

    def _read_state(self) -> dict[str, Any]:
        try:
            return self.read("state.json")
        except StateError:              # never started
            if not os.path.exists(f"{self.folder}/instance.json"):
                raise
            return {"status": CREATED}

    def read(self, leaf: str) -> dict[str, Any]:
        """What a JSON file in its folder holds. HvError."""
        path = f"{self.folder}/{leaf}"
        try:
            with open(path, "rb", 0) as file:
                data = loads(file.read(_FILE_MOST).decode("utf-8", "surrogateescape"))
        except FileNotFoundError:
            raise StateError(f"no such instance: {self.id[:12]}", "`pyhv ps -a` shows those there are") from None
        except (OSError, ValueError) as error:
            raise HvError(f"{path}: {error}", f"pyhv rm -f {self.id[:12]}") from None
        if not isinstance(data, dict):
            raise HvError(f"{path}: no object", f"pyhv rm -f {self.id[:12]}")
        return data

    def save(self) -> None:
        """Write instance.json."""
        write_whole(f"{self.folder}/instance.json", dumps(self.about).encode())

    def save_state(self, **changes: Any) -> None:
        """Write state.json with `changes`."""
        self.state |= changes
        write_whole(f"{self.folder}/state.json", dumps(self.state).encode())

    @property
    def settings(self) -> Settings:
        """What it is to be."""
        return Settings(self.about.get("settings", {}))

    @property
    def kind(self) -> str:
        """container or vm."""
        return self.settings.kind

    @property
    def image(self) -> dict[str, Any]:
        """What was kept of its image's configuration."""
        found: dict[str, Any] = self.about.get("image", {})
        return found

    # locking -----------------------------------------------------------------------------------------

    def lock(self, *, wait: bool = True) -> bool:
        """Keep other commands from changing it until unlock(); False where `wait` is false and another does."""
        while self.lock_fd < 0:
            fd = -1
            try:
                fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                flock(fd, LOCK_EX if wait else LOCK_EX | LOCK_NB)
                held, found = os.fstat(fd), os.stat(self.folder)
            except BlockingIOError:
                os.close(fd)
                return False
            except OSError:
                if fd >= 0:
                    os.close(fd)
                raise StateError(f"no such instance: {self.name or self.id[:12]}",
                                 "`pyhv ps -a` shows those there are") from None
            if (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino):
                self.lock_fd = fd
            else:
                os.close(fd)
        return True

    def unlock(self) -> None:
        """Let others in."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def __enter__(self) -> Instance:
        self.lock()
        return self

    def __exit__(self, *exc: object) -> None:
        self.unlock()

    # how it is ---------------------------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """keep.json; {} where nobody holds it."""
        try:
            with open(f"{self.run}/keep.json", "rb", 0) as file:
                data = loads(file.read(_FILE_MOST).decode())
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def save_kept(self, fds: list[int], **more: Any) -> None:
        """This process holds the streams: stdin, stdout and stderr at these numbers (-1: there is none)."""
        pid = os.getpid()
        write_whole(f"{self.run}/keep.json",
                    dumps({"pid": pid, "start": start_time(pid), "fds": fds, "began": now()} | more).encode())

    def holder(self) -> int:
        """The pid of who holds its streams, 0 where nobody does."""
        return alive(self.kept())

    def program(self) -> int:
        """The pid, on the host, of its first process: the container's, or the VM's."""
        kept = self.kept()
        if self.kind == "vm":
            return alive(kept)
        return alive({"pid": kept.get("program", 0), "start": kept.get("program_start", 0)})

    def status(self) -> str:
        """created, running, paused, restarting, exited."""
        said = str(self.state.get("status", CREATED))
        if self.program():
            return PAUSED if said == PAUSED else RUNNING
        if said in (RUNNING, PAUSED):
            return EXITED           # nobody has written down how: a reboot, or it ended a moment ago
        return said

    @property
    def running(self) -> bool:
        """Whether there is a first process."""
        return bool(self.program())

    @property
    def exit_code(self) -> int:
        """How it last ended; UNKNOWN_CODE where nobody knows."""
        code = self.state.get("exit_code")
        return code if isinstance(code, int) and self.state.get("status") not in (RUNNING, PAUSED) else UNKNOWN_CODE

    # asking it to stop -------------------------------------------------------------------------------

    def stopping(self, on: bool) -> None:
        """Note that it is to stay stopped once it has ended, or no more."""
        path = f"{self.run}/stopping"
        try:
            if on:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            else:
                os.unlink(path)
        except OSError:
            pass

    @property
    def has_begun(self) -> bool:
        """Whether there may be something of a run to give back."""
        return os.path.exists(f"{self.run}/began")

    @property
    def is_stopping(self) -> bool:
        """Whether it is."""
        return os.path.exists(f"{self.run}/stopping")


def alive(who: dict[str, Any]) -> int:
    """The pid in `who` where that process runs, else 0."""
    pid, start = who.get("pid", 0), who.get("start", 0)
    return pid if isinstance(pid, int) and pid > 0 and start and start_time(pid) == start else 0


__all__ += ["alive"]
