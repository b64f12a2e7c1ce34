"""What an OCI runtime does (runtime-spec 1.2, runtime.md, Operations), with a VM for each bundle.

The same operations and the same folder as hv/container/runtime.py's, so that `list`, `state` and `delete` see both
kinds; a file `vm` in a container's folder says that it is one. Its pid is the VM's process (daemon.py): it lives as
long as the bundle's program, ends with its exit code, and with it goes all there was. Driven by
tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["MARK", "VmOptions", "VmRuntime"]

import os
from _signal import SIGKILL
from time import monotonic, sleep

from hv.container.runtime import Runtime
from hv.container.state import CREATED, PAUSED, RUNNING, STOPPED, Record, now, start_time, write_whole
from hv.errors import ConfigError, HvError, StateError
from hv.sandbox.client import SandboxClient, StartFailedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.manager import Cgroup
    from hv.container.spec import Spec

MARK = "vm"                     # a file in the record's folder
HELD = "paused"                 # another, while the guest is held
_KILL_SECONDS = 5.0             # for a VM to end that was told to


class VmOptions:
    """What the engine asks for beside the bundle."""

    def __init__(self, *, console_socket: str = "", pid_file: str = "", systemd_cgroup: bool = False) -> None:
        self.console_socket, self.pid_file, self.systemd_cgroup = console_socket, pid_file, systemd_cgroup


class VmRuntime(Runtime):
    """The VMs under `root`, and the containers beside them."""

    # create and start ------------------------------------------------------------------------------

    def create_vm(self, name: str, bundle: str, options: VmOptions) -> Record:
        """A VM whose guest is up, and whose program waits for `start`. On failure nothing is left."""
        from hv.container.spec import load_bundle
        from hv.sandbox.daemon import Daemon

        spec = load_bundle(os.path.abspath(bundle))
        if bool(options.console_socket) != spec.program.terminal:
            raise ConfigError("process.terminal and --console-socket belong together", "give both, or none")
        record, group = self.begin(name, spec, options)
        daemon: Daemon | None = None
        try:
            daemon = Daemon(spec, record, group, options.console_socket, self.warn)
            self._note(record, daemon.pid)
            daemon.await_ready(lambda: self._hooks(record))
            if options.pid_file:
                write_whole(options.pid_file, str(daemon.pid).encode())
        except BaseException:
            if daemon is not None:
                daemon.kill()
            self.undo(record, group)
            raise
        record.unlock()
        return record

    def begin(self, name: str, spec: Spec, options: VmOptions) -> tuple[Record, Cgroup]:
        """The record, locked, and a cgroup for the VM's process, with its limits; nothing is left on failure."""
        from hv.container.runtime import _new_group
        from hv.sandbox.rootfs_tree import refuse
        from hv.sandbox.spec_guest import host_resources, shape_of

        refuse(spec)
        shape = shape_of(spec)
        if not os.path.isdir(spec.rootfs):
            raise ConfigError(f"root.path {spec.rootfs}: no such folder", "unpack the image's file system there")
        record = Record(self.root, name)
        record.make()
        group: Cgroup | None = None
        try:
            group = _new_group(spec, name, options.systemd_cgroup)
            if found := group.pids():
                raise StateError(f"linux.cgroupsPath {spec.cgroups_path}: {len(found)} processes are in there already",
                                 "choose another, or end them")
            write_whole(f"{record.folder}/{MARK}", b"")
            record.data = {"id": name, "bundle": spec.bundle, "rootfs": spec.rootfs, "annotations": spec.annotations,
                           "creating": True, "cgroups": group.paths, "owner": os.geteuid(), "created": now()}
            if group.unit:
                record.data["unit"] = group.unit
            if spec.hooks:
                record.data["hooks"] = spec.hooks
            record.save()
            record.save_config(spec.text)
            group.create()
            group.apply(host_resources(spec, shape), update=True)   # no rules for devices: /dev/kvm is needed
        except BaseException:
            self.undo(record, group)
            raise
        return record, group

    def _note(self, record: Record, pid: int) -> None:
        record.data |= {"pid": pid, "pid_start": start_time(pid), "creating": False}
        record.save()

    def note_own(self, record: Record) -> None:
        """The VM's process is this one."""
        self._note(record, os.getpid())

    def note_ended(self, record: Record) -> None:
        """The VM has ended, and this process goes on."""
        record.data["pid"] = 0
        record.save()

    def _hooks(self, record: Record) -> None:
        from hv.container.hooks import run_hooks

        for kind in ("prestart", "createRuntime"):
            run_hooks(record.data.get("hooks", {}).get(kind, []), kind, record.oci_state("creating"))

    def undo(self, record: Record, group: Cgroup | None) -> None:
        """Remove what begin() made."""
        self._undo(record, group if group is not None and group.made else None)

    def start(self, name: str) -> None:
        """Run the program of a created VM. HvError with the reason where it can't be run."""
        record = Record(self.root, name)
        record.load()
        record.lock()
        try:
            status = self.status(record.load())
            if status != CREATED:
                raise StateError(f"cannot start a container in the {status} state", "only a created one can be started")
            try:
                SandboxClient(record.folder).start()
            except StartFailedError as error:
                raise HvError(str(error), error.hint) from None
            os.unlink(record.socket)
        finally:
            record.unlock()
        self._after(record, "poststart", RUNNING)

    # asking, ending --------------------------------------------------------------------------------

    def status(self, record: Record) -> str:
        """The status of a loaded record."""
        return record.status(os.path.exists(f"{record.folder}/{HELD}"))

    def kill(self, name: str, signal: int, *, everyone: bool = False) -> None:
        """Send `signal` to the bundle's program; SIGKILL ends the VM."""
        record = Record(self.root, name).load()
        pid = record.pid
        if not pid:
            raise StateError("container not running", "`state` tells how it is")
        try:
            SandboxClient(record.folder).kill(signal)
        except (StateError, TimeoutError):
            if signal != SIGKILL or record.pid != pid:
                raise StateError("container not running", "`state` tells how it is") from None
        if signal == SIGKILL:
            end = monotonic() + _KILL_SECONDS
            while record.pid == pid:
                if monotonic() > end:
                    try:
                        os.kill(pid, SIGKILL)
                    except ProcessLookupError:
                        pass            # it has just ended
                    break
                sleep(0.002)

    def pause(self, name: str, on: bool) -> None:
        """Hold the guest, or let it go on."""
        record = Record(self.root, name).load()
        status = self.status(record)
        if status not in ((RUNNING, CREATED) if on else (PAUSED,)):
            raise StateError(f"cannot {'pause' if on else 'resume'} a container that is {status}")
        client = SandboxClient(record.folder)
        if on:
            client.pause()
            write_whole(f"{record.folder}/{HELD}", b"")
        else:
            client.resume()
            os.unlink(f"{record.folder}/{HELD}")

    def client(self, name: str) -> SandboxClient:
        """Who to ask about a running VM. StateError."""
        record = Record(self.root, name).load()
        status = self.status(record)
        if status == STOPPED:
            raise StateError(f"container {name} is not running", "create and start it first")
        if status == PAUSED:
            raise StateError(f"container {name} is paused", "`resume` it")
        return SandboxClient(record.folder)

    def stats(self, name: str) -> dict[str, Any]:
        """The guest's figures."""
        return self.client(name).stats()

    def processes(self, name: str) -> list[dict[str, Any]]:
        """The guest's processes."""
        return self.client(name).processes()


def is_vm(root: str, name: str) -> bool:
    """Whether `name` is one of ours under `root`, rather than a container."""
    return os.path.exists(f"{root}/{name}/{MARK}")


def wants_vm(bundle: str) -> bool:
    """Whether a bundle's annotations ask for a VM. False where its config.json can't be read: `create` says why."""
    try:
        with open(f"{bundle}/config.json", "rb", 0) as file:
            text = file.read()
    except OSError:
        return False
    if b"io.pyhv.vm" not in text:
        return False
    from hv.plainjson import loads

    try:
        notes = loads(text.decode()).get("annotations")
        return isinstance(notes, dict) and notes.get("io.pyhv.vm") == "true"
    except (ValueError, AttributeError, HvError):
        return False
