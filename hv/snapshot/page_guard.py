"""A process that waits for the end of a memory handler, and ends the VM's process where that can't do it itself.

Once the handler has gone, whoever touches a page that was not filled in waits for good. The VM's loop hears of the end
and stops the machine; but where a thread waits that holds Python's lock, or one in the midst of a system call, the
whole process stands still. Letting it go on with zeros in place of the guest's memory could write those to its disks,
so it is killed: a moment after the handler has gone, or later where the VM says that it is at it.
Driven by tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["fork_guard", "guard"]

import os
from fcntl import F_DUPFD, fcntl
from select import POLLHUP, POLLIN, POLLRDHUP, poll
from time import monotonic

from hv.linux.ns import close_from, pidfd_open, pidfd_send_signal

NOTICED = b"n"                      # the VM's side has seen the end and stops the machine
SOON, LATER = 3000.0, 20000.0       # ms until force
_SIGKILL = 9
_HIGH = 64                          # a descriptor above all that the process has
_LINE = (b"pyhv: the memory handler has ended%s and the VM waits for a page of it: killed, since it can't end "
         b"otherwise\n")


def fork_guard(alive: int, process: int) -> int:
    """A guard of this process, the handler. The answer is where it writes what failed, if it comes to say that."""
    watched = pidfd_open(os.getpid())
    ours, why = os.pipe2(os.O_CLOEXEC)
    if not os.fork():
        guard(alive, process, watched, ours)
    for fd in (watched, alive, ours):
        os.close(fd)
    return why


def guard(alive: int, process: int, watched: int, why: int = -1) -> None:
    """Wait for the end of the VM (`alive` hangs up), of its `process`, or of the handler; does not return."""
    try:
        fds = [fcntl(fd, F_DUPFD, _HIGH) for fd in (alive, process, watched, why) if fd >= 0]
        for index, fd in enumerate(fds):
            os.dup2(fd, 3 + index)
        close_from(3 + len(fds), now=True)
        _wait(3, 4, 5, 6 if why >= 0 else -1)
    finally:
        os._exit(0)


def _wait(alive: int, process: int, watched: int, why: int) -> None:
    waits = poll()
    waits.register(alive, POLLIN)
    waits.register(process, POLLIN)
    waits.register(watched, POLLIN | POLLRDHUP if _is_socket(watched) else POLLIN)
    end = None
    while True:
        left = None if end is None else end - monotonic() * 1e3
        ready = dict(waits.poll(left)) if left is None or left > 0 else {}
        if process in ready:
            if not _is_socket(watched):
                pidfd_send_signal(watched, _SIGKILL)    # it would end by itself, unless somebody has stopped it
            return
        if alive in ready:
            if os.read(alive, 1) != NOTICED:
                waits.unregister(alive)     # the machine's end, or the process's, whose descriptors go first
                if process in dict(waits.poll(LATER)) and not _is_socket(watched):
                    pidfd_send_signal(watched, _SIGKILL)
                return
            end = monotonic() * 1e3 + LATER
        elif watched in ready:
            if ready[watched] & (POLLHUP | POLLRDHUP) or not _is_socket(watched):
                waits.unregister(watched)
                end = monotonic() * 1e3 + SOON if end is None else end
            else:
                waits.modify(watched, POLLRDHUP)        # it speaks: that is for the VM
        elif end is not None and monotonic() * 1e3 >= end:
            text = os.read(why, 4096) if why >= 0 else b""
            os.write(2, _LINE % (b" (%s)" % ascii(text.decode("utf-8", "replace"))[1:-1].encode() if text else b""))
            pidfd_send_signal(process, _SIGKILL)
            return


def _is_socket(fd: int) -> bool:
    from stat import S_ISSOCK

    return S_ISSOCK(os.fstat(fd).st_mode)
