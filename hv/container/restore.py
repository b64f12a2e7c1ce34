"""A container made again by CRIU from files that checkpoint.py, or runc, has written.

The runtime makes it as ever (runtime.py): folder, cgroup, hooks, clean-up; only that its processes come from criu
instead of spawn(). criu starts in the container's cgroup, so that what it makes is born there, and in a mount
namespace of its own, in which the root file system is a mount: it must be one, and nothing of that is left on the host.
Limits and device rules come when all processes are there and none runs yet: criu itself would not get through them.

prestart and createRuntime hooks run once the namespaces are made, poststart hooks at the end; createContainer and
startContainer hooks do not: what they did is in the files. A network namespace is made new and empty, as at create:
loopback is brought up, the rest is the engine's work.

Driven by tests/root/test_container_criu.py.
"""

from __future__ import annotations

__all__ = ["restoring"]

import os
from _signal import SIGKILL
from _socket import SCM_RIGHTS, SOL_SOCKET, socket

from hv.container.checkpoint import (
    DESCRIPTORS,
    EXTERNAL_MOUNT,
    INHERIT,
    JOIN_NAMESPACE,
    JOINED,
    KEY,
    LSM_PROFILE,
    ROOT,
    SIBLING,
    VALUE,
    CriuOptions,
    check_spec,
    external_mounts,
    namespace_key,
    open_folder,
    require_criu,
)
from hv.container.criu import RESTORE, Criu
from hv.errors import ConfigError, HvError
from hv.linux import creds
from hv.linux.hands import Own
from hv.linux.mount import PROPAGATION, clone_tree, move, set_propagation
from hv.linux.ns import CLONE_NEWCGROUP, CLONE_NEWNET, CLONE_NEWNS, loopback_up, setns, unshare
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.process import Plan
    from hv.container.spec import Spec
    from hv.container.state import Record

_STREAMS_MOST = 64 << 10


def restoring(spec: Spec, options: CriuOptions) -> Callable[[Plan, Record], int]:
    """For CreateOptions.spawn: makes the container's processes from `options.images`. HvError where it can't be."""
    program = require_criu("restore", options.criu)
    check_spec(spec, "restore")
    os.close(open_folder(options.images, "--image-path"))
    if not os.path.exists(f"{options.images}/inventory.img"):
        raise ConfigError(f"--image-path {options.images}: no checkpoint is in there", "`checkpoint` writes one")
    return lambda plan, record: _Restore(plan, record, options, program).run()


class _Restore:
    def __init__(self, plan: Plan, record: Record, options: CriuOptions, program: str) -> None:
        self._plan, self._record, self._options, self._program = plan, record, options, program
        self._pid = 0

    def run(self) -> int:
        options, opened = self._options, []
        try:
            opened.append(open_folder(options.images, "--image-path"))
            os.makedirs(options.work, 0o700, exist_ok=True)
            opened.append(open_folder(options.work, "--work-path"))
            fields = [*options.fields(*opened), *self._fields()]
            opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            fields += _inherit(_streams(options.images), opened[-1])
            keep = [*opened, *(fd for _, fd in self._plan.namespace_fds)]
            criu = Criu(self._program, keep, self._prepare, streams=True)
            try:
                pid = criu.ask(RESTORE, fields, f"{options.work}/restore.log", self._notified)
                self._plan.on_made(pid)
                return pid
            except BaseException:
                criu.close()            # it ends what it has made
                self._collect()
                raise
            finally:
                criu.close()
        finally:
            for fd in opened:
                os.close(fd)

    def _fields(self) -> list[tuple[int, Any]]:
        spec, options = self._plan.spec, self._options
        fields: list[tuple[int, Any]] = [(ROOT, self._record.folder), (SIBLING, True)]
        fields += [(EXTERNAL_MOUNT, [(KEY, label), (VALUE, place)])
                   for label, place in external_mounts(spec, self._record.data["cgroups"])]
        for kind, fd in self._plan.namespace_fds:
            if namespace_key(kind):
                fields.append((INHERIT, [(KEY, namespace_key(kind)), (VALUE, fd)]))
        for kind, path in spec.joined:
            if kind in JOINED:
                fields.append((JOIN_NAMESPACE, [(KEY, JOINED[kind]), (VALUE, path)]))
        if options.lsm_profile:
            fields.append((LSM_PROFILE, options.lsm_profile))
        return fields

    def _prepare(self) -> None:
        """In criu's process, before it is criu."""
        spec = self._plan.spec
        hands = Own()
        self._plan.join_cgroup(hands)
        # criu makes no cgroup namespace where it does not manage cgroups: what it makes inherits its own
        unshare(CLONE_NEWNS | spec.new_namespaces & CLONE_NEWCGROUP)
        set_propagation("/", PROPAGATION["slave"], recursive=True)
        if self._plan.new_keyring:              # or they would have ours
            creds.join_session_keyring(f"_ses.{self._plan.name}", hands)()
        if spec.program.no_new_privileges:      # criu 3.17 does not save it; what it makes inherits its own
            creds.prctl(creds.PR_SET_NO_NEW_PRIVS, 1)
        place = os.open(self._record.folder, os.O_PATH | os.O_CLOEXEC)
        tree = clone_tree(-100, spec.rootfs, True)
        move(tree, place)
        _make_targets(spec, tree)

    def _notified(self, script: str, pid: int, fd: int) -> None:
        plan = self._plan
        if script == "orphan-pts-master":
            self._give_terminal(fd)
        elif script == "setup-namespaces":
            self._pid = pid
            if plan.spec.new_namespaces & CLONE_NEWNET:
                _bring_up(pid, plan.spec.sysctl)
            plan.on_hooks(pid)
        elif script == "post-restore":
            self._pid = pid
            plan.on_cgroup(pid)
            if plan.on_ready is not None:
                plan.on_ready()
        if fd >= 0 and script != "orphan-pts-master":
            os.close(fd)

    def _give_terminal(self, master: int) -> None:
        try:
            if self._plan.console < 0:
                raise HvError("restore: the container has a terminal", "process.terminal must be true")
            sender = socket(fileno=os.dup(self._plan.console))
            try:
                sender.sendmsg([b"/dev/ptmx"], [(SOL_SOCKET, SCM_RIGHTS, master.to_bytes(4, "little"))])
            except OSError as error:
                raise HvError(f"--console-socket: {os.strerror(error.errno or 0)}",
                              "somebody must listen there") from None
            finally:
                sender.close()
        finally:
            os.close(master)

    def _collect(self) -> None:
        """The restored first process is our child; it has been killed, or is now."""
        if self._pid:
            try:
                os.kill(self._pid, SIGKILL)
                os.waitpid(self._pid, 0)
            except OSError:
                pass


