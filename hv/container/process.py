"""The runtime's side of making a container's first process: clone, answer it, run hooks, clean up where it fails.

init.py is the other side, sync.py draws the talk between the two. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["Plan", "spawn"]

import os
from _signal import SIGKILL
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET, socketpair

from hv.container import far, identity, sync
from hv.container.init import far_end, prepare, stage_one, stage_two
from hv.container.stub import above, explain
from hv.errors import HvError, KernelError
from hv.linux.hands import Own
from hv.linux.mount import open_in
from hv.linux.ns import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    clone,
    single_threaded,
    unshare,
)
from hv.linux.signals import Held, new_process
from hv.linux.syscall import buffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.mounts import Options
    from hv.container.seccomp.compile import Program as Filter
    from hv.container.spec import Spec
    from hv.linux.hands import Hands


class Plan:
    """All that the first process needs to know; made by the runtime, read by init.py after the fork."""

    def __init__(self, spec: Spec, name: str) -> None:
        self.spec = spec
        self.name = name
        self.start_socket = -1          # listening; the program runs once somebody has connected. -1: at once
        self.console = -1               # connected; the terminal's descriptor is sent there. -1: no terminal
        self.lock = -1                  # of the record, held by the runtime alone
        self.preserve_fds = 0           # descriptors from 3 on that the program gets
        self.pivot = True
        self.new_keyring = True
        self.programs: list[far.Program] = []   # of earlier containers, to be used again
        self.reaper = False             # the program gets a parent that reaps (stub.py)
        self.namespace_fds: list[tuple[str, int]] = []      # (name, fd) of those to join
        self.trees: dict[int, int] = {}                     # mounts made ready by the runtime, by number
        self.filter: Filter | None = None
        self.in_cgroup = self.born_in_cgroup = False        # entirely; that of version 2
        self.in_time = False            # its time namespace is there
        self.cgroup_fd = -1             # of the version 2 group, to be born in
        self.join_cgroup: Callable[..., None] = lambda hands, v2=True: None        # done by the first process itself
        self.cgroup_mount: Callable[[Hands, Any, dict[str, Any], Options], None] | None = None
        self.hook_state: dict[str, Any] = {}                # for the hooks that run inside
        # answers of the runtime's side
        self.on_moved: Callable[[int], None] = lambda pid: None     # it could not be born in the version 2 group
        self.on_cgroup: Callable[[int], None] = lambda pid: None
        self.on_map: Callable[[int], None] = lambda pid: None
        self.on_hooks: Callable[[int], None] = lambda pid: None
        self.on_ready: Callable[[], object] | None = None       # before the program can run
        self.on_made: Callable[[int], None] = lambda pid: None     # all is said; it may run already
        self.on_notify: Callable[[int, int], None] = lambda pid, fd: None
        self.on_close: Callable[[], None] = lambda: None        # it is ready, or has failed

    @property
    def clone_flags(self) -> int:
        """New namespaces that the clone makes. A cgroup namespace's root is where its maker is, so it comes later.

        So does that of ipc in a user namespace: /dev/mqueue would belong to an id from outside.
        """
        new = self.spec.new_namespaces
        return new & ~(CLONE_NEWCGROUP | CLONE_NEWTIME | (CLONE_NEWIPC if new & CLONE_NEWUSER else 0))

    @property
    def needs_stage_one(self) -> bool:
        """Whether another process must first enter namespaces: they count for children only, or own the new ones."""
        joined = {kind for kind, _ in self.namespace_fds}
        return bool(joined & {"pid", "user"} or (joined and self.spec.new_namespaces & CLONE_NEWUSER))


def spawn(plan: Plan) -> int:
    """The pid of the container's first process, whose program runs or waits. HvError, and nothing left, if it fails."""
    if far.able(plan):
        return _spawn_far(plan)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    channel = sync.Channel(ours)
    born: list[int] = []            # what is to be killed if it comes to nothing
    parent = os.getpid()
    try:
        if plan.needs_stage_one or not single_threaded():
            new_process(os.fork, born)
            if not born[0]:
                stage_one(plan, sync.Channel(theirs), ours.fileno(), parent)
            theirs.close()
            os.waitid(os.P_PID, born[0], os.WEXITED | os.WNOWAIT)
            with Held():            # it says one thing and ends; the process that it has made may be faster
                os.waitpid(born.pop(), 0)
                born.append(channel.second_process())
        else:
            new_process(lambda: _clone(plan), born)
            if not born[0]:
                stage_two(plan, sync.Channel(theirs), ours.fileno(), plan.namespace_fds, parent)
            theirs.close()
        pid = born[-1]
        _talk(plan, channel, pid)
        plan.on_made(pid)
        report = channel.last_word()
        if report:
            raise HvError(report[1:].decode(errors="replace") if report[:1] == sync.ERROR
                          else explain(report, plan.spec.program.args[0]))
    except BaseException:
        _kill(*born)
        raise
    finally:
        ours.close()
        theirs.close()
    return pid


