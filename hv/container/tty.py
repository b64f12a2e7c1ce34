"""The container's terminal: a pty of the container's own devpts, its master given away over a socket.

The receiver gets the descriptor with the text /dev/ptmx (runc, docs/terminals.md). Everything is opened below the root
and looked at, for the image may have prepared any of the names (CVE-2025-52565).

Driven by tests/root/test_container_tty.py.
"""

from __future__ import annotations

__all__ = ["bind_console", "open_console", "take_terminal"]

import os
import termios
from _socket import SCM_RIGHTS, SOL_SOCKET, socket
from fcntl import ioctl

from hv.errors import HvError, KernelError
from hv.linux.mount import clone_tree, filesystem_kind, move, open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.linux.hands import Hands

_DEVPTS = 0x1CD1                # include/uapi/linux/magic.h
_TIOCGPTPEER, _TIOCSPTLCK = 0x5441, 0x40045431      # include/uapi/asm-generic/ioctls.h


def open_console(root: int, receiver: int, size: tuple[int, ...] | None, owner: int) -> int:
    """Make a pty in the devpts below `root`, send its master to the socket `receiver`; the slave, `owner`'s."""
    hint = "the container needs a devpts mount at /dev/pts"
    try:
        master = open_in(root, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    except KernelError as error:
        raise HvError(f"process.terminal: /dev/pts/ptmx: {os.strerror(error.errno)}", hint) from None
    if filesystem_kind(master) != _DEVPTS:
        raise HvError("process.terminal: /dev/pts is no devpts", hint)
    ioctl(master, _TIOCSPTLCK, bytes(4))
    slave = ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if size is not None and any(size):
        termios.tcsetwinsize(slave, size)  # type: ignore[arg-type]
    try:
        os.fchown(slave, owner, -1)
    except OSError:
        pass                    # an id without a mapping: the pty stays root's
    sender = socket(fileno=receiver)
    try:
        sender.sendmsg([b"/dev/ptmx"], [(SOL_SOCKET, SCM_RIGHTS, master.to_bytes(4, "little"))])
    except OSError as error:
        raise HvError(f"--console-socket: {os.strerror(error.errno or 0)}", "somebody must listen there") from None
    finally:
        sender.close()
        os.close(master)
    return slave


def bind_console(hands: Hands, root: Any, slave: int) -> None:
    """/dev/console is that terminal too."""
    from hv.container.mounts import target_in

    target = target_in(hands, root, "/dev/console", False)
    fd = clone_tree(slave, "", False, hands.do)
    move(fd, target, hands.do)
    hands.close(fd)
    hands.close(target)


def take_terminal(slave: int) -> None:
    """Make it the standard streams and the controlling terminal of this session."""
    ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in range(3):
        os.dup2(slave, fd)
    if slave > 2:
        os.close(slave)

