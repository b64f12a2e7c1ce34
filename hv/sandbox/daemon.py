"""The VM's process: forked by `create`, in a session and a cgroup of its own, it stays until the program has ended.

    runtime                              daemon
       | --- fork ------------------------->| session, cgroup, descriptors closed
       |<-- hooks ---------------------------| (where there are any: its network namespace is there)
       | --- go ---------------------------->| tree, guest, terminal
       |<-- ready, or what went wrong -------|
       ends, the daemon is the engine's      serves; ends with the program's exit code

Engines wait for it as for a container's first process. What it is sent as signals goes to the program, and so does the
size of the terminal, whose other side the engine has. Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["Daemon", "attend_signals", "join"]

import os
from _signal import SIG_DFL, SIGCHLD, SIGCONT, SIGKILL, SIGTERM, SIGURG, SIGWINCH, signal, valid_signals
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET, socket, socketpair

from hv.errors import HvError
from hv.linux.ns import CLONE_NEWNET, keep_descriptors, unshare
from hv.linux.signals import block_all, new_process, read_signal, signal_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from hv.container.cgroups.manager import Cgroup
    from hv.container.spec import Spec
    from hv.container.state import Record
    from hv.sandbox.process import GuestProcess
    from hv.sandbox.sandbox import Sandbox

_READY, _HOOKS, _FAILED, _GO = b"R", b"H", b"E", b"G"
_SAID_MOST = 4096
_INTERNAL = 70                  # sysexits.h, EX_SOFTWARE
_UNTOUCHABLE = (9, 19, 32, 33)  # SIGKILL, SIGSTOP, and two of the C library's own
_UNPASSED = (SIGCHLD, SIGURG, SIGCONT)


class Daemon:
    """A VM's process that comes up. `pid` is its number."""

    def __init__(self, spec: Spec, record: Record, group: Cgroup, console_socket: str,
                 warn: Callable[[str], None]) -> None:
        console = -1
        if console_socket:
            from hv.container.plan import connect

            console = connect(console_socket, "--console-socket")
        self._ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
        born: list[int] = []
        try:
            new_process(os.fork, born)
            if not born[0]:
                self._ours.close()
                _live(spec, record, group, console, theirs, warn)
        finally:
            theirs.close()
            if console >= 0:
                os.close(console)
        self.pid = born[0]

    def await_ready(self, hooks: Callable[[], None]) -> None:
        """Until its guest waits for the program to be started; runs `hooks` when it asks for that. HvError."""
        while True:
            data = self._ours.recv(_SAID_MOST)
            if data[:1] == _HOOKS:
                hooks()
                self._ours.send(_GO)
            elif data[:1] == _READY:
                return
            else:
                text, _, hint = data[1:].decode(errors="replace").partition("\n")
                raise HvError(text or "the VM's process ended before its guest was up", hint)

    def kill(self) -> None:
        """End it."""
        self._ours.close()
        try:
            os.kill(self.pid, SIGKILL)
            os.waitpid(self.pid, 0)
        except OSError:
            pass                # it has gone


def _live(spec: Spec, record: Record, group: Cgroup, console: int, channel: socket,
          warn: Callable[[str], None]) -> NoReturn:
    """The child. Never returns."""
    code = _INTERNAL
    try:
        code = _serve(spec, record, group, console, channel, warn)
    except HvError as error:
        _say(channel, f"{error}\n{error.hint}")
    except BaseException as error:
        _say(channel, f"internal error: {type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def _serve(spec: Spec, record: Record, group: Cgroup, console: int, channel: socket,
           warn: Callable[[str], None]) -> int:
    from hv.sandbox.sandbox import Sandbox

    os.setsid()
    join(group)
    record.unlock()             # our copy of the lock; the runtime has its own
    keep_descriptors(channel.fileno(), console)
    for number in valid_signals():
        if number not in _UNTOUCHABLE:
            signal(number, SIG_DFL)
    block_all()
    if {"prestart", "createRuntime"} & spec.hooks.keys():
        if spec.new_namespaces & CLONE_NEWNET:
            unshare(CLONE_NEWNET)
        channel.send(_HOOKS)
        if channel.recv(1) != _GO:
            return _INTERNAL
    sandbox = Sandbox(spec, record.name, record.folder, warn=warn)
    sandbox.prepare()
    sandbox.require_program()
    slave = -1
    if console >= 0:
        from hv.sandbox.terminal import give_terminal

        slave = give_terminal(console, spec.program.console_size)
    attend_signals(sandbox, slave)

    def begin() -> GuestProcess:
        if slave >= 0:
            from hv.sandbox.terminal import size_of

            spec.program.console_size = size_of(slave)
            process = sandbox.start(slave, slave, None)
        else:
            process = sandbox.start(0, 1, 2)
        _let_go_of_streams()
        return process

    sandbox.on_start = begin
    with open(record.socket, "wb"):
        pass                    # what tells a created container from a running one
    channel.send(_READY)
    channel.close()
    code = sandbox.serve()
    sandbox.close()
    return code


def join(group: Cgroup) -> None:
    """This process, of one thread, enters its cgroup. Not that of version 2 on a host whose controllers are version
    1's: it limits nothing there, and to enter it waits for a grace period of the kernel's, 12 ms."""
    from hv.linux.hands import OWN

    group.join(OWN, v2=len(group.paths) == 1)


def attend_signals(sandbox: Sandbox, terminal: int) -> None:
    """What this process gets, all being blocked, goes to the program; the size of `terminal` with SIGWINCH."""
    fd = signal_descriptor()

    def take(events: int) -> None:
        number = read_signal(fd)
        process = sandbox.process
        if number == SIGWINCH and terminal >= 0:
            from hv.sandbox.terminal import size_of

            if process is not None:
                process.resize(*size_of(terminal))
        elif number in _UNPASSED:
            pass
        elif process is not None:
            process.signal(number)
        elif number == SIGTERM:
            sandbox.end()       # its program never ran

    sandbox.loop.add(fd, 1, take)       # EPOLLIN


def _let_go_of_streams() -> None:
    """The program's streams have descriptors of their own now, and are to end when it does."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)


def _say(channel: socket, text: str) -> None:
    try:
        channel.send(_FAILED + text.encode()[:_SAID_MOST - 1])
    except OSError:
        pass                    # it was up, or the runtime has gone
