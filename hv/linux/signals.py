"""Signals as something to read (man 2 signalfd): no handler, no moment that comes at a bad time.

Driven by tests/root/test_container_foreground.py.
"""

from __future__ import annotations

__all__ = ["block_all", "read_signal", "signal_descriptor"]

import os
from _signal import SIG_BLOCK, pthread_sigmask, valid_signals

from hv.linux.syscall import syscall

_SYS_SIGNALFD4 = 289            # arch/x86/entry/syscalls/syscall_64.tbl
_INFO_SIZE = 128                # struct signalfd_siginfo; its first word is the signal
_EVERY = 0xFFFFFFFFFFFFFFFF
# signals of faults, which can't be deferred, and two of the C library's own
_LEFT_OUT = frozenset((4, 5, 7, 8, 11, 31, 32, 33))


def block_all() -> set[int]:
    """Block every signal that can be read; the mask that was in force."""
    return set(pthread_sigmask(SIG_BLOCK, valid_signals() - _LEFT_OUT))


def signal_descriptor() -> int:
    """A descriptor from which the blocked signals of this process are read."""
    mask = _EVERY
    for number in _LEFT_OUT:
        mask &= ~(1 << number - 1)
    return syscall("signalfd", _SYS_SIGNALFD4, -1, mask.to_bytes(8, "little"), 8, os.O_CLOEXEC)


def read_signal(fd: int) -> int:
    """Wait for the next signal; its number."""
    return int.from_bytes(os.read(fd, _INFO_SIZE)[:4], "little")
