"""A process of the host that stands for a program of the guest: engines wait for it, and signal it.

`exec --detach` leaves one behind: it holds the connection to the VM, whose process has the program's streams, and ends
with the program's exit code. Where it is killed the program is. Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["detached", "foreground"]

import os
from _signal import SIG_SETMASK, SIGCHLD, SIGCONT, SIGKILL, SIGURG, SIGWINCH, pthread_sigmask
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_SEQPACKET, socket, socketpair
from select import POLLIN, poll

from hv.container.state import write_whole
from hv.errors import HvError
from hv.linux.ns import keep_descriptors
from hv.linux.signals import block_all, new_process, read_signal, signal_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from hv.sandbox.client import ClientProcess, SandboxClient

_UNPASSED = (SIGCHLD, SIGURG, SIGCONT)
_SAID_MOST = 4096


def foreground(client: SandboxClient, process: dict[str, Any], pid_file: str = "") -> int:
    """Run it on our standard streams; its exit code. Our terminal is in raw mode meanwhile."""
    before: list[object] | None = None
    mask = block_all()
    try:
        if process.get("terminal") and os.isatty(0):
            from hv.sandbox.terminal import make_raw, size_of

            rows, columns = size_of(0)
            process["consoleSize"] = {"height": rows, "width": columns}
            before = make_raw(0)
        running = client.exec(process, 0, 1, 2)
        try:
            if pid_file:
                write_whole(pid_file, str(os.getpid()).encode())
            return attend(running, 0 if before is not None else -1)
        finally:
            running.close()
    finally:
        if before is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, before)  # type: ignore[arg-type]
        pthread_sigmask(SIG_SETMASK, mask)


def detached(client: SandboxClient, process: dict[str, Any], console_socket: str, pid_file: str) -> int:
    """Run it with a proxy that stays; the proxy's number. HvError where it could not be started."""
    console = -1
    if console_socket:
        from hv.container.plan import connect

        console = connect(console_socket, "--console-socket")
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    born: list[int] = []
    try:
        new_process(os.fork, born)
        if not born[0]:
            ours.close()
            _live(client, process, console, theirs)
        theirs.close()
        said = ours.recv(_SAID_MOST)
    finally:
        ours.close()
        theirs.close()
        if console >= 0:
            os.close(console)
    if said != b"R":
        os.waitpid(born[0], 0)
        text, _, hint = said[1:].decode(errors="replace").partition("\n")
        raise HvError(text or "the process that stands for it ended", hint)
    if pid_file:
        try:
            write_whole(pid_file, str(born[0]).encode())
        except HvError:
            os.kill(born[0], SIGKILL)
            os.waitpid(born[0], 0)
            raise
    return born[0]


def _live(client: SandboxClient, process: dict[str, Any], console: int, channel: socket) -> NoReturn:
    """The proxy. Never returns."""
    code = 255
    try:
        block_all()
        os.setsid()
        terminal = -1
        if console >= 0:
            from hv.sandbox.terminal import give_terminal

            size = process.get("consoleSize") or {}
            terminal = give_terminal(console, (int(size.get("height", 0)), int(size.get("width", 0))))
        streams = (terminal, terminal, terminal) if terminal >= 0 else (0, 1, 2)
        running = client.exec(process, *streams)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        channel.send(b"R")
        channel.close()
        keep_descriptors(running.fileno(), terminal)      # the terminal is our controlling one
        code = attend(running, terminal)
    except HvError as error:
        _say(channel, f"{error}\n{error.hint}")
    except BaseException as error:
        _say(channel, f"internal error: {type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def attend(running: ClientProcess, terminal: int) -> int:
    """Pass on signals, all of which are blocked, and the size of `terminal`, until it has ended; its exit code."""
    signals = signal_descriptor()
    waiter = poll()
    waiter.register(signals, POLLIN)
    waiter.register(running, POLLIN)
    try:
        while True:
            ready = dict(waiter.poll())
            if running.fileno() in ready:
                return running.wait()
            number = read_signal(signals)
            if number == SIGWINCH and terminal >= 0:
                from hv.sandbox.terminal import size_of

                running.resize(*size_of(terminal))
            elif number not in (*_UNPASSED, SIGWINCH):
                running.kill(number)
    finally:
        os.close(signals)


def _say(channel: socket, text: str) -> None:
    try:
        channel.send(b"E" + text.encode()[:_SAID_MOST - 1])
    except OSError:
        pass                    # it was up, or the runtime has gone
