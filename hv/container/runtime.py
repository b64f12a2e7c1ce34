"""What an OCI runtime does: create, start, kill, delete, state (runtime-spec, runtime.md, Operations).

    create   a folder for the container, its cgroup, its first process up to the user's program
    start    lets the program go
    kill, delete, state, exec, ...   by the folder, from any process

`Runtime` is the library's face as well: nothing here prints or exits. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["CreateOptions", "Runtime"]

import os
from signal import SIGKILL
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket
from time import monotonic, sleep

from hv.container import cgroups
from hv.container.hooks import run_hooks
from hv.container.idmap import write_maps
from hv.container.process import Plan, spawn
from hv.container.spec import Spec, load_bundle
from hv.container.state import CREATED, PAUSED, RUNNING, STOPPED, Record, default_root, start_time
from hv.errors import ConfigError, HvError, StateError

_DELETE_SECONDS = 10.0          # for the processes of a killed container to be gone


class CreateOptions:
    """What the engine asks for beside the bundle."""

    def __init__(self, *, console_socket: str = "", pid_file: str = "", preserve_fds: int = 0, pivot: bool = True,
                 new_keyring: bool = True, systemd_cgroup: bool = False) -> None:
        self.console_socket = console_socket
        self.pid_file = pid_file
        self.preserve_fds = preserve_fds
        self.pivot = pivot
        self.new_keyring = new_keyring
        self.systemd_cgroup = systemd_cgroup


class Runtime:
    """The containers under `root`."""

    def __init__(self, root: str = "") -> None:
        self.root = root or default_root()

    # create and start ------------------------------------------------------------------------------

    def create(self, name: str, bundle: str, options: CreateOptions | None = None, *, start: bool = False) -> Record:
        """A created container; with `start` its program runs at once. On failure nothing is left."""
        options = options or CreateOptions()
        spec = load_bundle(os.path.abspath(bundle))
        if not os.path.isdir(spec.rootfs):
            raise ConfigError(f"root.path {spec.rootfs}: no such folder", "unpack the image's file system there")
        record = Record(self.root, name)
        record.make()
        group = None
        try:
            group = cgroups.manager(spec.cgroups_path, name, systemd=options.systemd_cgroup)
            record.data = {"id": name, "bundle": spec.bundle, "rootfs": spec.rootfs, "annotations": spec.annotations,
                           "creating": True, "cgroups": group.paths, "owner": os.geteuid(),
                           "config": spec.raw}
            record.save()           # before anything exists that `delete --force` would have to find
            group.create()
            group.apply(spec.resources)
            pid = spawn(self._plan(spec, record, group, options, start))
            self._created(record, pid, options)
        except BaseException:
            self._undo(record, group)
            raise
        record.unlock()
        return record

    def _plan(self, spec: Spec, record: Record, group: cgroups.Cgroup, options: CreateOptions, start: bool) -> Plan:
        plan = Plan(spec, spec.rootfs)
        plan.preserve_fds, plan.pivot, plan.new_keyring = options.preserve_fds, options.pivot, options.new_keyring
        plan.cgroup_mount = group.mount
        plan.namespace_fds = [(kind, _open_namespace(kind, path)) for kind, path in spec.joined]
        plan.on_cgroup = group.add
        plan.on_map = lambda pid: write_maps(pid, spec.uid_mappings, spec.gid_mappings)

        def hooks(pid: int) -> None:
            record.data |= {"pid": pid, "pid_start": start_time(pid)}
            record.save()
            for kind in ("prestart", "createRuntime"):
                run_hooks(spec, kind, record.oci_state("creating"))

        plan.on_hooks = hooks
        if options.console_socket:
            plan.console = _connect(options.console_socket, "--console-socket")
        elif spec.terminal:
            raise ConfigError("process.terminal is true, but there is no --console-socket", "name one, or set it false")
        if not start:
            listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
            _in_folder(record.folder, lambda: listener.bind("start.sock"))
            listener.listen(1)
            plan.start_socket = listener.detach()
        if spec.seccomp:
            from hv.container.seccomp.compile import compile_profile

            plan.filter = compile_profile(spec.seccomp)
        return plan

    def _created(self, record: Record, pid: int, options: CreateOptions) -> None:
        record.data |= {"pid": pid, "pid_start": start_time(pid), "creating": False}
        record.save()
        if options.pid_file:
            fresh = options.pid_file + ".new"
            with open(fresh, "w") as file:
                file.write(str(pid))
            os.rename(fresh, options.pid_file)

    def _undo(self, record: Record, group: cgroups.Cgroup | None) -> None:
        if group is not None:
            _empty(group)
        record.remove()
        record.unlock()

    def start(self, name: str) -> None:
        """Run the user's program of a created container. HvError with the reason where it can't be run."""
        record = Record(self.root, name).load()
        status = self.status(record)
        if status != CREATED:
            raise StateError(f"cannot start a container that is {status}", "create it first")
        record.lock()
        try:
            connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
            try:
                _in_folder(record.folder, lambda: connection.connect("start.sock"))
                os.unlink(record.socket)
                failure = connection.recv(4096)
            except OSError as error:
                raise StateError(f"cannot start {name}: {os.strerror(error.errno or 0)}", "delete it") from None
            finally:
                connection.close()
            if failure:
                raise HvError(failure.decode(errors="replace"))
        finally:
            record.unlock()
        spec = Spec(record.data["config"], record.data["bundle"])
        run_hooks(spec, "poststart", record.oci_state(RUNNING))

    # asking, ending --------------------------------------------------------------------------------

    def status(self, record: Record) -> str:
        """The status of a loaded record."""
        return record.status(bool(record.pid) and cgroups.from_paths(record.data["cgroups"]).frozen())

    def state(self, name: str) -> dict[str, object]:
        """What `state` prints."""
        record = Record(self.root, name).load()
        return record.oci_state(self.status(record)) | {"rootfs": record.data["rootfs"]}

    def kill(self, name: str, signal: int, *, everyone: bool = False) -> None:
        """Send `signal` to the first process, or to all."""
        record = Record(self.root, name).load()
        group = cgroups.from_paths(record.data["cgroups"])
        if everyone:
            for pid in group.pids():
                _signal(pid, signal)
            return
        pid = record.pid
        if not pid:
            raise StateError("container not running", "`state` tells how it is")
        _signal(pid, signal)
        if signal == SIGKILL and group.frozen():
            group.freeze(False)     # a frozen process does not die (cgroup v1)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Remove a stopped container; with `force` end it first, and say nothing of one that is not there."""
        record = Record(self.root, name)
        try:
            record.lock()
            record.load()
        except StateError:
            if force:
                return
            raise
        except HvError:
            if not force:
                raise
        group = cgroups.from_paths(record.data.get("cgroups", {}))
        status = record.status()
        if status not in (STOPPED, CREATED) and not force:
            record.unlock()
            raise StateError(f"cannot delete container {name} that is not stopped: {status}",
                             f"kill it first, or: delete --force {name}")
        _empty(group)
        spec_raw = record.data.get("config")
        record.remove()
        record.unlock()
        if spec_raw:
            run_hooks(Spec(spec_raw, record.data["bundle"]), "poststop", record.oci_state(STOPPED), ignore=True)

    def pause(self, name: str, on: bool) -> None:
        """Freeze all processes, or let them go on."""
        record = Record(self.root, name).load()
        status = self.status(record)
        if status not in ((RUNNING, CREATED) if on else (PAUSED,)):
            raise StateError(f"cannot {'pause' if on else 'resume'} a container that is {status}")
        cgroups.from_paths(record.data["cgroups"]).freeze(on)

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


def _open_namespace(kind: str, path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"linux.namespaces: {kind} {path}: {os.strerror(error.errno or 0)}") from None


def _connect(path: str, option: str) -> int:
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {os.strerror(error.errno or 0)}", "somebody must listen there") from None
    return connection.detach()


def _in_folder(folder: str, action: object) -> None:
    """Run action() in `folder`: a Unix socket's path has at most 107 bytes, a folder's any number."""
    back = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(folder)
        action()  # type: ignore[operator]
    finally:
        os.chdir(back)
        os.close(back)


def _signal(pid: int, signal: int) -> None:
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise HvError(f"process {pid}: not ours to signal") from None


def _empty(group: cgroups.Cgroup) -> None:
    """Kill what is left in the cgroup, wait for its end, remove it."""
    end = monotonic() + _DELETE_SECONDS
    pause = 0.0005
    while pids := group.pids():
        for pid in pids:
            _signal(pid, SIGKILL)
        if group.frozen():
            group.freeze(False)
        if monotonic() > end:
            raise HvError(f"processes {pids} do not die", "they may hang in the kernel; try again later")
        sleep(pause)
        pause = min(2 * pause, 0.05)
    group.remove()
