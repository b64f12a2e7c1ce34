"""Namespaces and processes: unshare, setns, clone, pidfds (man 7 namespaces, man 2 clone, man 2 pidfd_open)."""

from __future__ import annotations

__all__ = ["CLONE_FLAGS", "CLONE_NEWCGROUP", "CLONE_NEWIPC", "CLONE_NEWNET", "CLONE_NEWNS", "CLONE_NEWPID",
           "CLONE_NEWTIME", "CLONE_NEWUSER", "CLONE_NEWUTS", "clone_sibling", "close_from", "pidfd_open",
           "pidfd_send_signal", "set_hostname", "set_domainname", "setns", "unshare"]

import ctypes
import os

from hv.linux.libc import LIBC, check

# include/uapi/linux/sched.h
CLONE_NEWTIME, CLONE_PARENT, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x8000, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
# the names of runtime-spec, config-linux.md
CLONE_FLAGS = {"user": CLONE_NEWUSER, "mount": CLONE_NEWNS, "pid": CLONE_NEWPID, "network": CLONE_NEWNET,
               "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS, "cgroup": CLONE_NEWCGROUP, "time": CLONE_NEWTIME}

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_CLONE, _SYS_PIDFD_SEND_SIGNAL, _SYS_PIDFD_OPEN, _SYS_CLOSE_RANGE = 56, 424, 434, 436
_CLOSE_RANGE_CLOEXEC = 4

_syscall = LIBC["syscall"]
_syscall.restype = ctypes.c_long


def unshare(flags: int) -> None:
    """unshare(2): leave the namespaces of `flags` for new ones; pid and time count for children only."""
    check(LIBC.unshare(flags), f"unshare({flags:#x})", "user namespaces may be off: `pyhv doctor` tells")


def setns(fd: int, kind: int) -> None:
    """setns(2): enter the namespace that `fd` stands for, which must be of `kind` (0: any)."""
    check(LIBC.setns(fd, kind), f"setns({kind:#x})")


def clone_sibling(flags: int) -> int:
    """clone(2) with CLONE_PARENT: like fork(), but the new process is a child of this one's parent.

    0 in the new process. Only for a process with a single thread: nothing of Python's own is told.
    """
    pid: int = _syscall(_SYS_CLONE, flags | CLONE_PARENT | 17, None, None, None, None)      # 17: SIGCHLD
    return check(pid, f"clone({flags:#x})")


def pidfd_open(pid: int) -> int:
    """pidfd_open(2): a descriptor that stands for process `pid`, whatever becomes of the number."""
    fd: int = check(_syscall(_SYS_PIDFD_OPEN, pid, 0), f"pidfd_open({pid})")
    os.set_inheritable(fd, False)
    return fd


def pidfd_send_signal(fd: int, signal: int) -> None:
    """pidfd_send_signal(2)."""
    check(_syscall(_SYS_PIDFD_SEND_SIGNAL, fd, signal, None, 0), f"pidfd_send_signal({signal})")


def close_from(first: int) -> None:
    """close_range(2): every descriptor from `first` on is closed when a program is run."""
    check(_syscall(_SYS_CLOSE_RANGE, first, ctypes.c_uint(0xFFFFFFFF), _CLOSE_RANGE_CLOEXEC), "close_range")


def set_hostname(name: bytes) -> None:
    """sethostname(2), of the UTS namespace."""
    check(LIBC.sethostname(name, ctypes.c_size_t(len(name))), "sethostname")


def set_domainname(name: bytes) -> None:
    """setdomainname(2), of the UTS namespace."""
    check(LIBC.setdomainname(name, ctypes.c_size_t(len(name))), "setdomainname")
