"""System calls made by another process: their results, their errors, its end. And the same by this one."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hv.container import far
from hv.errors import HvError, KernelError
from hv.linux.hands import ANY, AT_FDCWD, Hands, Own, plain
from hv.linux.syscall import buffer

# arch/x86/entry/syscalls/syscall_64.tbl
READ, WRITE, GETPID, GETPPID, EXIT_GROUP, PRCTL, EXECVE, RT_SIGPROCMASK = 0, 1, 39, 110, 231, 157, 59, 14
PR_GET_DUMPABLE = 3


class Made:
    """A process to which lists can be given."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.settimeout(20)
        self.inside, self.memory, self.pid = theirs.detach(), os.memfd_create("lists"), 0
        self.hands = far.Far(self.ours, self.inside, self.memory, self.begin)

    def begin(self) -> None:
        self.pid = far.Program(self.inside, self.memory).launch(0, -1, [], buffer(4))
        os.close(self.inside)

    def end(self) -> int:
        """Its exit code, 0 the second time."""
        self.ours.close()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else 0


@pytest.fixture
def made() -> Iterator[Made]:
    made = Made()
    yield made
    made.end()


@pytest.fixture(params=["own", "far"])
def hands(request: pytest.FixtureRequest) -> Iterator[Hands]:
    if request.param == "own":
        yield Own()
    else:
        made = Made()
        yield made.hands
        made.end()


def test_results_are_arguments(hands: Hands, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some text")
    folder = hands.open(str(tmp_path), os.O_PATH)
    file = hands.open("file", os.O_RDONLY, folder)
    room = hands.room(64)
    length = hands.do("read", READ, file, room, 64)
    status, kind = hands.stat(file), hands.kind(folder)
    assert hands.read(room, hands.value(length)) == b"some text"
    assert stat.S_ISREG(status.mode) and not status.is_dir and not status.error and kind() > 0
    assert status.identity == ((tmp_path / "file").stat().st_dev, (tmp_path / "file").stat().st_ino)
    hands.mkdir(folder, "made", 0o700)
    hands.symlink("elsewhere", folder, "link")
    assert hands.link(folder, "link")() == b"elsewhere"
    hands.put(str(tmp_path / "file"), "other")
    assert hands.start_of(str(tmp_path / "file"))() == b"othertext"
    assert (tmp_path / "made").is_dir()


def test_errors(hands: Hands, tmp_path: Path) -> None:
    missing = hands.open(str(tmp_path / "none"), os.O_RDONLY, may=(errno.ENOENT,))
    assert hands.value(missing) == -errno.ENOENT
    assert hands.start_of(str(tmp_path / "none"))() == b""
    assert hands.stat(missing).error == errno.EBADF
    hands.close(missing)
    with pytest.raises(HvError, match=r"^the file: No such file or directory$") as told, \
            hands.failing(plain("the file", "make it")):
        hands.value(hands.open(str(tmp_path / "none"), os.O_RDONLY))
    assert told.value.hint == "make it" and hands.teller is None


def test_the_first_error_counts(made: Made, tmp_path: Path) -> None:
    """Not what comes of it: calls go on behind one that may fail, but not so."""
    made.hands.open(str(tmp_path / "none"), os.O_RDONLY, may=(errno.EACCES,))
    made.hands.change(str(tmp_path / "neither"))
    with pytest.raises(KernelError, match=r"^open\(.*none\): ENOENT"):
        made.hands.flush()


def test_nothing_is_done_after_an_error(made: Made, tmp_path: Path) -> None:
    made.hands.do("getpid", GETPID, hint="never")
    made.hands.do("bad", 4000, hint="do this")
    made.hands.mkdir(AT_FDCWD, str(tmp_path / "made"), 0o700)
    with pytest.raises(KernelError, match=r"^bad: ENOSYS") as told:
        made.hands.flush()
    assert told.value.hint == "do this" and not (tmp_path / "made").exists()
    assert made.end() == 1


def test_many_calls_and_much_memory(made: Made, tmp_path: Path) -> None:
    text = bytes(range(256)) * 4096         # 1 MiB
    file = made.hands.open(str(tmp_path / "file"), os.O_CREAT | os.O_WRONLY, mode=0o600)
    for at in range(0, len(text), 1 << 16):
        made.hands.do("write", WRITE, file, text[at:at + (1 << 16)], 1 << 16)
    for _ in range(3000):
        last = made.hands.do("getpid", GETPID)
    assert made.hands.value(last) == made.pid
    assert (tmp_path / "file").read_bytes() == text
    assert made.hands.start_of(str(tmp_path / "file"), len(text))() == text


def test_its_end_is_noticed(made: Made) -> None:
    made.hands.do("exit_group", EXIT_GROUP, 3)
    with pytest.raises(HvError, match="died before it was ready"):
        made.hands.flush()
    assert made.end() == 3


def test_it_ends_with_the_runtime(made: Made) -> None:
    made.hands.value(made.hands.do("getpid", GETPID))
    assert made.end() == 1


def test_it_has_nothing_of_ours(made: Made) -> None:
    """No memory, no descriptor but its own and the standard ones, and nobody may look into it."""
    secret = bytearray(b"a secret of the runtime's" * 1000)
    assert made.hands.value(made.hands.do("prctl", PRCTL, PR_GET_DUMPABLE)) == 0
    assert "memfd:pyhv-init" in os.readlink(f"/proc/{made.pid}/exe")
    maps = Path(f"/proc/{made.pid}/maps").read_text()
    assert "python" not in maps and "[heap]" not in maps and len(maps.splitlines()) < 8, maps
    assert int(Path(f"/proc/{made.pid}/statm").read_text().split()[1]) < 64      # pages
    handed_on = {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
                 and os.get_inheritable(int(fd))}
    assert {int(fd) for fd in os.listdir(f"/proc/{made.pid}/fd")} <= {made.inside} | handed_on
    assert secret


def test_signals_are_as_they_were(made: Made) -> None:
    import _signal

    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGUSR2,))
    try:
        made.hands.value(made.hands.do("getpid", GETPID))
        assert _signal.pthread_sigmask(_signal.SIG_BLOCK, ()) == {_signal.SIGUSR2}
    finally:
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGUSR2,))


