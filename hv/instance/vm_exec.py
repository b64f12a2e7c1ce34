"""`pyhv exec` in a VM: our streams go along to the sandbox, signals and the terminal's size follow.

Driven by tests/kvm/test_instance_vm.py.
"""

from __future__ import annotations

__all__ = ["attend"]

import os
from _signal import SIG_SETMASK, SIGCHLD, SIGWINCH, pthread_sigmask
from select import POLLIN, poll

from hv.errors import HvError
from hv.linux.signals import block_all, read_signal, signal_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.sandbox.client import ClientProcess, SandboxClient

_NOT_PASSED_ON = (SIGCHLD, SIGWINCH, 13, 23)        # SIGPIPE, SIGURG


def attend(client: SandboxClient, process: dict[str, Any], *, interactive: bool, detach: bool) -> int:
    """Run it and be there for it; its exit code."""
    terminal = bool(process.get("terminal"))
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        if detach:
            return _detached(client, process, null)
        if terminal:
            try:
                columns, rows = os.get_terminal_size(1)
                process["consoleSize"] = {"height": rows, "width": columns}
            except OSError:
                pass
        mask = block_all()
        signals = signal_descriptor()
        before = None
        try:
            running = client.exec(process, 0 if interactive else null, 1, 2)
            try:
                if terminal and interactive and os.isatty(0):
                    from hv.linux.rawmode import set_raw

                    before = set_raw(0)
                return _wait(running, signals, terminal)
            finally:
                running.close()
        finally:
            if before is not None:
                from hv.linux.rawmode import restore

                restore(0, before)
            os.close(signals)
            pthread_sigmask(SIG_SETMASK, mask)
    finally:
        os.close(null)


def _detached(client: SandboxClient, process: dict[str, Any], null: int) -> int:
    """Whoever waits for it keeps it alive (hv/sandbox/client.py): a process of its own, in the background."""
    process["terminal"] = False
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            os.setsid()
            for fd in range(3):
                os.dup2(null, fd)
            try:
                running = client.exec(process, null, null, null)
            except HvError as error:
                os.write(writer, f"{error.exit_code} {error}".encode())
                os._exit(1)
            os.close(writer)
            running.wait()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        code, _, text = said.read(1 << 16).decode(errors="replace").partition(" ")
    if text:
        failure = HvError(text)
        failure.exit_code = int(code)
        raise failure
    return 0


def _wait(running: ClientProcess, signals: int, terminal: bool) -> int:
    waiter = poll()
    waiter.register(signals, POLLIN)
    waiter.register(running.fileno(), POLLIN)
    while True:
        ready = dict(waiter.poll())
        if running.fileno() in ready:
            return running.wait()
        signal = read_signal(signals)
        try:
            if signal == SIGWINCH and terminal:
                columns, rows = os.get_terminal_size(1)
                running.resize(rows, columns)
            elif signal not in _NOT_PASSED_ON:
                running.kill(signal)
        except (HvError, OSError):
            pass                        # it has ended, or we have no terminal
