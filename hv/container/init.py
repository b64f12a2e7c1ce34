"""What happens between clone and exec, for the new process: namespaces, root, identity, then the user's program.

The order is the field's, learned from its CVEs (docs/security.md): not to be looked into by anybody inside, cgroup,
mounts, what is hidden in /proc, pivot_root, limits, identity, and last, as a small program of its own (stub.py), the
filter and the user's program. `prepare` says it once, for whoever's hands do it (hv/linux/hands.py): those of a process
without Python, which the runtime tells what to do (far.py), or of a fork of the runtime, the stages below. In the fork
everything needed is imported before the root changes: afterwards there is no Python to import from.

Driven by tests/root/test_container_life.py and tests/root/test_container_far.py.
"""

from __future__ import annotations

__all__ = ["Asks", "far_end", "ignored", "prepare", "stage_one", "stage_two"]

import gc
import os
from _signal import SIG_DFL, SIG_SETMASK, SIGKILL, pthread_sigmask, signal, valid_signals
from _socket import socket

from hv.container import identity, rootfs, stub, sync
from hv.container.mounts import Mounter, Options
from hv.container.state import rootless
from hv.errors import HvError
from hv.linux import creds, ns
from hv.linux.hands import Own, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from hv.container.far import Far
    from hv.container.process import Plan
    from hv.linux.hands import Hands

_FAILED = 1
# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_RT_SIGACTION, _SYS_RT_SIGPROCMASK, _SYS_SETSID, _SYS_CLOSE_RANGE = 13, 14, 112, 436
_UNTOUCHABLE = (9, 19, 32, 33)          # SIGKILL, SIGSTOP, and two of the C library's own


def stage_one(plan: Plan, channel: sync.Channel, other_end: int, parent: int) -> NoReturn:
    """C1: enter the namespaces that are there, then make C2, the first process inside. Never returns."""
    try:
        _begin(plan, parent)
        hands = Own()
        plan.join_cgroup(hands)
        plan.in_cgroup = True
        _join(hands, plan.namespace_fds)
        if plan.spec.new_namespaces & ns.CLONE_NEWTIME and not plan.spec.new_namespaces & ns.CLONE_NEWUSER:
            _make_time(plan, hands)     # for C2, which is seen by whoever is in a pid namespace that is joined
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
        hands = Own()
        program = prepare(plan, hands, join, Asks(channel))
        _end(plan, channel, *program)
    except BaseException as error:
        _report(channel, error)
    os._exit(_FAILED)


class Asks:
    """What the runtime does for the first process in between: asked for by messages."""

    def __init__(self, channel: sync.Channel) -> None:
        self._channel = channel

    def ask(self, kind: bytes) -> None:
        """Have CGROUP, MAP, TIME or HOOKS done."""
        self._channel.ask(kind)

    def open(self, path: str) -> Any:
        """A handle of `path`, opened with the runtime's rights."""
        self._channel.ask(sync.OPEN, path)
        return self._channel.received


def prepare(plan: Plan, hands: Hands, join: list[tuple[str, int]], asks: Any,
            groups: bool | None = None) -> tuple[str, bytes]:
    """Everything up to the last steps, by `hands`; the path of the user's program, and the home of its user.

    `groups`: as for identity.take_on.
    """
    hands.umask(0o022)
    if not plan.in_cgroup:
        plan.join_cgroup(hands, v2=not plan.born_in_cgroup)
    identity.set_score(hands, plan.spec.program.oom_score_adj)
    finish = _namespaces(plan, hands, asks, join)
    return _set_up(plan, hands, asks, finish, groups)


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


def _join(hands: Hands, fds: list[tuple[str, int]]) -> None:
    """Enter namespaces, the user namespace first, for it owns the others."""
    if fds:
        # before anybody in there can see us: our memory and descriptors are the host's
        creds.prctl(creds.PR_SET_DUMPABLE, 0, do=hands.do)
    for name, fd in sorted(fds, key=lambda row: row[0] != "user"):
        with hands.failing(plain(f"linux.namespaces: {name}",
                                 "the path must be of that kind of namespace, and entering it be allowed")):
            ns.setns(fd, ns.CLONE_FLAGS[name], hands.do)
        hands.close(fd)
        if name == "user":
            identity.become_root(hands)


