"""Loading a seccomp filter (man 2 seccomp). Driven by tests/root/test_seccomp.py."""

from __future__ import annotations

__all__ = ["load_filter"]

from _ctypes import addressof
from _struct import pack
from errno import EACCES, EBUSY, EINVAL, ESRCH

from hv.errors import KernelError
from hv.linux.syscall import buffer, try_syscall

_SYS_SECCOMP = 317                                  # arch/x86/entry/syscalls/syscall_64.tbl
_SET_MODE_FILTER = 1                                # include/uapi/linux/seccomp.h
FLAG_TSYNC, FLAG_NEW_LISTENER, FLAG_TSYNC_ESRCH = 1, 8, 16
_INSTRUCTION = 8                                    # struct sock_filter
_HINTS = {
    EACCES: "it takes noNewPrivileges, or CAP_SYS_ADMIN in the user namespace",
    EBUSY: "this process has a filter with a listener already, and can have one only",
    EINVAL: "this kernel does not know a flag, or an action, of the profile",
    ESRCH: "another thread can't take the filter over",
}


def load_filter(program: bytes, flags: int = 0, listener: bool = False) -> int:
    """Put this thread (with FLAG_TSYNC: all threads) under the filter, for good.

    With `listener` the answer is the descriptor of its notifications, closed by exec; else -1.
    """
    if listener:
        flags |= FLAG_NEW_LISTENER
        if flags & FLAG_TSYNC:
            flags |= FLAG_TSYNC_ESRCH       # both want the result; this leaves it to the descriptor (since 5.7)
    code = buffer(len(program), program)
    count = len(program) // _INSTRUCTION
    # struct sock_fprog, include/uapi/linux/filter.h
    result = try_syscall(_SYS_SECCOMP, _SET_MODE_FILTER, flags, pack("HxxxxxxQ", count, addressof(code)))
    if result < 0 or (result > 0 and not listener):
        error = ESRCH if result > 0 else -result            # a positive result is the thread that refused
        raise KernelError(f"seccomp(flags={flags:#x}, {count} instructions)", error, _HINTS.get(error, ""))
    return result if listener else -1
