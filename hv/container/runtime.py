"""What an OCI runtime does: create, start, kill, delete, state (runtime-spec 1.2, runtime.md, Operations).

    create   a folder for the container, its cgroup, its first process up to the user's program
    start    lets the program go
    kill, delete, state, ...   by the folder, from any process

`Runtime` is the library's face as well: nothing here prints or exits, and other threads may run.

Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["CreateOptions", "Runtime"]

import os
from _signal import SIGKILL
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket
from time import monotonic, sleep

from hv.container.state import (
    CREATED,
    CREATING,
    PAUSED,
    RUNNING,
    STOPPED,
    Record,
    default_root,
    now,
    start_time,
    write_whole,
)
from hv.errors import ConfigError, HvError, KernelError, StateError
from hv.linux.ns import pidfd_open, pidfd_send_signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.cgroups.manager import Cgroup
    from hv.container.exec import ExecOptions
    from hv.container.far import Program
    from hv.container.process import Plan
    from hv.container.spec import Spec

_DELETE_SECONDS = 10.0          # for the processes of a killed container to be gone
_REPORT_MOST = 4096


class CreateOptions:
    """What the engine asks for beside the bundle. `console`: a connected socket in place of `console_socket`'s path."""

    def __init__(self, *, console_socket: str = "", pid_file: str = "", preserve_fds: int = 0, pivot: bool = True,
                 new_keyring: bool = True, systemd_cgroup: bool = False, console: int = -1,
                 listen_fds: int = 0, reaper: bool = False,
                 on_ready: Callable[[], object] | None = None,
                 spawn: Callable[[Plan, Record], int] | None = None) -> None:
        self.console_socket = console_socket
        self.pid_file = pid_file
        self.preserve_fds = preserve_fds
        self.pivot = pivot
        self.new_keyring = new_keyring
        self.systemd_cgroup = systemd_cgroup
        self.console = console
        self.listen_fds = listen_fds    # descriptors from 3 on, of socket activation (man 3 sd_listen_fds)
        self.on_ready = on_ready        # called when all is ready and the program waits to be run
        self.reaper = reaper            # the first process is one that reaps what others leave, the program its child
        self.spawn = spawn              # makes the first process in another way than by starting its program


