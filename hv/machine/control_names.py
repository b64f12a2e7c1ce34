"""Names of VMs, and sockets that killed processes have left under them.

Driven by tests/unit/test_control.py.
"""

from __future__ import annotations

__all__ = ["check_name", "is_alive", "remove_dead"]

import os
import stat
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket
from errno import ECONNREFUSED, ENOENT
from fcntl import LOCK_EX, flock

from hv.errors import ConfigError

_NAME_MOST = 64
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def check_name(name: str) -> str:
    """`name`, or ConfigError where a VM can't have it."""
    if not name or len(name) > _NAME_MOST or not _NAME_CHARACTERS.issuperset(name) or name[0] in ".-":
        raise ConfigError(f"VM name {name!r:.80}", f"up to {_NAME_MOST} letters, digits and . _ -, the first a letter, "
                          "digit or _")
    return name


def is_alive(path: str) -> bool:
    """Whether somebody listens at `path`, or it is no socket that could be asked."""
    probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
    try:
        probe.connect(path)
    except OSError as error:
        # EAGAIN: its clients stand in line. Others: not for us to judge.
        return error.errno not in (ECONNREFUSED, ENOENT)
    finally:
        probe.close()
    return True


def remove_dead(path: str) -> bool:
    """Remove the socket that a killed process has left at `path`; False where it is not one."""
    try:
        lock = os.open(path.rpartition("/")[0] or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        flock(lock, LOCK_EX)        # nobody else removes meanwhile, and a name that is taken is not replaced
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode) or is_alive(path):
                return False
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True
    finally:
        os.close(lock)
