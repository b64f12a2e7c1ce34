"""`exec`: one more program in a container that runs (runc-exec(8); the specification leaves it to runtimes).

    runtime (P)                         helper (C1, enter.py)                      the program
       | --- clone, into the cgroup ------>|
       | --- GO -------------------------->| enters the cgroups, the first thing of all
       |                                   | joins all namespaces at once, through a pidfd
       |                                   | terminal, identity, limits, directory
       |                                   | becomes stub.py's program
       |<-- FORK, pid ---------------------| --- clone, as P's child, inside ---------->| session, terminal, filter
       |                                   ends                                         | the user's program
       |<-- end, or eight bytes (stub.py) ----------------------------------------------|

C1 never is in the container's pid namespace, so nobody inside can look at it, trace it, or reach the interpreter or a
descriptor of the host through /proc (CVE-2016-9962, CVE-2019-5736, CVE-2024-21626).

Driven by tests/root/test_container_exec.py, tests/root/test_container_exec_safety.py and
tests/root/test_container_tty.py.
"""

from __future__ import annotations

__all__ = ["ExecOptions", "start_exec"]

import os
from _signal import SIGKILL
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET, socketpair

from hv.container import stub, sync
from hv.container.enter import Entry, enter
from hv.container.program import Program
from hv.container.spec import Spec, load_file
from hv.container.state import PAUSED, STOPPED, Record, write_whole
from hv.errors import ConfigError, HvError, KernelError, StateError
from hv.linux.ns import CLONE_FLAGS, clone, pidfd_open, single_threaded
from hv.linux.signals import new_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.manager import Cgroup
    from hv.container.runtime import Runtime

# the names of runtime-spec, config-linux.md, and those in /proc/PID/ns
_LEAVES = {"user": "user", "mount": "mnt", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts",
           "cgroup": "cgroup", "time": "time"}


class ExecOptions:
    """What the engine asks for beside the process. `console`: a connected socket, in place of a path."""

    def __init__(self, *, console_socket: str = "", console: int = -1, pid_file: str = "", preserve_fds: int = 0,
                 listen_fds: int = 0, ignore_paused: bool = False, cgroups: tuple[str, ...] = ()) -> None:
        self.console_socket = console_socket
        self.console = console
        self.pid_file = pid_file
        self.preserve_fds = preserve_fds
        self.listen_fds = listen_fds        # descriptors from 3 on, of socket activation
        self.ignore_paused = ignore_paused
        self.cgroups = cgroups              # groups below the container's, as CONTROLLER[,CONTROLLER]:PATH or PATH


def start_exec(runtime: Runtime, name: str, process: dict[str, Any], options: ExecOptions | None = None) -> int:
    """Run `process` (as in config.json) in container `name`; its pid, a child of this process.

    What it does not say about limits, labels and the OOM score is as for the container's first program.
    """
    options = options or ExecOptions()
    record = Record(runtime.root, name).load()
    status = runtime.status(record)
    if status == STOPPED:
        raise StateError("cannot exec in a stopped container", "create and start it first")
    if status == PAUSED and not options.ignore_paused:
        raise StateError("cannot exec in a paused container (use --ignore-paused to override)", "`resume` it")
    spec = load_file(record.config, record.data["bundle"])
    entry = _entry(record, spec, _program(spec, process, options), options)
    try:
        pid = _spawn(runtime, record, entry, options)
    finally:
        _close(entry)
    if options.pid_file:
        try:
            write_whole(options.pid_file, str(pid).encode())
        except HvError:
            _end(pid)
            raise
    return pid


def _program(spec: Spec, process: dict[str, Any], options: ExecOptions) -> Program:
    own, process = spec.raw["process"], dict(process)
    for name in ("rlimits", "apparmorProfile", "selinuxLabel", "oomScoreAdj", "capabilities"):
        if process.get(name) in (None, "", []) and own.get(name) is not None:
            process[name] = own[name]
    program = Program(process)
    for field, label, module in (("apparmorProfile", program.apparmor, "apparmor"),
                                 ("selinuxLabel", program.selinux, "selinux")):
        if label:
            from hv.container.labels import require

            require(module, f"process.{field}")
    if options.listen_fds:
        program.environment += [f"LISTEN_FDS={options.listen_fds}", "LISTEN_PID=1"]
    return program


