"""The last program half of whose steps a new process does: for `exec`, and with a parent that reaps for `--init`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from hv.container import stub

# arch/x86/entry/syscalls/syscall_64.tbl
DUP, DUP2, SIGPROCMASK, CLONE, EXECVE = 32, 33, 14, 56, 59
SIGCHLD, CLONE_SIGHAND, CLONE_PARENT = 17, 0x800, 0x8000

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    ours.settimeout(10)
    yield ours, theirs
    ours.close()
    theirs.close()


def begin(steps: stub.Steps) -> int:
    """A child that becomes the program; its pid."""
    pid = os.fork()
    if not pid:
        try:
            stub.become(steps)
        finally:
            os._exit(99)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_reply_may_move(pair: Pair) -> None:
    ours, theirs = pair
    with open(os.devnull, "wb") as nothing:
        os.set_inheritable(nothing.fileno(), True)
        steps = stub.Steps(nothing.fileno())
        steps.add(stub.WAIT, DUP, theirs.fileno(), result=stub.REPLY)
        steps.add(stub.FILTER, -1)
        assert code_of(begin(steps)) == 1
    assert stub.explain(ours.recv(100), "") == "linux.seccomp: Function not implemented"


def test_a_process_that_is_made_is_told_by_its_number(pair: Pair) -> None:
    ours, theirs = pair
    steps = stub.Steps(theirs.fileno())
    steps.add(stub.FORK, CLONE, CLONE_PARENT | SIGCHLD, result=stub.LEAVE)
    steps.add(stub.EXEC, EXECVE, b"/bin/sh", [b"sh", b"-c", b"exit 9"], [])
    helper = begin(steps)
    pid = stub.left_behind(ours.recv(100))
    assert pid not in (0, helper)
    assert code_of(pid) == 9                    # a child of ours
    os.waitpid(helper, 0)
    assert stub.left_behind(stub.tell_process(1234)) == 1234


def test_a_clone_that_fails_is_no_process(pair: Pair) -> None:
    """Its error number must not be taken for a pid, which would then be killed."""
    ours, theirs = pair
    steps = stub.Steps(theirs.fileno())
    steps.add(stub.FORK, CLONE, CLONE_SIGHAND, result=stub.LEAVE)           # without CLONE_VM: EINVAL
    assert code_of(begin(steps)) == 1
    report = ours.recv(100)
    assert stub.left_behind(report) == 0 and stub.explain(report, "") == "clone: Invalid argument"


def with_reaper(pair: Pair, script: bytes) -> int:
    """A shell whose standard output is the pair, below a reaper."""
    theirs = pair[1]
    steps = stub.Steps(theirs.fileno())
    steps.add(stub.KEEP, DUP2, theirs.fileno(), 1)
    steps.add(stub.FORK, SIGPROCMASK, 2, b"\xff" * 8, 0, 8)
    steps.add(stub.FORK, CLONE, SIGCHLD, result=stub.REAP)
    steps.add(stub.FORK, SIGPROCMASK, 2, bytes(8), 0, 8)
    steps.add(stub.EXEC, EXECVE, b"/bin/sh", [b"sh", b"-c", script], [b"PATH=/bin:/usr/bin"])
    return begin(steps)


@pytest.mark.parametrize("script, code", [(b"exit 0", 0), (b"exit 200", 200), (b"kill -9 $$", 137),
                                          (b"kill -TERM $$", 143)])
def test_the_reaper_ends_as_the_program_does(pair: Pair, script: bytes, code: int) -> None:
    assert code_of(with_reaper(pair, script)) == code


def test_the_reaper_passes_signals_on_and_has_nothing_else_open(pair: Pair) -> None:
    ours, theirs = pair
    pid = with_reaper(pair, b"trap 'echo usr1' USR1; trap 'exit 5' TERM; echo ready; while :; do sleep 0.02; done")
    theirs.close()
    assert ours.recv(100) == b"ready\n"
    end = time.monotonic() + 5
    while len(os.listdir(f"/proc/{pid}/fd")) > 3 and time.monotonic() < end:
        time.sleep(0.001)               # the program may be faster than its parent, which closes the rest
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    os.kill(pid, 10)
    assert ours.recv(100) == b"usr1\n"
    os.kill(pid, 15)
    assert code_of(pid) == 5
    assert ours.recv(100) == b""




def test_what_cannot_be_run_below_the_reaper_is_told(pair: Pair) -> None:
    ours, theirs = pair
    steps = stub.Steps(theirs.fileno())
    steps.add(stub.FORK, SIGPROCMASK, 2, b"\xff" * 8, 0, 8)
    steps.add(stub.FORK, CLONE, SIGCHLD, result=stub.REAP)
    steps.add(stub.EXEC, EXECVE, b"/absent", [b"x"], [])
    assert code_of(begin(steps)) == 1
    assert stub.explain(ours.recv(100), "x") == 'exec: "x": no such file or directory'