def test_a_process_that_cannot_be_made() -> None:
    made = Made()
    with pytest.raises(KernelError, match="clone"):
        far.Program(made.inside, made.memory).launch(0x10000, -1, [], buffer(4))    # CLONE_THREAD, no CLONE_SIGHAND
    os.close(made.inside)
    made.end()


def test_other_threads_go_on(made: Made) -> None:
    """While it is made the calling thread alone waits."""
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        assert made.hands.value(made.hands.do("getppid", GETPPID)) == os.getpid()
    finally:
        stop.set()
        thread.join()
    assert counted[0]


def test_the_last_list(made: Made) -> None:
    """What is added needs no answer; a failure is told by its tag."""
    made.hands.do("sigprocmask", RT_SIGPROCMASK, 2, bytes(8), None, 8)
    made.hands.add(6, EXECVE, b"/bin/none", [b"none"], [b"A=1"])
    made.hands.end()
    with pytest.raises(HvError, match=r'^exec: "none": no such file or directory$'):
        made.hands.outcome("none")


def test_the_last_list_runs_a_program(made: Made, tmp_path: Path) -> None:
    made.hands.do("sigprocmask", RT_SIGPROCMASK, 2, bytes(8), None, 8)
    made.hands.add(1, 72, made.inside, 2, 1)            # F_SETFD, FD_CLOEXEC
    made.hands.add(6, EXECVE, b"/bin/sh", [b"sh", b"-c", b"echo $0 $A > $OUT", b"name"],
                   [b"A=one", b"OUT=" + os.fsencode(tmp_path / "out")])
    made.hands.end()
    made.hands.outcome("sh")
    assert made.end() == 0 and (tmp_path / "out").read_text() == "name one\n"


def test_any_is_every_error() -> None:
    assert errno.ENOENT in ANY and 4095 in ANY and 0 not in ANY
