"""What happens between clone and exec, in the new process: namespaces, root, identity, then the user's program.

The order is the field's, learned from its CVEs (docs/security.md): not to be looked into by anybody inside, cgroup,
mounts, what is hidden in /proc, pivot_root, limits, identity, and last, as a small program of its own (stub.py), the
filter and the user's program. Everything needed is imported before the root changes: afterwards there is no Python to
import from. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["stage_one", "stage_two"]

import gc
import os
from _signal import SIG_DFL, SIG_SETMASK, SIGKILL, pthread_sigmask, signal, valid_signals
from _socket import socket

from hv.container import identity, rootfs, stub, sync
from hv.container.mounts import Mounter, Options
from hv.container.state import rootless
from hv.errors import HvError, KernelError
from hv.linux import creds, ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from hv.container.process import Plan

_FAILED = 1
_UNTOUCHABLE = (9, 19, 32, 33)          # SIGKILL, SIGSTOP, and two of the C library's own


def stage_one(plan: Plan, channel: sync.Channel, other_end: int, parent: int) -> NoReturn:
    """C1: enter the namespaces that are there, then make C2, the first process inside. Never returns."""
    try:
        _begin(plan, parent)
        plan.join_cgroup()
        plan.in_cgroup = True
        _join(plan.namespace_fds)
        if plan.spec.new_namespaces & ns.CLONE_NEWTIME and not plan.spec.new_namespaces & ns.CLONE_NEWUSER:
            _make_time(plan)            # for C2, which is seen by whoever is in a pid namespace that is joined
            plan.in_time = True
        pid = ns.clone_sibling(plan.clone_flags)
        if pid:
            channel.send(sync.PID, str(pid))
            os._exit(0)
    except BaseException as error:
        _report(channel, error)
        os._exit(_FAILED)
    stage_two(plan, channel, other_end, [], parent)


def stage_two(plan: Plan, channel: sync.Channel, other_end: int, join: list[tuple[str, int]], parent: int) -> NoReturn:
    """C2: everything inside. Never returns."""
    try:
        _begin(plan, parent)
        os.close(other_end)     # so that we learn of the runtime's end
        os.umask(0o022)
        if not plan.in_cgroup:
            plan.join_cgroup(v2=not plan.born_in_cgroup)
        identity.set_score(plan.spec.program.oom_score_adj)
        _namespaces(plan, channel, join)
        _set_up(plan, channel)
    except BaseException as error:
        _report(channel, error)
    os._exit(_FAILED)


def _begin(plan: Plan, parent: int) -> None:
    """Die with the runtime, and do not hold its lock."""
    gc.disable()        # it would copy every page that it looks at, for a process that is gone in a moment
    creds.prctl(creds.PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() not in (parent, 0):     # 0: it is outside of our pid namespace
        os._exit(_FAILED)
    if plan.lock >= 0:
        os.close(plan.lock)
        plan.lock = -1


def _report(channel: sync.Channel, error: BaseException) -> None:
    if isinstance(error, HvError):
        channel.send(sync.ERROR, f"{error}" + (f" - {error.hint}" if error.hint else ""))
    else:
        channel.send(sync.ERROR, f"{type(error).__name__}: {error}")


def _join(fds: list[tuple[str, int]]) -> None:
    """Enter namespaces, the user namespace first, for it owns the others."""
    if fds:
        # before anybody in there can see us: our memory and descriptors are the host's
        creds.prctl(creds.PR_SET_DUMPABLE, 0)
    for name, fd in sorted(fds, key=lambda row: row[0] != "user"):
        try:
            ns.setns(fd, ns.CLONE_FLAGS[name])
        except KernelError as error:
            raise HvError(f"linux.namespaces: {name}: {os.strerror(error.errno)}",
                          "the path must be of that kind of namespace, and entering it be allowed") from None
        os.close(fd)
        if name == "user":
            identity.become_root()


def _make_time(plan: Plan) -> None:
    """A time namespace for the next child. Our memory is to be looked into for that moment by those with our ids."""
    creds.prctl(creds.PR_SET_DUMPABLE, 1)       # or the file would not be ours to write
    ns.unshare(ns.CLONE_NEWTIME)
    identity.set_time_offsets(plan.spec.time_offsets)       # before anybody is in it (man 7 time_namespaces)
    creds.prctl(creds.PR_SET_DUMPABLE, 0)


def _namespaces(plan: Plan, channel: sync.Channel, join: list[tuple[str, int]]) -> None:
    spec = plan.spec
    if spec.new_namespaces & ns.CLONE_NEWUSER:
        channel.ask(sync.MAP)           # by somebody who must be allowed to look at us
        identity.become_root()
        if spec.new_namespaces & ns.CLONE_NEWIPC:
            ns.unshare(ns.CLONE_NEWIPC)
    _join(join)
    if spec.new_namespaces & ns.CLONE_NEWTIME and not plan.in_time:
        if plan.needs_stage_one:        # we may be seen: the runtime writes to the file
            ns.unshare(ns.CLONE_NEWTIME)
            channel.ask(sync.TIME)
        else:
            _make_time(plan)
        fd = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
        ns.setns(fd, ns.CLONE_NEWTIME)
        os.close(fd)
    creds.prctl(creds.PR_SET_DUMPABLE, 0)
    os.setsid()
    if plan.new_keyring:
        creds.join_session_keyring(f"_ses.{plan.name}")
    if spec.new_namespaces & ns.CLONE_NEWNET:
        ns.loopback_up()
    if spec.hostname:
        ns.set_hostname(spec.hostname.encode())
    if spec.domainname:
        ns.set_domainname(spec.domainname.encode())


class _Cgroup:
    """Entering the cgroup namespace, once the runtime has put us into our cgroup: as late as can be."""

    def __init__(self, plan: Plan, channel: sync.Channel) -> None:
        self._plan, self._channel, self._entered = plan, channel, False
        self.root = -1

    def enter(self) -> None:
        if not self._entered:
            self._entered = True
            self._channel.ask(sync.CGROUP)
            if self._plan.spec.new_namespaces & ns.CLONE_NEWCGROUP:
                ns.unshare(ns.CLONE_NEWCGROUP)

    def mount(self, mount: dict[str, Any], options: Options) -> None:
        self.enter()
        assert self._plan.cgroup_mount is not None
        self._plan.cgroup_mount(self.root, mount, options)


def _set_up(plan: Plan, channel: sync.Channel) -> None:
    """Root, hooks, terminal, identity; then the last program. Returns only by an exception."""
    spec, program = plan.spec, plan.spec.program
    if spec.personality is not None:
        from hv.linux.sched import set_personality

        set_personality(spec.personality)
    cgroup = _Cgroup(plan, channel)
    slave = -1
    if spec.has_mount_namespace:
        opener = _opener(channel) if spec.in_user_namespace else None
        root = cgroup.root = rootfs.open_root(spec.rootfs, spec.rootfs_propagation, opener)
        mounter = Mounter(root, cgroup=cgroup.mount, label=spec.mount_label, opener=opener, trees=plan.trees)
        if any("tmpcopyup" in mount["options"] for mount in spec.mounts):
            cgroup.enter()              # what is copied counts as the container's memory
        mounter.attach_all(spec.mounts)
        if rootfs.has_own_dev(spec.mounts):
            cgroup.enter()              # its device rules are being written: half of them let no node be made
            rootfs.make_devices(spec.devices, root, bind=spec.in_user_namespace or rootless())
    else:
        root = os.open(spec.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    cgroup.enter()
    _hooks_outside(plan, channel)
    if plan.console >= 0:
        from hv.container import tty

        slave = tty.open_console(root, plan.console, program.console_size, program.uid)
        if spec.has_mount_namespace and rootfs.has_own_dev(spec.mounts):
            tty.bind_console(root, slave)
    identity.set_sysctls(spec.sysctl)
    if spec.has_mount_namespace:
        rootfs.hide(spec.masked_paths, spec.readonly_paths, root)
        mounter.finish()
        rootfs.switch(root, spec.rootfs_propagation, pivot=plan.pivot, readonly=spec.root_readonly)
    else:
        os.fchdir(root)
        os.chroot(".")
    if slave >= 0:
        tty.take_terminal(slave)
    identity.limits(program)
    path = identity.take_on(program, root, filtered=bool(plan.filter))
    _end(plan, channel, path)


def _opener(channel: sync.Channel) -> Any:
    def open_outside(path: str) -> int:
        channel.ask(sync.OPEN, path)
        return channel.received

    return open_outside


def _hooks_outside(plan: Plan, channel: sync.Channel) -> None:
    hooks = plan.spec.hooks
    if "prestart" in hooks or "createRuntime" in hooks:
        channel.ask(sync.HOOKS)
    if "createContainer" in hooks:
        from hv.container.hooks import run_hooks

        run_hooks(hooks["createContainer"], "createContainer", plan.hook_state | {"pid": os.getpid()})


def _end(plan: Plan, channel: sync.Channel, path: str) -> NoReturn:
    """Signals as a program expects them, descriptors, and the last program."""
    for number in valid_signals():
        if number not in _UNTOUCHABLE:
            signal(number, SIG_DFL)     # Python ignores SIGPIPE and others, which a program would inherit
    pthread_sigmask(SIG_SETMASK, ())
    lowest = 3 + plan.preserve_fds
    ns.close_from(lowest)
    filter = plan.filter
    if filter is not None and filter.listener:
        from hv.container.seccomp.notify import load_filter

        channel.ask(sync.NOTIFY, fd=load_filter(filter, filter.flags, True))
        filter = None                   # it is in force
    listener, reply = plan.start_socket, channel.end.fileno()
    if plan.on_ready is None:
        channel.send(sync.READY)
    else:
        channel.ask(sync.READY)
    if "startContainer" in plan.spec.hooks:
        reply, listener = _wait_with_hooks(plan, channel), -1
    creds.prctl(creds.PR_SET_PDEATHSIG, 0)
    if listener >= 0:
        listener = stub.inherit(listener, lowest)
    else:
        reply = stub.inherit(reply, lowest)
    stub.become(identity.last_steps(plan.spec.program, path, listener=listener, reply=reply, lowest=lowest,
                                    filter=filter, reaper=plan.reaper))


def _wait_with_hooks(plan: Plan, channel: sync.Channel) -> int:
    """Wait for start in here, as hooks are to be run then; the descriptor to report to."""
    from hv.container.hooks import run_hooks

    reply = channel.end.fileno()
    if plan.start_socket >= 0:
        creds.prctl(creds.PR_SET_PDEATHSIG, 0)
        lowest = 3 + plan.preserve_fds
        listener = stub.inherit(plan.start_socket, lowest)
        if listener != lowest:
            os.dup2(listener, lowest)
        ns.close_from(lowest + 1, now=True)     # this may take long: nothing of our caller's stays open
        reply, _ = socket(fileno=lowest)._accept()  # type: ignore[attr-defined]
    try:
        run_hooks(plan.spec.hooks["startContainer"], "startContainer",
                  plan.hook_state | {"pid": os.getpid(), "status": "created"})
    except HvError as error:
        os.write(reply, f"{error}".encode())
        os._exit(_FAILED)
    return reply
