"""From a configuration to the plan of a container's first process: descriptors opened, answers to its questions.

Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["REAPER", "close_plan", "connect", "make_plan"]

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket

from hv.container.process import Plan
from hv.container.state import start_time
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.container.cgroups.manager import Cgroup
    from hv.container.runtime import CreateOptions
    from hv.container.spec import Spec
    from hv.container.state import Record

REAPER = "io.pyhv.init"         # annotation: the first process reaps what others leave, the program is its child


def make_plan(spec: Spec, record: Record, group: Cgroup, options: CreateOptions, start: bool) -> Plan:
    """The plan; close_plan() closes what it has open."""
    plan = Plan(spec, record.name)
    plan.lock, plan.on_ready = record.lock_fd, options.on_ready
    try:
        _fill(plan, record, group, options, start)
    except BaseException:
        close_plan(plan)
        raise
    return plan


def _fill(plan: Plan, record: Record, group: Cgroup, options: CreateOptions, start: bool) -> None:
    spec = plan.spec
    plan.preserve_fds = options.preserve_fds + options.listen_fds
    plan.pivot, plan.new_keyring = options.pivot, options.new_keyring
    if not plan.pivot:
        import hv.container.oldroot  # noqa: F401 (for the first process, which may not be able to read it later)
    plan.reaper = options.reaper or spec.annotations.get(REAPER) == "true"
    if options.listen_fds:
        spec.program.environment += [f"LISTEN_FDS={options.listen_fds}", "LISTEN_PID=1"]
    plan.cgroup_mount = group.mount
    for kind, path in spec.joined:
        plan.namespace_fds.append((kind, _open_namespace(kind, path)))

    if spec.uid_mappings:
        from hv.container.idmap import write_maps

        plan.on_map = lambda pid: write_maps(pid, spec.uid_mappings, spec.gid_mappings)
    if spec.hooks:
        _hooks(plan, record)
    if options.console >= 0:
        plan.console = os.dup(options.console)
    elif options.console_socket:
        if not spec.program.terminal:
            raise ConfigError("--console-socket: process.terminal is not true", "leave one out or set the other")
        plan.console = connect(options.console_socket, "--console-socket")
    elif spec.program.terminal:
        raise ConfigError("process.terminal is true, but there is no --console-socket", "name one, or set it false")
    if not start:
        plan.start_socket = _listen(record)
    if spec.seccomp:
        _filter(plan, record)
    if any(mount["uidMappings"] or "idmap" in mount["options"] or "ridmap" in mount["options"]
           for mount in spec.mounts):
        from hv.container.idmapped import prepare_trees

        prepare_trees(spec, plan.trees)
    plan.on_close = group.release
    group.create()
    plan.join_cgroup = group.join
    plan.on_moved = lambda pid: group.add(pid, v1=False)

    def limit(pid: int) -> None:
        group.settle(pid)
        group.apply(spec.resources)

    plan.on_cgroup = limit
    if "" in group.paths:
        plan.cgroup_fd = os.open(group.paths[""], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def close_plan(plan: Plan) -> None:
    """Close the runtime's copies of what the first process has got, and let go of what was held for it."""
    plan.on_close()
    for fd in (plan.start_socket, plan.console, plan.cgroup_fd, *plan.trees.values(),
               *(fd for _, fd in plan.namespace_fds)):
        if fd >= 0:
            os.close(fd)
    plan.start_socket = plan.console = plan.cgroup_fd = -1
    plan.trees, plan.namespace_fds = {}, []


def _hooks(plan: Plan, record: Record) -> None:
    from hv.container.hooks import run_hooks

    plan.hook_state = record.oci_state("creating")

    def run(pid: int) -> None:
        record.data |= {"pid": pid, "pid_start": start_time(pid)}
        record.save()
        for kind in ("prestart", "createRuntime"):
            run_hooks(plan.spec.hooks.get(kind, []), kind, record.oci_state("creating"))

    plan.on_hooks = run


def _filter(plan: Plan, record: Record) -> None:
    from hv.container.seccomp.compile import compile_profile

    profile, spec = plan.spec.seccomp, plan.spec
    plan.filter = spec.filter = spec.filter or compile_profile(profile)
    if plan.filter.listener:
        from hv.container.seccomp.notify import send_listener  # brings load_filter, which the first process needs

        plan.on_notify = lambda pid, fd: send_listener(profile, record.oci_state("creating") | {"pid": pid}, pid, fd)


def _listen(record: Record) -> int:
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    folder = os.open(record.folder, os.O_PATH | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/start.sock")     # a socket's path has at most 107 bytes
        listener.listen(1)
    except OSError as error:
        raise HvError(f"{record.socket}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(folder)
    return listener.detach()


def _open_namespace(kind: str, path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"linux.namespaces: {kind} {path}: {os.strerror(error.errno or 0)}") from None


def connect(path: str, option: str) -> int:
    """A descriptor connected to the Unix socket at `path`, however long that is."""
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    folder, leaf = os.path.split(path)
    try:
        place = os.open(folder or ".", os.O_PATH | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{place}/{leaf}")
        finally:
            os.close(place)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {os.strerror(error.errno or 0)}", "somebody must listen there") from None
    return connection.detach()
