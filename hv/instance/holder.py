"""Who holds a container: its streams' outer ends, its mounts, and the right to learn how it ended.

What makes a container (launch.py) is a fork of Python. Once the program runs it becomes this: some hundred bytes of
code that do a list of system calls (hv/container/stub.py) and nothing else, in 30 kB of memory. It waits for the
container's first process, whose parent it is, writes down how that ended, and ends too. Its mount namespace is the one
place where the container's root is mounted, so mounts go with it. Having written down how it ended, it waits for
SIGTERM: what the program wrote last is in the pipes, which must stay open until somebody has read them.

    descriptors   0 standard input's outer end, 1 output's (or the terminal's), 2 error's, 3 the file RUN/ID/status,
                  4 and 5 a pipe, whose writing end (5) is closed once the status is written
    status        siginfo_t as waitid(2) gives it (man 2 sigaction), 128 bytes

The keeper takes copies of these descriptors (pidfd_getfd(2)). Killed, it loses nothing: the holder has them still, so
the program meets no SIGPIPE, and the next keeper takes them again. Driven by tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["CODE_EXITED", "END", "ENDING", "STATUS", "hold", "pack_status", "prepare", "read_status"]

import os

from hv.container.stub import KEEP, Steps, image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_WRITE, _SYS_CLOSE, _SYS_MMAP, _SYS_RT_SIGTIMEDWAIT, _SYS_EXIT_GROUP, _SYS_WAITID = 1, 3, 9, 128, 231, 247
_SYS_CLOSE_RANGE = 436
_PROT_RW, _MAP_PRIVATE_FIXED_ANONYMOUS = 1 | 2, 0x2 | 0x10 | 0x20      # asm-generic/mman-common.h
_ROOM, _ROOM_SIZE = 0x10000000, 4096    # where siginfo_t goes
_P_PID, _WEXITED = 1, 4                 # include/uapi/linux/wait.h
_STATUS_SIZE = 128                      # sizeof(siginfo_t)
STATUS, END, ENDING = 3, 4, 5           # descriptors: the status file; the pipe that ends with the program
_ONLY_SIGTERM = (1 << 14).to_bytes(8, "little")
CODE_EXITED, _CODE_KILLED, _CODE_DUMPED = 1, 2, 3       # CLD_*, include/uapi/asm-generic/siginfo.h


def hold(pid: int, name: str) -> NoReturn:
    """Become the holder of child `pid`. `name`: how the process is listed. Returns only by OSError."""
    steps = Steps(STATUS)
    steps.add(KEEP, _SYS_CLOSE_RANGE, ENDING + 1, 0xFFFFFFFF, 0)
    steps.add(KEEP, _SYS_MMAP, _ROOM, _ROOM_SIZE, _PROT_RW, _MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0)
    steps.add(KEEP, _SYS_WAITID, _P_PID, pid, _ROOM, _WEXITED, 0)
    steps.add(KEEP, _SYS_WRITE, STATUS, _ROOM, _STATUS_SIZE)
    steps.add(KEEP, _SYS_CLOSE, ENDING)
    steps.add(KEEP, _SYS_RT_SIGTIMEDWAIT, _ONLY_SIGTERM, 0, 0, 8)      # all signals are blocked: none is missed
    steps.add(KEEP, _SYS_EXIT_GROUP, 0)
    for fd in (STATUS, END, ENDING):
        os.set_inheritable(fd, True)
    os.execve(image(steps), [name.encode()], {})
    raise AssertionError


def prepare(folder: str) -> None:
    """Open what a holder has as descriptors 3 to 5, which are free."""
    status = os.open(f"{folder}/status", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    fds = [status, *os.pipe2(os.O_CLOEXEC)]
    if fds != [STATUS, END, ENDING]:
        raise OSError(9, os.strerror(9))        # EBADF: they were not


def pack_status(code: int) -> bytes:
    """The same file's content for a program that has ended with exit code `code`."""
    words = (0, 0, CODE_EXITED, 0, 0, 0, code)
    return b"".join(word.to_bytes(4, "little") for word in words).ljust(_STATUS_SIZE, b"\0")


def read_status(path: str) -> int | None:
    """The exit code, 128 + n by signal n; None where nobody has written it."""
    try:
        with open(path, "rb", 0) as file:
            data = file.read(_STATUS_SIZE)
    except OSError:
        return None
    if len(data) < _STATUS_SIZE:
        return None
    # siginfo_t: si_signo, si_errno, si_code, padding; si_pid, si_uid, si_status
    how, status = (int.from_bytes(data[at:at + 4], "little") for at in (8, 24))
    if how == CODE_EXITED:
        return status & 0xFF
    return 128 + (status & 0x7F) if how in (_CODE_KILLED, _CODE_DUMPED) else None