def _make_time(plan: Plan, hands: Hands) -> None:
    """A time namespace for the next child. Our memory is to be looked into for that moment by those with our ids."""
    creds.prctl(creds.PR_SET_DUMPABLE, 1, do=hands.do)      # or the file would not be ours to write
    ns.unshare(ns.CLONE_NEWTIME, hands.do)
    identity.set_time_offsets(hands, plan.spec.time_offsets)    # before anybody is in it (man 7 time_namespaces)
    creds.prctl(creds.PR_SET_DUMPABLE, 0, do=hands.do)


def _namespaces(plan: Plan, hands: Hands, asks: Any, join: list[tuple[str, int]]) -> Callable[[], None]:
    """Enter or furnish them. What is given back is to be called later."""
    spec, do = plan.spec, hands.do
    if spec.new_namespaces & ns.CLONE_NEWUSER:
        asks.ask(sync.MAP)              # by somebody who must be allowed to look at us
        identity.become_root(hands)
        if spec.new_namespaces & ns.CLONE_NEWIPC:
            ns.unshare(ns.CLONE_NEWIPC, do)
    _join(hands, join)
    if spec.new_namespaces & ns.CLONE_NEWTIME and not plan.in_time:
        if plan.needs_stage_one:        # we may be seen: the runtime writes to the file
            ns.unshare(ns.CLONE_NEWTIME, do)
            asks.ask(sync.TIME)
        else:
            _make_time(plan, hands)
        fd = hands.open("/proc/self/ns/time_for_children", os.O_RDONLY)
        ns.setns(fd, ns.CLONE_NEWTIME, do)
        hands.close(fd)
    creds.prctl(creds.PR_SET_DUMPABLE, 0, do=do)
    do("setsid", _SYS_SETSID)
    finish = creds.join_session_keyring(f"_ses.{plan.name}", hands) if plan.new_keyring else None
    if spec.new_namespaces & ns.CLONE_NEWNET:
        ns.loopback_up(hands)
    if spec.hostname:
        ns.set_hostname(spec.hostname.encode(), do)
    if spec.domainname:
        ns.set_domainname(spec.domainname.encode(), do)
    return finish or (lambda: None)


class _Cgroup:
    """Entering the cgroup namespace, once the runtime has put us into our cgroup: as late as can be."""

    def __init__(self, plan: Plan, hands: Hands, asks: Any) -> None:
        self._plan, self._hands, self._asks, self._entered = plan, hands, asks, False
        self.root: Any = -1

    def enter(self) -> None:
        if not self._entered:
            self._entered = True
            self._asks.ask(sync.CGROUP)
            if self._plan.spec.new_namespaces & ns.CLONE_NEWCGROUP:
                ns.unshare(ns.CLONE_NEWCGROUP, self._hands.do)

    def mount(self, mount: dict[str, Any], options: Options) -> None:
        self.enter()
        assert self._plan.cgroup_mount is not None
        self._plan.cgroup_mount(self._hands, self.root, mount, options)


