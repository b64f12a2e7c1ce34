"""The runtime's side of making a container's first process: fork, answer it, run hooks, clean up where it fails.

init.py is the other side, sync.py draws the talk between the two. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["Plan", "spawn"]

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET
from signal import SIGKILL
from socket import socketpair

from hv.container import sync
from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.container.spec import Spec


class Plan:
    """All that the first process needs to know; made by the runtime, read by init.py after the fork."""

    def __init__(self, spec: Spec, rootfs: str) -> None:
        self.spec = spec
        self.rootfs = rootfs
        self.start_socket = -1          # listening; the program runs once somebody has connected. -1: at once
        self.console_socket = ""        # where the terminal's descriptor is sent
        self.preserve_fds = 0           # descriptors from 3 on that the program gets
        self.pivot = True
        self.new_keyring = True
        self.namespace_fds: list[tuple[str, int]] = []      # (name, fd) of those to join
        self.filter = b""               # compiled seccomp program
        self.cgroup_mount: Callable[..., None] | None = None
        # answers of the runtime's side
        self.on_cgroup: Callable[[int], None] = lambda pid: None
        self.on_map: Callable[[int], None] = lambda pid: None
        self.on_hooks: Callable[[int], None] = lambda pid: None
        self.on_notify: Callable[[int], None] = lambda pid: None


def spawn(plan: Plan) -> int:
    """The pid of the container's first process, ready to run its program. HvError, and nothing left, where it fails."""
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    stage_one = os.fork()
    if not stage_one:
        from hv.container.init import stage_one as child

        ours.close()
        child(plan, sync.Channel(theirs))
    theirs.close()
    channel = sync.Channel(ours)
    pid = 0
    try:
        while True:
            kind, text = channel.receive()
            if kind == sync.READY:
                break
            if kind == sync.PID:
                pid = int(text)
                continue
            if kind == sync.CGROUP:
                plan.on_cgroup(stage_one)
            elif kind == sync.MAP:
                plan.on_map(stage_one)
            elif kind == sync.HOOKS:
                plan.on_hooks(pid)
            elif kind == sync.NOTIFY:
                plan.on_notify(pid)
            else:
                raise HvError(f"unexpected message {kind!r} of the container's first process")
            channel.send(sync.GO)
    except BaseException:
        for victim in (stage_one, pid):
            if victim:
                _kill(victim)
        raise
    finally:
        ours.close()
    os.waitpid(stage_one, 0)
    return pid


def _kill(pid: int) -> None:
    try:
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
    except OSError:
        pass        # it has gone, or is not our child
