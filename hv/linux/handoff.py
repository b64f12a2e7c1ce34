"""Leaving the last reference to a VM to the kernel, so that a process that ends does not wait for the VM's end.

Destroying a VM waits up to 13 ms for grace periods of the kernel's. Descriptors registered with an io_uring are dropped
by a kernel worker after the process has gone (io_uring/io_uring.c, io_ring_exit_work), and with them the VM. Nothing of
it outlives that worker, whatever way the process ends. Only for a process that is about to end.
"""

from __future__ import annotations

__all__ = ["leave_to_kernel"]

import ctypes

from hv.linux.libc import LIBC

SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER = 425, 427        # arch/x86/entry/syscalls/syscall_64.tbl
IORING_REGISTER_FILES = 2                                   # include/uapi/linux/io_uring.h
_PARAMS_SIZE = 120                                          # struct io_uring_params


def leave_to_kernel(descriptors: list[int]) -> bool:
    """Have the kernel hold `descriptors` until this process has ended. False where io_uring is not to be had."""
    syscall = LIBC["syscall"]
    syscall.restype = ctypes.c_long
    ring = syscall(SYS_IO_URING_SETUP, 1, ctypes.byref((ctypes.c_char * _PARAMS_SIZE)()))
    if ring < 0:
        return False
    table = (ctypes.c_int * len(descriptors))(*descriptors)
    # The ring's own descriptor stays open: it goes with the process.
    return bool(syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_FILES, ctypes.byref(table), len(descriptors)) == 0)
