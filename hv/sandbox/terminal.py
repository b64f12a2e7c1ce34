"""A pty of the host for a program of the guest: the engine has the master, the VM's process the slave, in raw mode.

The guest's own pty does what a terminal does; this one only carries bytes and the size. It is the controlling terminal
of the process that calls, so that a change of its size is told by SIGWINCH, and its end by SIGHUP. Driven by
tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["give_terminal", "make_raw", "size_of"]

import os
import termios
from _socket import SCM_RIGHTS, SOL_SOCKET, socket
from fcntl import ioctl

from hv.errors import HvError


def give_terminal(receiver: int, size: tuple[int, ...] | None) -> int:
    """Make a pty, send its master to the socket `receiver`, which is closed; the slave. A session's leader calls."""
    master, slave = os.openpty()
    sender = socket(fileno=receiver)
    try:
        make_raw(slave)
        if size is not None and any(size):
            termios.tcsetwinsize(slave, (size[0], size[1]))
        ioctl(slave, termios.TIOCSCTTY, 0)
        sender.sendmsg([b"/dev/ptmx"], [(SOL_SOCKET, SCM_RIGHTS, master.to_bytes(4, "little"))])
    except OSError as error:
        os.close(slave)
        raise HvError(f"--console-socket: {os.strerror(error.errno or 0)}", "somebody must listen there") from None
    finally:
        os.close(master)
        sender.close()
    return slave


def make_raw(fd: int) -> list[object]:
    """Raw mode (man 3 termios, cfmakeraw); what the mode was."""
    before = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
                | termios.ICRNL | termios.IXON)
    raw[1] &= ~termios.OPOST
    raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(fd, termios.TCSANOW, raw)
    return before


def size_of(fd: int) -> tuple[int, int]:
    """Rows and columns; (0, 0) where it can't be told."""
    try:
        rows, columns = termios.tcgetwinsize(fd)
    except (OSError, termios.error):
        return 0, 0
    return rows, columns