def _entry(record: Record, spec: Spec, program: Program, options: ExecOptions) -> Entry:
    """Everything the helper needs, its descriptors open."""
    from hv.container.identity import may_set_groups

    pid = record.pid
    entry = Entry(spec, program, f"_ses.{record.name}" if record.data.get("keyring", True) else "")
    entry.preserve_fds = options.preserve_fds + options.listen_fds
    try:
        entry.pidfd = pidfd_open(pid)
        entry.flags = _differing(pid)
        entry.groups = may_set_groups(pid)
        if not spec.has_mount_namespace:
            entry.root = os.open(spec.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if record.pid != pid:
            raise ProcessLookupError
    except (OSError, KernelError) as error:
        _close(entry)
        if isinstance(error, PermissionError):
            raise HvError(f"process {pid} of the container: {os.strerror(error.errno or 0)}",
                          "only its owner and root can enter it") from None
        raise StateError("cannot exec in a stopped container", "create and start it first") from None
    try:
        if options.console >= 0:
            entry.console = os.dup(options.console)
        elif program.terminal:
            if not options.console_socket:
                raise ConfigError("cannot allocate tty if the runtime will detach without setting console socket",
                                  "name one with --console-socket")
            from hv.container.plan import connect

            entry.console = connect(options.console_socket, "--console-socket")
        elif options.console_socket:
            raise ConfigError("--console-socket: the process has no terminal", "ask for one with --tty")
        if spec.seccomp:
            from hv.container.seccomp.compile import compile_profile

            entry.filter = compile_profile(spec.seccomp)
    except BaseException:
        _close(entry)
        raise
    return entry


def _close(entry: Entry) -> None:
    for fd in (entry.pidfd, entry.root, entry.console):
        if fd >= 0:
            os.close(fd)


def _differing(pid: int) -> int:
    """The namespaces of `pid` that are not ours: one's own user namespace can't be entered again."""
    flags = 0
    for kind, leaf in _LEAVES.items():
        try:
            theirs = os.stat(f"/proc/{pid}/ns/{leaf}")
            ours = os.stat(f"/proc/self/ns/{leaf}")
        except FileNotFoundError:
            if not os.path.exists(f"/proc/self/ns/{leaf}"):
                continue                # a kernel without that kind
            raise
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            flags |= CLONE_FLAGS[kind]
    return flags


def _spawn(runtime: Runtime, record: Record, entry: Entry, options: ExecOptions) -> int:
    """The program's pid, once it runs. HvError, and nothing left, if it can't."""
    entry.group = _group(runtime, record, options)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    parent, listener = os.getpid(), -1
    channel = sync.Channel(ours)
    born: list[int] = []            # the helper, then the program: what is to be killed if it comes to nothing
    try:
        new_process((lambda: _clone(entry)) if single_threaded() else os.fork, born)
        if not born[0]:
            enter(entry, sync.Channel(theirs), ours.fileno(), parent)
        theirs.close()
        if not entry.born:
            _second_version(entry.group, born[0], record.pid)
        channel.send(sync.GO)
        while report := channel.last_word():
            made = stub.left_behind(report)
            if made and len(born) == 1:
                born.append(made)
            elif report == sync.NOTIFY:
                listener = channel.received
            else:
                raise HvError(report[1:].decode(errors="replace") if report[:1] == sync.ERROR
                              else stub.explain(report, entry.program.args[0]))
            if listener >= 0 and len(born) == 2:        # the new process may be faster than who tells its number
                _notify(entry, record, born[1], listener)
                os.close(listener)
                listener = -1
                channel.send(sync.GO)
        if len(born) == 1:
            raise HvError("the program died before it ran", "perhaps the container's memory limit is too low")
    except BaseException:
        _end(*born)
        raise
    finally:
        ours.close()
        theirs.close()
        if listener >= 0:
            os.close(listener)
    os.waitpid(born[0], 0)
    return born[1]


def _clone(entry: Entry) -> int:
    """The helper, born in the version 2 group if that can be."""
    path = entry.group.paths.get("")
    if path:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                entry.born = True       # known to the helper as well
                return clone(0, fd)
            finally:
                os.close(fd)
        except (OSError, KernelError):
            entry.born = False          # a group that was split up, or an old kernel; if it is more, it comes again
    return clone(0)


def _second_version(group: Cgroup, helper: int, first: int) -> None:
    """Move the helper into the version 2 group, or where that one was split up, to the container's first process."""
    group.add(helper, beside=first, v1=False)


def _group(runtime: Runtime, record: Record, options: ExecOptions) -> Cgroup:
    """The container's cgroup, or the groups below it that were asked for."""
    group = runtime.group(record)
    for row in options.cgroups:
        names, colon, path = row.partition(":")
        if not colon:
            names, path = "", row
        if not path.startswith("/") or ".." in path.split("/"):
            raise ConfigError(f"--cgroup {row}", "[CONTROLLER[,CONTROLLER]:]/PATH, below the container's own group")
        for key in names.split(",") if names else list(group.paths):
            if key not in group.paths:
                raise ConfigError(f"--cgroup {row}: the container has no group of {key or 'version 2'}",
                                  f"one of {', '.join(filter(None, group.paths))}")
            below = group.paths[key] + path.rstrip("/")
            if not os.path.isdir(below):
                raise ConfigError(f"--cgroup {row}: {below}: no such group", "it must be there already")
            group.paths[key] = below
    return group


def _notify(entry: Entry, record: Record, pid: int, fd: int) -> None:
    """The filter's listener goes to the supervisor."""
    from hv.container.seccomp.notify import send_listener

    send_listener(entry.spec.seccomp, record.oci_state("running"), pid, fd)


def _end(*pids: int) -> None:
    for pid in pids:
        if not pid:
            os._exit(1)     # in the helper itself, which is not to go on as the runtime
        try:
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)
        except OSError:
            pass            # it has gone
