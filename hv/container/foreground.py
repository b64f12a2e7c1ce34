"""A container in the foreground, or a program run in one: its terminal, signals and exit code are this process's.

Whoever loses its parent inside becomes ours (PR_SET_CHILD_SUBREAPER) and is reaped. Signals go on to the program. A
terminal is relayed byte by byte in raw mode, its size follows ours. Driven by tests/root/test_container_foreground.py.
"""

from __future__ import annotations

__all__ = ["attend", "run", "terminal_size"]

import os
from _signal import SIG_SETMASK, SIGCHLD, SIGKILL, SIGWINCH, pthread_sigmask

from hv.container.runtime import CreateOptions, Runtime
from hv.errors import HvError, KernelError
from hv.linux import creds
from hv.linux.ns import pidfd_open, pidfd_send_signal
from hv.linux.signals import block_all, read_signal, signal_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.container.relay import Relay
    from hv.container.spec import Spec

_NOT_PASSED_ON = (SIGCHLD, SIGWINCH, 23)        # 23: SIGURG, ignored unless asked for


def run(runtime: Runtime, name: str, spec: Spec, options: CreateOptions, *, subreaper: bool = True,
        keep: bool = False) -> int:
    """Create, start, wait, delete; the program's exit code, 128 + n where signal n ended it."""
    created = False
    masks: list[set[int]] = []
    # from its first moment on the program is to have the signals that we get, and none may end us
    options.on_ready = lambda: masks.append(block_all())

    def begin(console: int) -> int:
        nonlocal created
        options.console = console
        if console >= 0:
            spec.program.console_size = terminal_size() or spec.program.console_size
        record = runtime.create(name, spec.bundle, options, start=True, spec=spec)
        created = True
        return int(record.data["pid"])

    try:
        return attend(begin, terminal=spec.program.terminal and not options.console_socket, subreaper=subreaper)
    finally:
        if created and not keep:
            try:
                runtime.delete(name, force=True)
            except HvError as error:
                runtime.warn(f"{error}")
        if masks:
            pthread_sigmask(SIG_SETMASK, masks[0])


def terminal_size() -> tuple[int, int] | None:
    """Rows and columns of the terminal on our standard input: the container's is to have them from the start."""
    try:
        columns, rows = os.get_terminal_size(0)
    except OSError:
        return None
    return rows, columns


def attend(begin: Callable[[int], int], *, terminal: bool, subreaper: bool = False) -> int:
    """Begin a program and be there for it; its exit code.

    `begin` gets a socket for the terminal's descriptor, or -1, and gives the program's pid, a child of ours.
    """
    if subreaper:
        creds.prctl(creds.PR_SET_CHILD_SUBREAPER, 1)
    relay = None
    if terminal:
        from hv.container.relay import Relay

        relay = Relay()
    try:
        pid = begin(relay.sender if relay else -1)
        mask = block_all()
        try:
            if relay:
                relay.begin()
            return _wait(pid, relay)
        except BaseException:
            os.kill(pid, SIGKILL)       # not waited for yet, so it is still the one
            raise
        finally:
            if relay:
                relay.end()
            pthread_sigmask(SIG_SETMASK, mask)
    finally:
        if relay:
            relay.close()


def _wait(pid: int, relay: Relay | None) -> int:
    signals = signal_descriptor()
    try:
        program = pidfd_open(pid)
    except KernelError:
        program = -1                # it has ended
    try:
        while True:
            code = _reap(pid)
            if code is not None:
                if relay:
                    relay.drain()
                return code
            if relay and not relay.turn(signals):
                continue            # bytes went by, no signal came
            signal = read_signal(signals)
            if signal == SIGWINCH and relay:
                relay.resize()
            elif signal not in _NOT_PASSED_ON and program >= 0:
                try:
                    pidfd_send_signal(program, signal)
                except KernelError:
                    pass            # it has ended
    finally:
        for fd in (signals, program):
            if fd >= 0:
                os.close(fd)


def _reap(pid: int) -> int | None:
    """Collect ended children; the exit code once `pid` is among them."""
    found = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 255 if found is None else found
        if not ended:
            return found
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code
