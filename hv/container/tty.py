"""The container's terminal: a pty made inside, its master given away over a socket (runc, docs/terminals.md).

Driven by tests/root/test_container_tty.py.
"""

from __future__ import annotations

__all__ = ["open_console"]

import os
import termios
from fcntl import ioctl
from socket import send_fds, socket
from struct import pack

from hv.errors import HvError


def open_console(size: tuple[int, int] | None, receiver: int, owner: tuple[int, int]) -> None:
    """Make a pty in the container's devpts, send its master to the socket `receiver`, make it the standard streams."""
    try:
        master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise HvError(f"process.terminal: /dev/ptmx: {os.strerror(error.errno or 0)}",
                      "the container needs a devpts mount at /dev/pts") from None
    ioctl(master, termios.TIOCSPTLCK, pack("i", 0))
    name = "/dev/pts/%d" % int.from_bytes(ioctl(master, termios.TIOCGPTN, bytes(4)), "little")
    if size:
        ioctl(master, termios.TIOCSWINSZ, pack("HHHH", *size, 0, 0))
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.fchown(slave, *owner)
    sender = socket(fileno=receiver)
    try:
        send_fds(sender, [b"/dev/ptmx"], [master])
    except OSError as error:
        raise HvError(f"--console-socket: {os.strerror(error.errno or 0)}", "somebody must listen there") from None
    sender.close()
    os.close(master)
    ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in range(3):
        os.dup2(slave, fd)
    os.close(slave)
