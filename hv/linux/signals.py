"""Signals at no bad time: as something to read (man 2 signalfd), or held back while something is made.

A handler's exception may come between any two steps of the interpreter, so also between the birth of a process, or of
a folder, and the statement that remembers it: then nobody would end or remove it.

Driven by tests/root/test_container_foreground.py and tests/root/test_container_killed.py.
"""

from __future__ import annotations

__all__ = ["Held", "block_all", "new_process", "read_signal", "signal_descriptor"]

import os
from _signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals
from itertools import starmap

from hv.linux.syscall import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SYS_SIGNALFD4 = 289            # arch/x86/entry/syscalls/syscall_64.tbl
_INFO_SIZE = 128                # struct signalfd_siginfo; its first word is the signal
_EVERY = 0xFFFFFFFFFFFFFFFF
# signals of faults, which can't be deferred, and two of the C library's own
_LEFT_OUT = frozenset((4, 5, 7, 8, 11, 31, 32, 33))


def block_all() -> set[int]:
    """Block every signal that can be read; the mask that was in force."""
    return set(pthread_sigmask(SIG_BLOCK, valid_signals() - _LEFT_OUT))


class Held:
    """`with Held():` what comes meanwhile is acted on at the end."""

    def __enter__(self) -> None:
        self._mask = block_all()

    def __exit__(self, *exc: object) -> None:
        pthread_sigmask(SIG_SETMASK, self._mask)


def new_process(make: Callable[[], int], numbers: list[int]) -> None:
    """Append the number that `make` gives, before any signal's exception. In the new process (0) all stay held back:
    it must not act as its parent does."""
    mask = block_all()
    try:
        # in C: where another thread has got the signal, its exception comes as soon as Python goes on
        numbers.extend(starmap(make, ((),)))
    finally:
        if numbers[-1:] != [0]:
            pthread_sigmask(SIG_SETMASK, mask)


def signal_descriptor() -> int:
    """A descriptor from which the blocked signals of this process are read."""
    mask = _EVERY
    for number in _LEFT_OUT:
        mask &= ~(1 << number - 1)
    return syscall("signalfd", _SYS_SIGNALFD4, -1, mask.to_bytes(8, "little"), 8, os.O_CLOEXEC)


def read_signal(fd: int) -> int:
    """Wait for the next signal; its number."""
    return int.from_bytes(os.read(fd, _INFO_SIZE)[:4], "little")