def _streams(images: str) -> list[str]:
    """What the standard streams were; nothing where that is not known."""
    try:
        with open(f"{images}/{DESCRIPTORS}", "rb", 0) as file:
            found = loads(file.read(_STREAMS_MOST).decode())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise HvError(f"{images}/{DESCRIPTORS}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise HvError(f"{images}/{DESCRIPTORS}: not a list of texts")
    return found[:3]


def _inherit(streams: list[str], null: int) -> list[tuple[int, Any]]:
    """Our standard streams in place of what they were outside of the container."""
    given: dict[str, int] = {}
    for fd, text in enumerate(streams):
        if text.startswith("pipe:["):
            given.setdefault(text, fd)
        elif text.startswith("file["):
            key, _, path = text.partition(":/")
            given.setdefault(key, null if path == "dev/null" else _same_kind(fd, path))
    return [(INHERIT, [(KEY, key), (VALUE, fd)]) for key, fd in given.items()]


def _same_kind(fd: int, path: str) -> int:
    """criu sets the position in a file, which a pipe does not have."""
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        name = ("input", "output", "error")[fd]
        raise ConfigError(f"restore: standard {name} was the file /{path}", "redirect it to a file again") from None
    return fd


def _make_targets(spec: Spec, root: int) -> None:
    """The mount points that create made in the root: it may be another copy of the image now."""
    from stat import S_ISDIR

    from hv.container.mounts import target_in

    places = [mount["destination"] for mount in spec.mounts]
    for mount in spec.mounts:
        place = mount["destination"]
        if any(place.startswith(above.rstrip("/") + "/") for above in places if above != place):
            continue                    # in another mount, whose content comes back with it
        bind = mount.get("type") == "bind" or "bind" in mount["options"] or "rbind" in mount["options"]
        try:
            is_dir = not bind or S_ISDIR(os.stat(mount["source"]).st_mode)
        except OSError as error:
            raise HvError(f"mounts ({place}): {mount['source']}: {os.strerror(error.errno or 0)}") from None
        os.close(target_in(Own(), root, place, is_dir))


def _bring_up(pid: int, sysctls: list[tuple[str, str, str]]) -> None:
    """Loopback and linux.sysctl of a network namespace that criu has made empty; by a process that enters it."""
    from hv.container.identity import set_sysctls

    said = os.memfd_create("said", os.MFD_CLOEXEC)
    child = os.fork()
    if not child:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            setns(fd, CLONE_NEWNET)
            loopback_up(Own())
            set_sysctls(Own(), [row for row in sysctls if row[1].startswith("net/")])
            os._exit(0)
        except (HvError, OSError) as error:
            os.write(said, f"{error}".encode())
        finally:
            os._exit(1)
    try:
        if os.waitpid(child, 0)[1]:
            raise HvError("restore: the network namespace: " + os.pread(said, 1000, 0).decode(errors="replace"))
    finally:
        os.close(said)
