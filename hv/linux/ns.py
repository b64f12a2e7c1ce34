"""Namespaces and processes: unshare, setns, clone, pidfds (man 7 namespaces, man 2 clone, man 2 pidfd_open).

Driven by tests/unit/test_linux_calls.py and tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["CLONE_FLAGS", "CLONE_HINT", "CLONE_INTO_CGROUP", "CLONE_NEWCGROUP", "CLONE_NEWIPC", "CLONE_NEWNET",
           "CLONE_NEWNS", "CLONE_NEWPID", "CLONE_NEWTIME", "CLONE_NEWUSER", "CLONE_NEWUTS", "clone", "clone_sibling",
           "close_from", "keep_descriptors", "loopback_up", "pidfd_open", "pidfd_send_signal", "set_domainname",
           "set_hostname", "setns", "unshare"]

import os

from hv.linux.hands import OWN
from hv.linux.syscall import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# include/uapi/linux/sched.h
CLONE_NEWTIME, CLONE_PARENT, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x8000, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
# the names of runtime-spec, config-linux.md
CLONE_FLAGS = {"user": CLONE_NEWUSER, "mount": CLONE_NEWNS, "pid": CLONE_NEWPID, "network": CLONE_NEWNET,
               "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS, "cgroup": CLONE_NEWCGROUP, "time": CLONE_NEWTIME}

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_CLONE, _SYS_SETHOSTNAME, _SYS_SETDOMAINNAME, _SYS_UNSHARE, _SYS_SETNS = 56, 170, 171, 272, 308
_SYS_PIDFD_SEND_SIGNAL, _SYS_PIDFD_OPEN, _SYS_CLOSE_RANGE = 424, 434, 436
_SYS_CLONE3, _SYS_IOCTL, _SYS_SOCKET = 435, 16, 41
_SIGCHLD = 17
CLONE_INTO_CGROUP = 0x200000000
CLONE_HINT = "namespaces may be off or used up (/proc/sys/user/max_*_namespaces)"
_CLOSE_RANGE_CLOEXEC = 4
_LAST_FD = 0xFFFFFFFF
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1      # include/uapi/linux/sockios.h, if.h
_AF_INET, _SOCK_DGRAM = 2, 2            # include/linux/socket.h, net.h


def unshare(flags: int, do: Any = syscall) -> None:
    """unshare(2): leave the namespaces of `flags` for new ones; pid and time count for children only."""
    do(f"unshare({flags:#x})", _SYS_UNSHARE, flags, hint="user namespaces may be off: `pyhv doctor` tells")


def setns(fd: Any, kind: int, do: Any = syscall) -> None:
    """setns(2): enter the namespace that `fd` stands for, which must be of `kind` (0: any)."""
    do(f"setns({kind:#x})", _SYS_SETNS, fd, kind)


def clone(flags: int, cgroup: int = -1) -> int:
    """clone(2): fork() with namespaces of its own for the new process, in which it gives 0.

    `cgroup`: a descriptor of the version 2 group that it is born in. Only for a process with a single thread: nothing
    of Python's own is told, and no lock is taken for the fork.
    """
    if cgroup >= 0:
        # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        # set_tid_size, cgroup
        words = (flags | CLONE_INTO_CGROUP, 0, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, cgroup)
        arguments = b"".join(word.to_bytes(8, "little") for word in words)
        return syscall(f"clone3({flags:#x})", _SYS_CLONE3, arguments, len(arguments), hint=CLONE_HINT)
    return syscall(f"clone({flags:#x})", _SYS_CLONE, flags | _SIGCHLD,
                   hint=CLONE_HINT)


def clone_sibling(flags: int) -> int:
    """clone(2) with CLONE_PARENT: the new process is a child of this one's parent. For single threads, as clone()."""
    return clone(flags | CLONE_PARENT)


def pidfd_open(pid: int) -> int:
    """pidfd_open(2): a descriptor that stands for process `pid`, whatever becomes of the number. Closed on exec."""
    return syscall(f"pidfd_open({pid})", _SYS_PIDFD_OPEN, pid)


def pidfd_send_signal(fd: int, signal: int) -> None:
    """pidfd_send_signal(2)."""
    syscall(f"pidfd_send_signal({signal})", _SYS_PIDFD_SEND_SIGNAL, fd, signal)


def close_from(first: int, *, now: bool = False) -> None:
    """close_range(2): every descriptor from `first` on is closed when a program is run, or now."""
    syscall("close_range", _SYS_CLOSE_RANGE, first, _LAST_FD, 0 if now else _CLOSE_RANGE_CLOEXEC)


def keep_descriptors(*fds: int) -> None:
    """Close every descriptor from 3 on but these."""
    low = 3
    for fd in sorted({fd for fd in fds if fd >= 3}):
        os.closerange(low, fd)
        low = fd + 1
    close_from(low, now=True)


def set_hostname(name: bytes, do: Any = syscall) -> None:
    """sethostname(2), of the UTS namespace."""
    do("sethostname", _SYS_SETHOSTNAME, name, len(name))


def set_domainname(name: bytes, do: Any = syscall) -> None:
    """setdomainname(2), of the UTS namespace."""
    do("setdomainname", _SYS_SETDOMAINNAME, name, len(name))


def loopback_up(hands: Any = OWN) -> None:
    """Bring `lo` of this network namespace up (man 7 netdevice)."""
    control = hands.do("socket", _SYS_SOCKET, _AF_INET, _SOCK_DGRAM | os.O_CLOEXEC, 0)      # any socket will do
    # struct ifreq: 16 bytes of name, then a short
    request = b"lo".ljust(16, b"\0") + _IFF_UP.to_bytes(2, "little") + bytes(22)
    hands.do("loopback", _SYS_IOCTL, control, _SIOCSIFFLAGS, request)
    hands.close(control)


def single_threaded() -> bool:
    """Whether this process has no thread but the caller's."""
    return len(os.listdir("/proc/self/task")) == 1


__all__ += ["single_threaded"]