def _clone(plan: Plan, make: Callable[[int, int], int] = clone) -> int:
    if plan.cgroup_fd >= 0:
        try:
            plan.born_in_cgroup = True      # known to the new process as well
            return make(plan.clone_flags, plan.cgroup_fd)
        except KernelError:
            plan.born_in_cgroup = False     # perhaps the kernel is too old; if it is something else, it comes again
    return make(plan.clone_flags, -1)


def _spawn_far(plan: Plan) -> int:
    """The same, where the first process has no Python in it (far.py): what init.py does is done from here."""
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    answers = _Answers(plan)
    memory = -1
    try:
        lowest = 3 + plan.preserve_fds  # above those that the program gets
        answers.inside = above(theirs.detach(), lowest)
        memory = above(os.memfd_create("pyhv-lists"), lowest)
        plan.start_socket = above(plan.start_socket, lowest)
        hands = answers.hands = far.Far(ours, answers.inside, memory, answers.begin)
        plan.born_in_cgroup = plan.cgroup_fd >= 0
        if own := plan.clone_flags & ~CLONE_NEWPID:
            # a network takes the kernel a while, in which there is something to be done here
            unshare(own, hands.do)
        try:
            path, home = prepare(plan, hands, plan.namespace_fds, answers, identity.may_set_groups())
        except (UnicodeError, ValueError, OSError) as error:        # text that is no path, as init.py reports it
            raise HvError(f"{type(error).__name__}: {error}") from None
        far_end(plan, hands, path, home, lowest)
        plan.on_made(answers.pid)
        hands.outcome(plan.spec.program.args[0])
    except BaseException:
        if answers.pid:
            _kill(answers.pid)
        raise
    finally:
        ours.close()
        answers.close()
        if memory >= 0:
            os.close(memory)
    return answers.pid


class _Answers:
    """What init.py asks for in between, done at once."""

    hands: far.Far

    def __init__(self, plan: Plan) -> None:
        self._plan, self.inside = plan, -1
        self._born = buffer(4)

    @property
    def pid(self) -> int:
        """The new process, 0 before. The kernel writes it down, so no signal comes in between (man 2 clone)."""
        return int.from_bytes(self._born.raw, "little")

    def close(self) -> None:
        """The new process alone holds its end of the channel, so that its own end is heard of."""
        if self.inside >= 0:
            os.close(self.inside)
            self.inside = -1

    def begin(self) -> None:
        """Make the process; the cgroup gets its limits meanwhile."""
        plan = self._plan
        kept = [*plan.trees.values(), *(fd for _, fd in plan.namespace_fds)]
        if plan.start_socket >= 0:
            kept.append(plan.start_socket)
        found = far.program(plan.programs, self.inside, self.hands.memory)
        _clone(plan, lambda flags, cgroup: found.launch(flags & CLONE_NEWPID, cgroup, kept, self._born))
        self.close()
        if plan.cgroup_fd >= 0 and not plan.born_in_cgroup:
            plan.on_moved(self.pid)
        plan.on_cgroup(self.pid)

    def ask(self, kind: bytes) -> None:
        """As Asks.ask."""
        if kind == sync.HOOKS:          # CGROUP: has been done
            self.hands.flush()
            self._plan.on_hooks(self.pid)


def _talk(plan: Plan, channel: sync.Channel, pid: int) -> None:
    """Answer the first process until it is ready."""
    if plan.spec.new_namespaces & CLONE_NEWUSER:
        _expect(channel, sync.MAP)
        plan.on_map(pid)
        channel.send(sync.GO)
    plan.on_cgroup(pid)
    while True:
        kind, text = channel.receive()
        if kind == sync.READY:
            if plan.on_ready is not None:
                plan.on_ready()
                channel.send(sync.GO)
            return
        given = -1
        if kind == sync.OPEN:
            given = _open_for(pid, text)
        elif kind == sync.HOOKS:
            plan.on_hooks(pid)
        elif kind == sync.TIME:
            identity.set_time_offsets(Own(), plan.spec.time_offsets, pid)
        elif kind == sync.NOTIFY:
            listener, channel.received = channel.received, -1
            try:
                plan.on_notify(pid, listener)
            finally:
                os.close(listener)
        elif kind != sync.CGROUP:
            raise HvError(f"unexpected message {kind!r} of the container's first process")
        channel.send(sync.GO, fd=given)
        if given >= 0:
            os.close(given)


def _expect(channel: sync.Channel, wanted: bytes) -> None:
    kind, _ = channel.receive()
    if kind != wanted:
        raise HvError(f"unexpected message {kind!r} of the container's first process")


def _open_for(pid: int, path: str) -> int:
    """`path` in the mount namespace of `pid`, but with the runtime's rights."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    try:
        return int(open_in(root, path, os.O_PATH))
    finally:
        os.close(root)


def _kill(*pids: int) -> None:
    for pid in pids:
        if not pid:
            os._exit(1)     # in the new process itself, which is not to go on as the runtime
        try:
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)
        except OSError:
            pass            # it has gone, or is not our child
