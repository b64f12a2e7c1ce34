"""Loading a seccomp filter (man 2 seccomp). Driven by tests/root/test_seccomp.py."""

from __future__ import annotations

__all__ = ["load_filter"]

import ctypes
import os
from errno import EACCES, EBUSY, EINVAL, ESRCH

from hv.errors import KernelError
from hv.linux.libc import LIBC, get_errno

_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}      # hv/container/seccomp/syscalls.txt, which is not read for this
_SET_MODE_FILTER = 1                                # include/uapi/linux/seccomp.h
FLAG_TSYNC, FLAG_NEW_LISTENER, FLAG_TSYNC_ESRCH = 1, 8, 16
_INSTRUCTION = 8                                    # struct sock_filter
_HINTS = {
    EACCES: "it takes noNewPrivileges, or CAP_SYS_ADMIN in the user namespace",
    EBUSY: "this process has a filter with a listener already, and can have one only",
    EINVAL: "this kernel does not know a flag, or an action, of the profile",
    ESRCH: "another thread can't take the filter over",
}


class _Program(ctypes.Structure):
    """struct sock_fprog, include/uapi/linux/filter.h."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def load_filter(program: bytes, flags: int = 0, listener: bool = False) -> int:
    """Put this thread (with FLAG_TSYNC: all threads) under the filter, for good.

    With `listener` the answer is the descriptor of its notifications, closed by exec; else -1.
    """
    if listener:
        flags |= FLAG_NEW_LISTENER
        if flags & FLAG_TSYNC:
            flags |= FLAG_TSYNC_ESRCH       # both want the result; this leaves it to the descriptor (since 5.7)
    head = _Program(len(program) // _INSTRUCTION, program)
    call = LIBC["syscall"]
    call.restype = ctypes.c_long
    result: int = call(_SYS_SECCOMP[os.uname().machine], _SET_MODE_FILTER, ctypes.c_ulong(flags), ctypes.byref(head))
    if result < 0 or (result > 0 and not listener):
        error = ESRCH if result > 0 else get_errno()        # a positive result is the thread that refused
        raise KernelError(f"seccomp(flags={flags:#x}, {len(program) // _INSTRUCTION} instructions)", error,
                          _HINTS.get(error, ""))
    return result if listener else -1
