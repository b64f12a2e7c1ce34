"""The runtime's side of making a container's first process: clone, answer it, run hooks, clean up where it fails.

init.py is the other side, sync.py draws the talk between the two. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["Plan", "spawn"]

import os
from _signal import SIGKILL
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET, socketpair

from hv.container import identity, sync
from hv.container.init import stage_one, stage_two
from hv.container.stub import explain
from hv.errors import HvError, KernelError
from hv.linux.mount import open_in
from hv.linux.ns import CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWTIME, CLONE_NEWUSER, clone, single_threaded
from hv.linux.signals import Held, new_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.mounts import Options
    from hv.container.seccomp.compile import Program as Filter
    from hv.container.spec import Spec


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
        self.reaper = False             # the program gets a parent that reaps (stub.py)
        self.namespace_fds: list[tuple[str, int]] = []      # (name, fd) of those to join
        self.trees: dict[int, int] = {}                     # mounts made ready by the runtime, by number
        self.filter: Filter | None = None
        self.in_cgroup = self.born_in_cgroup = False        # entirely; that of version 2
        self.in_time = False            # its time namespace is there
        self.cgroup_fd = -1             # of the version 2 group, to be born in
        self.join_cgroup: Callable[..., None] = lambda v2=True: None        # done by the first process itself
        self.cgroup_mount: Callable[[int, dict[str, Any], Options], None] | None = None
        self.hook_state: dict[str, Any] = {}                # for the hooks that run inside
        # answers of the runtime's side
        self.on_cgroup: Callable[[int], None] = lambda pid: None
        self.on_map: Callable[[int], None] = lambda pid: None
        self.on_hooks: Callable[[int], None] = lambda pid: None
        self.on_ready: Callable[[], object] | None = None       # before the program can run
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


def _clone(plan: Plan) -> int:
    if plan.cgroup_fd >= 0:
        try:
            plan.born_in_cgroup = True      # known to the new process as well
            return clone(plan.clone_flags, plan.cgroup_fd)
        except KernelError:
            plan.born_in_cgroup = False     # perhaps the kernel is too old; if it is something else, it comes again
    return clone(plan.clone_flags)


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
            identity.set_time_offsets(plan.spec.time_offsets, pid)
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
        return open_in(root, path, os.O_PATH)
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