def _set_up(plan: Plan, hands: Hands, asks: Any, finish: Callable[[], None], groups: bool | None) -> tuple[str, bytes]:
    """Root, hooks, terminal, identity."""
    spec, program = plan.spec, plan.spec.program
    if spec.personality is not None:
        from hv.linux.sched import set_personality

        set_personality(spec.personality, hands.do)
    cgroup = _Cgroup(plan, hands, asks)
    slave = -1
    if spec.has_mount_namespace:
        opener = asks.open if spec.in_user_namespace else None
        root = cgroup.root = rootfs.open_root(hands, spec.rootfs, spec.rootfs_propagation, opener)
        mounter = Mounter(hands, root, cgroup=cgroup.mount, label=spec.mount_label, opener=opener, trees=plan.trees)
        if any("tmpcopyup" in mount["options"] for mount in spec.mounts):
            cgroup.enter()              # what is copied counts as the container's memory
        mounter.attach_all(spec.mounts)
        if rootfs.has_own_dev(spec.mounts):
            cgroup.enter()              # its device rules are being written: half of them let no node be made
            rootfs.make_devices(hands, spec.devices, root, bind=spec.in_user_namespace or rootless(),
                                mounted=any(mount["destination"] == "/dev" for mount in spec.mounts))
    else:
        root = hands.open(spec.rootfs, os.O_PATH | os.O_DIRECTORY)
    cgroup.enter()
    _hooks_outside(plan, asks)
    if plan.console >= 0:
        from hv.container import tty

        slave = tty.open_console(root, plan.console, program.console_size, program.uid)
        if spec.has_mount_namespace and rootfs.has_own_dev(spec.mounts):
            tty.bind_console(hands, root, slave)
    identity.set_sysctls(hands, spec.sysctl)
    finish()
    if spec.has_mount_namespace:
        rootfs.hide(hands, spec.masked_paths, spec.readonly_paths, root)
        mounter.finish()
        rootfs.switch(hands, root, spec.rootfs_propagation, pivot=plan.pivot, readonly=spec.root_readonly)
    else:
        hands.change(root)
        hands.chroot(".")
    if slave >= 0:
        tty.take_terminal(slave)
    identity.limits(hands, program)
    return identity.take_on(hands, program, root, filtered=bool(plan.filter), groups=groups)


def _hooks_outside(plan: Plan, asks: Any) -> None:
    hooks = plan.spec.hooks
    if "prestart" in hooks or "createRuntime" in hooks:
        asks.ask(sync.HOOKS)
    if "createContainer" in hooks:
        from hv.container.hooks import run_hooks

        run_hooks(hooks["createContainer"], "createContainer", plan.hook_state | {"pid": os.getpid()})


def _end(plan: Plan, channel: sync.Channel, path: str, home: bytes) -> NoReturn:
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
    stub.become(identity.last_steps(plan.spec.program, path, home, listener=listener, reply=reply, lowest=lowest,
                                    filter=filter, reaper=plan.reaper))


def far_end(plan: Plan, hands: Far, path: str, home: bytes, lowest: int) -> None:
    """The same where no Python is in the process: the last list of calls."""
    for number in ignored():            # what we ignore is inherited, what we handle is not
        hands.do("sigaction", _SYS_RT_SIGACTION, number, bytes(32), None, 8)        # SIG_DFL
    hands.do("sigprocmask", _SYS_RT_SIGPROCMASK, 2, bytes(8), None, 8)              # SIG_SETMASK
    if plan.on_ready is not None:
        hands.flush()
        plan.on_ready()
    creds.prctl(creds.PR_SET_PDEATHSIG, 0, do=hands.do)
    listener = plan.start_socket
    if listener >= 0:                   # this may take long: nothing of our caller's stays open
        if listener > lowest:
            hands.do("close_range", _SYS_CLOSE_RANGE, lowest, listener - 1, 0)
        hands.do("close_range", _SYS_CLOSE_RANGE, listener + 1, 0xFFFFFFFF, 0)
    identity.last_steps(plan.spec.program, path, home, listener=listener, reply=hands.inside, lowest=lowest,
                        filter=plan.filter, steps=hands, reaper=plan.reaper)
    hands.end()


def ignored() -> list[int]:
    """The signals that this process ignores (man 5 proc_pid_status)."""
    with open("/proc/self/status", "rb", 0) as file:
        mask = int(file.read(8192).partition(b"\nSigIgn:")[2].split(None, 1)[0], 16)
    return [number for number in range(1, 65) if mask >> number - 1 & 1]


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
