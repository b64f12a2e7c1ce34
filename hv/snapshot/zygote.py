"""Ready machines, each in a process of its own.

    zygote          serves the pool's socket; never has a machine
      template      everything imported, the snapshot's state read; forks (template.py)
        child       restores a machine and waits; told a name, it starts it, and ends with it

A fork takes 1 ms, what was imported is shared copy-on-write. A child that is not wanted yet sleeps in recv.
Driven by tests/kvm/test_pool.py.
"""

from __future__ import annotations

__all__ = ["Zygote"]

import gc
import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET, socket, socketpair
from signal import SIGKILL, SIGTERM, pidfd_send_signal, signal

from hv.errors import HvError, StateError
from hv.machine.loop import EPOLLIN, Loop
from hv.plainjson import dumps, loads
from hv.snapshot.pool import clone_recipe
from hv.snapshot.restore import restore
from hv.snapshot.template import Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.control_call import Call
    from hv.machine.machine import Machine
    from hv.snapshot.format import Snapshot

AT_ONCE = 2                     # children that restore at the same time
PATIENCE = 5.0                  # s that VMs have to end in when the pool ends
_MESSAGE_MOST = 4096
# What a machine would load later: loaded before the first fork, it is shared.
_LATER = ("hv.machine.control_server", "hv.machine.control_commands", "hv.machine.halted", "hv.machine.freeze",
          "hv.machine.attach", "hv.softkvm.complete", "hv.softkvm.syscall_entry", "hv.kvm.abi_io", "hv.kvm.abi_state",
          "hv.kvm.abi_chips", "hv.kvm.msrs")


class Child:
    """A forked process: `channel` leads to it, `pidfd` tells of its end."""

    def __init__(self, pid: int, channel: socket, pidfd: int) -> None:
        self.pid, self.channel, self.pidfd = pid, channel, pidfd
        self.state = "restoring"        # then ready, then running
        self.call: Call | None = None   # who waits for it to run
        self.name = self.path = ""


class Zygote:
    """Keeps `size` children ready. Served by `loop`, in the only thread of this process."""

    def __init__(self, snapshot: Snapshot, size: int, commands: dict[str, str], **options: Any) -> None:
        self.loop = Loop()
        self.size = size
        self.taken = 0
        self.error = ""                 # what the last child that could not restore said
        self.children: dict[int, Child] = {}
        self._snapshot = snapshot
        self._commands = commands
        self._options = {"clock_now": True} | options
        self._made = 0
        self._waiting: list[tuple[Call, str, str]] = []
        self._closing = False
        restore(snapshot, recipe=clone_recipe(snapshot, 0), **self._options).close()     # an error is the caller's
        for module in _LATER:
            __import__(module)
        gc.collect()
        gc.freeze()                     # children don't write to what was there before them
        self._template = Template(lambda channel, number: _live(snapshot, self._options, channel, number))
        self.fill()

    def fill(self) -> None:
        """Fork until enough are ready or about to be."""
        states = [child.state for child in self.children.values()]
        wanted = self.size + len(self._waiting) - states.count("ready") - states.count("restoring")
        for _ in range(min(wanted, AT_ONCE - states.count("restoring"))):
            self._fork()

    def take(self, call: Call, name: str, path: str) -> dict[str, Any] | None:
        """Have a ready child start its machine; the reply comes when it has."""
        self.taken += 1
        ready = next((child for child in self.children.values() if child.state == "ready"), None)
        if ready is None:
            self._waiting.append((call, name, path))
            self.fill()
        else:
            self._send(ready, call, name, path)
        return None

    def status(self) -> dict[str, Any]:
        """For people."""
        states = [child.state for child in self.children.values()]
        return {"snapshot": self._snapshot.folder, "size": self.size, "ready": states.count("ready"),
                "taken": self.taken, "running": states.count("running"), "processes": True,
                "template": self._template.pid, "error": self.error or None}

    def end(self) -> None:
        """End all children, and wait for them."""
        self._closing = True
        for number in (SIGTERM, SIGKILL):
            for child in list(self.children.values()):
                pidfd_send_signal(child.pidfd, number)
            if self.loop.run_until(lambda: not self.children, PATIENCE):
                break

    def close(self) -> None:
        """End all children, if that was not done, and the template; close the loop."""
        self.end()
        self._template.close()
        self.loop.close()

    # children ----------------------------------------------------------------------------------------

    def _fork(self) -> None:
        self._made += 1
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
        try:
            pid = self._template.fork(theirs, self._made)
            child = self.children[pid] = Child(pid, ours, os.pidfd_open(pid))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.loop.add(ours.fileno(), EPOLLIN, lambda events: self._told(child))
        self.loop.add(child.pidfd, EPOLLIN, lambda events: self._ended(child))

    def _send(self, child: Child, call: Call, name: str, path: str) -> None:
        child.state, child.call, child.name, child.path = "running", call, name, path
        try:
            child.channel.send(dumps({"name": name, "path": path, "commands": self._commands}).encode())
        except OSError:
            pass        # it has ended: _ended tells who waits
        self.loop.call_later(0.0, self.fill)

    def _told(self, child: Child) -> None:
        """A child says that it is ready, or runs, or why not."""
        try:
            data = child.channel.recv(_MESSAGE_MOST)
        except OSError:
            data = b""
        if not data:
            self.loop.remove(child.channel.fileno())    # its end is told by the pidfd
            return
        told = loads(data.decode())
        call, child.call = child.call, None
        if "error" in told:
            error = HvError(str(told["error"]), str(told["hint"]))
            if child.state == "restoring":
                self.error = str(error)
                for waiting, _, _ in self._waiting:
                    waiting.fail(error)
                self._waiting.clear()
            elif call is not None:
                call.fail(error)
        elif child.state == "restoring":
            child.state, self.error = "ready", ""
            if self._waiting:
                self._send(child, *self._waiting.pop(0))
            self.fill()
        elif call is not None:
            call.answer({"name": child.name, "socket": child.path, "pid": child.pid})

    def _ended(self, child: Child) -> None:
        self.loop.remove(child.pidfd)
        if child.channel.fileno() >= 0:
            self.loop.remove(child.channel.fileno())
        os.close(child.pidfd)
        child.channel.close()
        del self.children[child.pid]
        if child.call is not None:
            child.call.fail(StateError("the VM ended before it ran"))
        if child.path:
            from hv.machine.control_names import remove_dead

            remove_dead(child.path)     # where it was killed
        if not self._closing and child.state != "restoring":
            self.fill()                 # one that can't restore is not tried again until somebody takes


def _live(snapshot: Snapshot, options: dict[str, Any], fd: int, number: int) -> int:
    """The child, whose channel is `fd`: its exit code."""
    machine: Machine | None = None

    def terminate(caught: int, frame: object) -> None:
        if machine is None or not machine.running():
            raise SystemExit(0)         # out of the read below, which would go on otherwise
        machine.stop("terminated", "the pool ends")

    signal(SIGTERM, terminate)
    try:
        machine = restore(snapshot, recipe=clone_recipe(snapshot, number), **options)
        os.write(fd, b'{"state": "ready"}')
        order = os.read(fd, _MESSAGE_MOST)
        if not order:
            return 0
        told = loads(order.decode())
        machine.serve_control(told["path"], told["commands"])
        machine.start()
        os.write(fd, b'{"state": "running"}')
        return machine.run().code
    except SystemExit:
        return 0
    except HvError as error:
        os.write(fd, dumps({"error": str(error), "hint": error.hint}).encode()[:_MESSAGE_MOST])
        return 1
    finally:
        if machine is not None:
            machine.close()

