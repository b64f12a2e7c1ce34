"""The helper of `exec`: from the runtime's namespaces into the container's, then the last program (exec.py draws it).

It is not in the container's pid namespace and can't be looked at from inside; the descriptors it has are closed, and
what it was is gone, before the new process is made there. Everything needed is imported before the namespaces change.

Driven by tests/root/test_container_exec.py and tests/root/test_container_exec_safety.py.
"""

from __future__ import annotations

__all__ = ["Entry", "enter"]

import os
import termios
from _signal import SIG_DFL, SIG_SETMASK, SIGCHLD, SIGKILL, pthread_sigmask, signal, valid_signals
from fcntl import ioctl
from resource import RLIMIT_NPROC, getrlimit

from hv.container import identity, mounts, stub, sync, tty  # noqa: F401 (mounts: identity makes a missing cwd with it)
from hv.errors import HvError, KernelError
from hv.linux import creds, ns, sched
from hv.linux.hands import Own
from hv.linux.seccomp import load_filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from hv.container.cgroups.manager import Cgroup
    from hv.container.program import Program
    from hv.container.seccomp.compile import Program as Filter
    from hv.container.spec import Spec

_FAILED = 1
_UNTOUCHABLE = (9, 19, 32, 33)          # SIGKILL, SIGSTOP, and two of the C library's own
# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_IOCTL, _SYS_CLONE, _SYS_SETSID, _SYS_PRLIMIT64 = 16, 56, 112, 302


class Entry:
    """What the helper needs to know; made by the runtime, read after the fork."""

    def __init__(self, spec: Spec, program: Program, keyring: str) -> None:
        self.spec = spec
        self.program = program
        self.keyring = keyring          # the session keyring of the container, "" for the runtime's own
        self.pidfd = -1                 # of the container's first process
        self.flags = 0                  # its namespaces that are not ours
        self.group: Cgroup
        self.born = False               # in the version 2 group
        self.root = -1                  # the container's root, where it has no mount namespace of its own
        self.groups = True              # setgroups is allowed in its user namespace
        self.console = -1               # connected; the terminal's descriptor is sent there. -1: no terminal
        self.preserve_fds = 0
        self.filter: Filter | None = None


def enter(entry: Entry, channel: sync.Channel, other_end: int, parent: int) -> NoReturn:
    """Everything up to the last program. Never returns."""
    try:
        creds.prctl(creds.PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != parent:
            os._exit(_FAILED)
        os.close(other_end)             # so that we learn of the runtime's end
        _before(entry, channel)
        _join(entry)
        _inside(entry, channel)
    except BaseException as error:
        hint = getattr(error, "hint", "")
        text = str(error) if isinstance(error, HvError) else f"{type(error).__name__}: {error}"
        channel.send(sync.ERROR, text + (f" - {hint}" if hint else ""))
    os._exit(_FAILED)


def _before(entry: Entry, channel: sync.Channel) -> None:
    """What needs the host's /proc and rights, and being let into the cgroup."""
    program = entry.program
    if program.cpus and program.cpus[0]:
        _run_on(program.cpus[0], "initial")
    entry.group.join(Own(), v2=False)
    kind, _ = channel.receive()         # the runtime has seen to version 2
    if kind != sync.GO:
        raise HvError(f"unexpected message {kind!r}")
    if program.cpus and program.cpus[1]:
        _run_on(program.cpus[1], "final")
    identity.set_score(Own(), program.oom_score_adj)
    if program.apparmor or program.selinux:
        from hv.container.labels import on_exec

        on_exec(program.apparmor, program.selinux)
        program.apparmor = program.selinux = ""
    creds.prctl(creds.PR_SET_DUMPABLE, 0)


def _run_on(cpus: set[int], field: str) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise HvError(f"process.execCPUAffinity.{field}: {os.strerror(error.errno or 0)}",
                      "the host or the container's cpuset does not have them") from None


def _join(entry: Entry) -> None:
    """Enter all namespaces in one call, which checks our rights for all of them as they are now."""
    try:
        if entry.flags:
            ns.setns(entry.pidfd, entry.flags)
    except KernelError as error:
        raise HvError(f"the container's namespaces: {os.strerror(error.errno)}",
                      "has it ended meanwhile? only its owner and root can enter it") from None
    if entry.root >= 0:
        os.fchdir(entry.root)
        os.chroot(".")
    if entry.flags & ns.CLONE_NEWUSER:
        identity.become_root(Own(), entry.groups)
        creds.prctl(creds.PR_SET_DUMPABLE, 0)
    if entry.spec.personality is not None:
        sched.set_personality(entry.spec.personality)
    if entry.keyring:
        creds.join_session_keyring(entry.keyring, Own())()


def _inside(entry: Entry, channel: sync.Channel) -> NoReturn:
    program = entry.program
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if entry.console >= 0:
        slave = tty.open_console(root, entry.console, program.console_size, program.uid)
        for fd in range(3):
            os.dup2(slave, fd)
    late = _limits(program)
    path, home = identity.take_on(Own(), program, root, filtered=bool(entry.filter), groups=entry.groups)
    for number in valid_signals():
        if number not in _UNTOUCHABLE:
            signal(number, SIG_DFL)     # Python ignores SIGPIPE and others, which a program would inherit
    pthread_sigmask(SIG_SETMASK, ())
    lowest = 3 + entry.preserve_fds
    code = entry.filter
    supervised = code is not None and code.listener
    if supervised:
        _with_supervisor(entry, channel)
        code = None
    ns.close_from(lowest)
    reply = stub.inherit(channel.end.fileno(), lowest)
    steps = stub.Steps(reply)
    if not supervised:
        steps.add(stub.FORK, _SYS_CLONE, ns.CLONE_PARENT | SIGCHLD, result=stub.LEAVE)
        steps.add(stub.FORK, _SYS_SETSID)
        if entry.console >= 0:
            steps.add(stub.TERMINAL, _SYS_IOCTL, 0, termios.TIOCSCTTY, 0)
    for kind, soft, hard in late:
        steps.add(stub.LIMIT, _SYS_PRLIMIT64, 0, kind, (soft, hard), 0)
    stub.become(identity.last_steps(program, path, home, listener=-1, reply=reply, lowest=lowest, filter=code,
                                    steps=steps))


def _limits(program: Program) -> list[tuple[int, int, int]]:
    """Set the limits. That of processes counts all of the user's, this helper too: a lower one is left for later."""
    late = []
    for row in program.rlimits:
        kind, soft, hard, _ = row
        if kind == RLIMIT_NPROC and hard >= 0 and (getrlimit(kind)[1] < 0 or hard <= getrlimit(kind)[1]):
            late.append((kind, soft, hard))
    rest = [row for row in program.rlimits if row[:3] not in late]
    program.rlimits = rest
    identity.limits(Own(), program)
    return late


def _with_supervisor(entry: Entry, channel: sync.Channel) -> None:
    """The new process is made here, for the descriptor of its filter is to be sent before the last program.

    It can be seen from inside for that time, though not be looked into.
    """
    pid = ns.clone_sibling(0)
    if pid:
        channel.end.send(stub.tell_process(pid))
        os._exit(0)
    os.setsid()
    if entry.console >= 0:
        ioctl(0, termios.TIOCSCTTY, 0)
    assert entry.filter is not None
    fd = load_filter(entry.filter, entry.filter.flags, True)
    channel.ask(sync.NOTIFY, fd=fd)
    os.close(fd)
