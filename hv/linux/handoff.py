"""Leaving the last reference to a VM to the kernel, so that nobody waits for the VM's end.

Destroying a VM waits up to 13 ms for grace periods of the kernel's. Descriptors registered with an io_uring are dropped
by a kernel worker after the ring has been closed (io_uring/io_uring.c, io_ring_exit_work), and with them the VM.
Nothing of it outlives that worker, whatever way the process ends.
"""

from __future__ import annotations

__all__ = ["leave_to_kernel"]

import ctypes
import os

from hv.linux.libc import LIBC

SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER = 425, 427        # arch/x86/entry/syscalls/syscall_64.tbl
IORING_REGISTER_FILES = 2                                   # include/uapi/linux/io_uring.h
_PARAMS_SIZE = 120                                          # struct io_uring_params


def leave_to_kernel(descriptors: list[int]) -> int:
    """Have the kernel hold `descriptors` as long as the answer, a descriptor, is open: for good, or until their end.

    -1 where io_uring is not to be had.
    """
    syscall = LIBC["syscall"]
    syscall.restype = ctypes.c_long
    ring = syscall(SYS_IO_URING_SETUP, 1, ctypes.byref((ctypes.c_char * _PARAMS_SIZE)()))
    if ring < 0:
        return -1
    table = (ctypes.c_int * len(descriptors))(*descriptors)
    if syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_FILES, ctypes.byref(table), len(descriptors)) < 0:
        os.close(ring)
        return -1
    return int(ring)
