"""The one door to libc: every foreign function pyhv calls is bound here.

`ioctl` and `ioctl_ptr` are two bindings of the same C function (man 2 ioctl): one passes an integer,
one a pointer. Both raise KernelError through `check`. `raw_ioctl` and `run_ioctl` do not: KVM_RUN ends with
EINTR whenever a vCPU is kicked, so its caller looks at errno itself. It is not fcntl.ioctl because
CPython retries that on EINTR (Modules/fcntlmodule.c, 3.12 and newer). `ioctl` and `ioctl_ptr` do so, too: no signal is
needed for it, work that the kernel left for this thread interrupts as well (KVM_CREATE_VM, right behind hv/linux/
handoff.py).
"""

from __future__ import annotations

__all__ = ["LIBC", "check", "get_errno", "ioctl", "ioctl_bytes", "ioctl_ptr", "raw_ioctl", "run_ioctl"]

import ctypes

from hv.errors import KernelError

LIBC = ctypes.CDLL(None, use_errno=True)
_EINTR = 4              # asm-generic/errno-base.h

get_errno = ctypes.get_errno

# Indexing makes a fresh function object each time, so the two can have different argument types.
raw_ioctl = LIBC["ioctl"]
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
raw_ioctl.restype = ctypes.c_int
# For KVM_RUN: small integers need no declared types, and converting to them costs 0.6 us a call.
run_ioctl = LIBC["ioctl"]
_ioctl_ptr = LIBC["ioctl"]
_ioctl_ptr.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl_ptr.restype = ctypes.c_int


def check(result: int, call: str, hint: str = "") -> int:
    """Return `result`, or raise KernelError with errno when it is negative."""
    if result < 0:
        raise KernelError(call, ctypes.get_errno(), hint)
    return result


def ioctl(fd: int, request: int, value: int, name: str, hint: str = "") -> int:
    """ioctl with an integer argument; `name` stands in the error."""
    result: int = raw_ioctl(fd, request, value)
    while result < 0 and ctypes.get_errno() == _EINTR:
        result = raw_ioctl(fd, request, value)
    return result if result >= 0 else check(result, name, hint)


def ioctl_ptr(fd: int, request: int, argument: object, name: str, hint: str = "") -> int:
    """ioctl with a pointer argument: a ctypes object passed by reference."""
    result: int = _ioctl_ptr(fd, request, ctypes.byref(argument))  # type: ignore[arg-type]
    while result < 0 and ctypes.get_errno() == _EINTR:
        result = _ioctl_ptr(fd, request, ctypes.byref(argument))  # type: ignore[arg-type]
    return result if result >= 0 else check(result, name, hint)


def ioctl_bytes(fd: int, request: int, argument: bytes, name: str, hint: str = "") -> int:
    """ioctl that only reads what its pointer points to."""
    result: int = _ioctl_ptr(fd, request, argument)
    while result < 0 and ctypes.get_errno() == _EINTR:
        result = _ioctl_ptr(fd, request, argument)
    return result if result >= 0 else check(result, name, hint)