class Runtime:
    """The containers under `root`."""

    def __init__(self, root: str = "") -> None:
        self.root = os.path.abspath(root) if root else default_root()
        self._programs: list[Program] = []      # what first processes run
        self.warn: Callable[[str], None] = lambda text: None    # told what goes wrong but does not stop anything

    def close(self) -> None:
        """Give back the descriptor that makes the next container faster; the runtime can be used on."""
        self._programs.clear()

    # create and start ------------------------------------------------------------------------------

    def create(self, name: str, bundle: str, options: CreateOptions | None = None, *, start: bool = False,
               spec: Spec | None = None) -> Record:
        """A created container; with `start` its program runs at once. On failure nothing is left."""
        from hv.container.plan import close_plan, make_plan  # what other commands do not need
        from hv.container.process import spawn
        from hv.container.spec import load_bundle

        options = options or CreateOptions()
        record = Record(self.root, name)
        spec = spec or load_bundle(os.path.abspath(bundle))
        if not os.path.isdir(spec.rootfs):
            raise ConfigError(f"root.path {spec.rootfs}: no such folder", "unpack the image's file system there")
        group: Cgroup | None = None
        try:
            record.make()
            group = _new_group(spec, name, options.systemd_cgroup)
            found = group.pids()
            if found:               # or `delete --force` would end somebody else's, were we killed now
                raise StateError(f"linux.cgroupsPath {spec.cgroups_path}: {len(found)} processes are in there already",
                                 "choose another, or end them")
            record.data = {"id": name, "bundle": spec.bundle, "rootfs": spec.rootfs, "annotations": spec.annotations,
                           "creating": True, "cgroups": group.paths, "owner": os.geteuid(), "created": now(),
                           "keyring": options.new_keyring}
            if group.unit:
                record.data["unit"] = group.unit
            if spec.hooks:
                record.data["hooks"] = spec.hooks
            record.save()           # before anything exists that `delete --force` would have to find
            record.save_config(spec.text)
            plan = make_plan(spec, record, group, options, start)
            plan.programs = self._programs
            plan.on_made = lambda pid: _made(record, pid)
            try:
                pid = options.spawn(plan, record) if options.spawn else spawn(plan)
            finally:
                close_plan(plan)
            if options.pid_file:
                write_whole(options.pid_file, str(pid).encode())
        except BaseException:
            if record.made:
                self._undo(record, group if group is not None and group.made else None)
            raise
        record.unlock()
        if start:
            self._after(record, "poststart", RUNNING)
        return record

    def _undo(self, record: Record, group: Cgroup | None) -> None:
        try:
            if group is not None:
                _empty(group, record)
            self._after(record, "poststop", STOPPED)
            record.remove()
        except HvError as error:
            self.warn(f"cleaning up: {error}")
        record.unlock()

    def start(self, name: str) -> None:
        """Run the user's program of a created container. HvError with the reason where it can't be run."""
        record = Record(self.root, name)
        record.load()
        record.lock()
        try:
            status = self.status(record.load())
            if status != CREATED:
                raise StateError(f"cannot start a container in the {status} state", "only a created one can be started")
            failure = self._let_go(record)
            if failure:
                from hv.container.spec import load_file
                from hv.container.stub import explain

                why = explain(failure, load_file(record.config, record.data["bundle"]).program.args[0])
                if failure.startswith(b"hooks."):       # startContainer's: runtime.md, Lifecycle, 7, 12 and 13
                    self._undo(record, self.group(record))
                raise HvError(why)
        finally:
            record.unlock()
        self._after(record, "poststart", RUNNING)

    def _let_go(self, record: Record) -> bytes:
        """Connect to the waiting process; what it reports, b"" where the program runs."""
        connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        folder = os.open(record.folder, os.O_PATH | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{folder}/start.sock")
            os.unlink(record.socket)
            return connection.recv(_REPORT_MOST)
        except ConnectionRefusedError:      # a `start` was ended in between: the program runs
            os.unlink(record.socket)
            raise StateError(f"cannot start {record.name}: it has been started", "only a created one can be") from None
        except OSError as error:
            raise StateError(f"cannot start {record.name}: {os.strerror(error.errno or 0)}", "delete it") from None
        finally:
            os.close(folder)
            connection.close()

    def _after(self, record: Record, kind: str, status: str) -> None:
        """Poststart or poststop hooks: one that fails is a warning, the others run (runtime.md, Lifecycle, 9, 13)."""
        rows = record.data.get("hooks", {}).get(kind)
        if rows:
            from hv.container.hooks import run_hooks

            run_hooks(rows, kind, record.oci_state(status), self.warn)

    # asking, ending --------------------------------------------------------------------------------

    def status(self, record: Record) -> str:
        """The status of a loaded record."""
        return record.status(bool(record.pid) and self.group(record).frozen())

    def group(self, record: Record) -> Cgroup:
        """The cgroup of a loaded record."""
        paths = record.data.get("cgroups", {})
        if record.data.get("unit"):
            from hv.container.cgroups.systemd import from_unit

            return from_unit(record.data["unit"], paths)
        from hv.container.cgroups.manager import from_paths

        return from_paths(paths)

    def state(self, name: str) -> dict[str, Any]:
        """What `state` prints."""
        return self.describe(Record(self.root, name).load())

    def describe(self, record: Record) -> dict[str, Any]:
        """The same of a loaded record."""
        state = record.oci_state(self.status(record))
        order = ("ociVersion", "id", "pid", "status", "bundle")
        return {key: state[key] for key in order} | {"rootfs": record.data["rootfs"], "created": record.data["created"],
                                                     "annotations": state.get("annotations", {}), "owner": ""}

    def kill(self, name: str, signal: int, *, everyone: bool = False) -> None:
        """Send `signal` to the first process, or to all."""
        record = Record(self.root, name).load()
        if everyone:
            group = self.group(record)
            if signal == SIGKILL:
                group.kill()            # nobody forks fast enough to escape that; for others it is one by one
            for pid in group.pids():
                _signal_pid(pid, signal)
            if signal == SIGKILL and group.frozen():
                group.freeze(False)
            return
        if not _signal(record, signal):
            raise StateError("container not running", "`state` tells how it is")
        if signal == SIGKILL:
            group = self.group(record)
            if group.frozen():
                group.freeze(False)     # a frozen process does not die (cgroup v1)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Remove a stopped container; with `force` end it first, and say nothing of one that is not there."""
        record = Record(self.root, name)
        try:
            record.lock()
        except StateError:
            if force:
                return
            raise
        try:
            try:
                record.load()
            except HvError:
                if not force:
                    raise
            status = record.status()
            if not force and status not in (STOPPED, CREATED):
                raise StateError(f"cannot delete container {name} that is not stopped: {status}",
                                 f"kill it first, or: delete --force {name}")
            if status != STOPPED and status != CREATING:
                _signal(record, SIGKILL)
            _empty(self.group(record), record)
            self._after(record, "poststop", STOPPED)
            record.remove()
        finally:
            record.unlock()

    def pause(self, name: str, on: bool) -> None:
        """Freeze all processes, or let them go on."""
        record = Record(self.root, name).load()
        status = self.status(record)
        if status not in ((RUNNING, CREATED) if on else (PAUSED,)):
            raise StateError(f"cannot {'pause' if on else 'resume'} a container that is {status}")
        self.group(record).freeze(on)

    def exec(self, name: str, process: dict[str, Any], options: ExecOptions | None = None) -> int:
        """Run `process` (as in config.json) in a running container; its pid, a child of this process."""
        from hv.container.exec import start_exec

        return start_exec(self, name, process, options)

    def wait(self, name: str, timeout: float | None = None) -> int | None:
        """Wait for the end of the first process; StateError when `timeout` seconds are over and it still runs.

        Its exit code, 128 + n by signal n, where it is a child of this process that nobody has waited for; else None.
        """
        from select import POLLIN, poll

        record = Record(self.root, name).load()
        pid = int(record.data.get("pid", 0))
        if record.pid == pid:
            try:
                fd = pidfd_open(pid)
            except KernelError:
                fd = -1             # it has ended
            if fd >= 0:
                try:
                    waiter = poll()
                    waiter.register(fd, POLLIN)
                    if record.pid == pid and not waiter.poll(None if timeout is None else timeout * 1000):
                        raise StateError(f"container {name} runs on", "wait for longer, or kill it")
                finally:
                    os.close(fd)
        try:
            ended, status = os.waitpid(pid, os.WNOHANG) if pid else (0, 0)
        except ChildProcessError:
            return None
        code = os.waitstatus_to_exitcode(status)
        return None if not ended else code if code >= 0 else 128 - code

    def stats(self, name: str) -> dict[str, Any]:
        """Figures of the container's cgroup, as `events --stats` prints them."""
        return self.group(Record(self.root, name).load()).stats()

    def list(self) -> list[Record]:
        """All containers; those that can't be read are left out."""
        try:
            names = sorted(os.listdir(self.root))
        except OSError:
            return []
        found = []
        for name in names:
            try:
                found.append(Record(self.root, name).load())
            except HvError:
                pass
        return found


def _new_group(spec: Spec, name: str, systemd: bool) -> Cgroup:
    if systemd:
        from hv.container.cgroups.systemd import scope

        return scope(spec, name)
    from hv.container.cgroups.manager import manager

    return manager(spec.cgroups_path, name)


def _made(record: Record, pid: int) -> None:
    record.data |= {"pid": pid, "pid_start": start_time(pid), "creating": False}
    record.save()


def _signal(record: Record, signal: int) -> bool:
    """Signal the first process, and nobody who has got its number meanwhile; False where it has ended."""
    pid = record.pid
    if not pid:
        return False
    try:
        fd = pidfd_open(pid)
    except KernelError:
        return False
    try:
        if not record.pid:
            return False
        pidfd_send_signal(fd, signal)
    except KernelError as error:
        raise HvError(f"cannot signal process {pid}: {os.strerror(error.errno)}") from None
    finally:
        os.close(fd)
    return True


def _signal_pid(pid: int, signal: int) -> None:
    if pid <= 0:
        return              # a process of another pid namespace is listed as 0, which for kill is our own group
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise HvError(f"process {pid}: not ours to signal") from None


def _empty(group: Cgroup, record: Record | None = None) -> None:
    """Kill what is left in the cgroup (and the first process, wherever it is), wait for its end, remove it."""
    end = monotonic() + _DELETE_SECONDS
    pause = 0.0005
    while True:
        pids = group.pids()
        first = record.pid if record is not None else 0         # asked once: it may end at any moment
        if first and first not in pids:
            pids = [*pids, first]
        if not pids:
            break
        group.kill()
        for pid in pids:
            _signal_pid(pid, SIGKILL)
        if group.frozen():
            group.freeze(False)
        if monotonic() > end:
            raise HvError(f"processes {pids} do not die", "they may hang in the kernel; try again later")
        sleep(pause)
        pause = min(2 * pause, 0.05)
    group.remove()
