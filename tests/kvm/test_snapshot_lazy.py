"""A real Linux that goes on with memory from elsewhere: files plain and packed, processes of ours and of others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.run import PYHV, ROOT, needs_kvm, no_traceback, pyhv
from framework.snapshots import Going, Taken

from hv.errors import ConfigError, HvError, KernelError, SnapshotError
from hv.linux.userfaultfd import Userfaultfd
from hv.snapshot import lazy
from hv.snapshot.format import Snapshot, write_state
from hv.snapshot.lazy import LazyMemory
from hv.snapshot.pack import check, pack
from hv.snapshot.restore import restore
from hv.snapshot.save import save
from hv.snapshot.working_set import load, touched

pytestmark = [needs_kvm, pytest.mark.timeout(300)]
HANDLER = ROOT / "tests/framework/page_handler.py"


@pytest.fixture(scope="module", autouse=True)
def permitted() -> None:
    try:
        Userfaultfd().close()
    except KernelError as error:
        pytest.skip(f"{error}: {error.hint}")


@pytest.fixture(scope="module")
def plain(micro: Taken, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The snapshot in a folder of this file's own, its files shared."""
    return linked(micro.folder, tmp_path_factory.mktemp("lazy") / "plain")


@pytest.fixture(scope="module")
def packed(micro: Taken, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = linked(micro.folder, tmp_path_factory.mktemp("lazy") / "packed")
    before, after = pack(Snapshot(folder))
    assert after < before / 2
    return folder


@pytest.fixture(scope="module")
def right(plain: str) -> str:
    """What the guest answers when it goes on the plain way."""
    return answer(plain)


def linked(source: str, target: Path) -> str:
    shutil.copytree(source, target, copy_function=os.link)
    return str(target)


QUESTION = "head -c 300000 /bin/busybox | md5sum; echo $X; cat /tmp/file; ls /dev | md5sum"


def answer(folder: str, **options: object) -> str:
    shell = Going(restore(folder, **options))       # type: ignore[arg-type]
    with shell:
        return shell.run(QUESTION)


def children(pid: int | str) -> list[int]:
    return [int(child) for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]


OTHERS: set[int] = set()            # children of the process that runs the tests: other files' helpers


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(children("self"))


# the same answers from everywhere ---------------------------------------------------------------------


def test_every_back_end_gives_the_same_answers(plain, packed, right, tmp_path):
    assert "kept\n" in right
    assert answer(plain, backend="uffd") == right
    assert answer(packed, backend="uffd") == right
    assert not os.path.exists(f"{packed}/memory.plain")     # it was served, not unpacked
    assert answer(packed) == right
    assert os.path.exists(f"{packed}/memory.plain")
    assert set(children("self")) <= OTHERS


def test_a_handler_of_anothers(plain, right, tmp_path):
    path = str(tmp_path / "pages")
    with subprocess.Popen([sys.executable, HANDLER, path, f"{plain}/memory"], stdout=subprocess.PIPE) as handler:
        assert handler.stdout is not None and handler.stdout.readline() == b"listening\n"
        assert answer(plain, backend=f"uffd:{path}") == right
        assert int(handler.stdout.readline().split()[1]) > 100
        assert handler.wait(10) == 0


def test_a_working_set_is_noted_and_read_first(plain, right):
    with pytest.raises(SnapshotError, match=r"working-set: .* has none"):
        restore(plain, prefetch=True)
    with Going(restore(plain, record=60.0, backend="uffd")) as shell:
        shell.run("echo $X")
        shell.machine.stop()
        shell.machine.wait(10)          # it is noted at the end
        exact = touched(shell.machine.memory)
    runs = load(Snapshot(plain), shell.machine.config.memory)
    assert runs == exact and 20 < sum(end - first for first, end in runs) < 5000
    for backend in ("file", "uffd"):
        assert answer(plain, prefetch=True, backend=backend) == right
    with Going(restore(plain, prefetch=True), start=False) as shell:
        shell.machine.start()
        there = {page for first, end in touched(shell.machine.memory) for page in range(first, end)}
        assert there >= {page for first, end in runs for page in range(first, end)}


def test_pages_that_a_balloon_gives_back(plain, right):
    with Going(restore(plain, backend="uffd")) as shell:
        balloon = shell.machine.devices["balloon0"]
        balloon.set_target(40 << 20)
        end = time.monotonic() + 60
        while balloon.actual < 40 << 20 and time.monotonic() < end:
            shell.machine.wait(0.05)
        assert balloon.actual == 40 << 20
        balloon.set_target(0)
        while balloon.actual and time.monotonic() < end:
            shell.machine.wait(0.05)
        assert shell.run(QUESTION) == right
        assert shell.machine.outcome is None


def test_a_machine_of_lazy_memory_is_saved_whole_and_as_a_difference(plain, right, tmp_path):
    with Going(restore(plain, backend="uffd")) as shell:
        shell.run("echo more > /tmp/more")
        save(shell.machine, str(tmp_path / "difference"), diff=True)
        assert not shell.machine.memory.complete        # only what has changed was looked at
        save(shell.machine, str(tmp_path / "whole"), compress=True)
        assert shell.machine.memory.complete
        assert shell.run(QUESTION) == right             # it goes on without a handler
    assert set(children("self")) <= OTHERS
    check(Snapshot(str(tmp_path / "whole")))
    for name in ("difference", "whole"):
        with Going(restore(str(tmp_path / name), backend="uffd")) as shell:
            assert shell.run(QUESTION) == right
            assert shell.run("cat /tmp/more").startswith("more\n")


# ends -------------------------------------------------------------------------------------------------


class Run:
    """`pyhv snapshot restore` as a process, and its handler's number."""

    def __init__(self, folder: str, *options: str) -> None:
        self.process = subprocess.Popen([*PYHV, "snapshot", "restore", folder, "--no-control", *options],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.type("echo up $((6*7))")
        os.set_blocking(self.process.stdout.fileno(), False)
        output, end = b"", time.monotonic() + 30
        while b"up 42" not in output:
            assert self.process.poll() is None and time.monotonic() < end, output
            output += self.process.stdout.read() or b""
            time.sleep(0.01)
        # our handler and its guard; beside a stranger's handler there is only a guard
        self.handler = children(self.process.pid)[0]
        self.guard = (*children(self.handler), self.handler)[0]

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def end(self, timeout: float = 30) -> tuple[int, str]:
        code = self.process.wait(timeout)
        assert self.process.stderr is not None
        text = self.process.stderr.read().decode()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        return code, text

    def others_end(self) -> bool:
        """Whether handler and guard are gone, a moment after."""
        for _ in range(200):
            if not any(alive(pid) for pid in (self.handler, self.guard)):
                return True
            time.sleep(0.02)
        return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def run(plain: str) -> Iterator[Run]:
    made = Run(plain, "--memory-backend", "uffd")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()
    for pid in (made.handler, made.guard):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_the_machine_ends_when_its_handler_is_killed(run):
    os.kill(run.handler, signal.SIGKILL)
    code, text = run.end()
    assert code == 74
    assert ("pyhv: memory-lost: pages of the guest's memory are nowhere: the memory handler was killed by signal 9\n"
            in text)
    assert "Traceback" not in text
    assert run.others_end()


def test_the_handler_ends_when_the_machine_is_killed(run):
    os.kill(run.handler, signal.SIGSTOP)        # even one that can't do anything
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.end()[0] == -9
    assert run.others_end()


def test_the_machine_goes_on_without_its_guard(run):
    os.kill(run.guard, signal.SIGKILL)
    run.type("poweroff -f")
    assert run.end(60)[0] == 0
    assert run.others_end()


STUCK = """
import os, signal, sys
sys.path[:0] = {path!r}
from hv.snapshot.restore import restore
machine = restore({folder!r}, backend="uffd")
machine.start()
handler = machine.memory._pid
os.kill(handler, signal.SIGSTOP)
os.posix_spawn("/bin/sh", ["sh", "-c", f"sleep 0.3; kill -9 {{handler}}"], os.environ)
machine.memory.read(machine.memory.size - 12 * 4096, 1)        # with the interpreter's lock
print("went on", flush=True)
"""


def test_a_process_that_stands_still_is_killed_by_the_guard(plain):
    code = STUCK.format(path=[str(ROOT), *sys.path], folder=plain)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done
    assert "went on" not in done.stdout
    assert done.stderr == ("pyhv: the memory handler has ended and the VM waits for a page of it: killed, since it "
                           "can't end otherwise\n")


# refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "says"), [
    ("hang up", "hung up"), ("garbage", "sent a line that is no object"), ("no", r"says: 'not \\x1b\[31mtoday'"),
    ("endless", "sent a line that does not end"), ("silent", "does not say that it is ready"),
])
def test_a_strangers_handler_that_misbehaves(plain, tmp_path, monkeypatch, mode, says):
    monkeypatch.setattr(lazy, "_PATIENCE", 1.0)
    path = str(tmp_path / "pages")
    with subprocess.Popen([sys.executable, HANDLER, path, f"{plain}/memory", mode], stdout=subprocess.PIPE) as handler:
        assert handler.stdout is not None
        handler.stdout.readline()
        with pytest.raises(HvError, match=says):
            restore(plain, backend=f"uffd:{path}")
        handler.kill()
    assert set(children("self")) <= OTHERS


def test_a_strangers_handler_that_goes(plain, tmp_path):
    path = str(tmp_path / "pages")
    with subprocess.Popen([sys.executable, HANDLER, path, f"{plain}/memory"], stdout=subprocess.PIPE) as handler:
        assert handler.stdout is not None
        handler.stdout.readline()
        run = Run(plain, "--memory-backend", f"uffd:{path}")
        time.sleep(1)           # the guest is idle: nobody waits for a page with the interpreter's lock held
        handler.kill()
        code, text = run.end()
    assert code == 74
    assert f"pyhv: memory-lost: pages of the guest's memory are nowhere: the memory handler at {path} hung up\n" in text
    assert run.others_end()


def test_what_can_not_be_asked_for(plain, tmp_path):
    for backend in ("uffe", "uffd:", "", "file:x", "uffd:" + "x" * 108):
        with pytest.raises(ConfigError, match="--memory-backend"):
            restore(plain, backend=backend)
    with pytest.raises(ConfigError, match="No such file"):
        restore(plain, backend=f"uffd:{tmp_path}/none")
    done = pyhv("snapshot", "restore", plain, "--record-working-set=soon")
    no_traceback(done)
    assert done.returncode == 2 and b"no number of seconds" in done.stderr


def test_hostile_files_are_one_line(plain, packed, tmp_path):
    bad = linked(packed, tmp_path / "bad")
    data = bytearray(Path(f"{bad}/memory.zst").read_bytes())
    os.unlink(f"{bad}/memory.zst")
    data[-100] ^= 0x40
    Path(f"{bad}/memory.zst").write_bytes(data)
    Path(f"{bad}/working-set").write_bytes(b"pyhv-working-set 1 0\n{}")
    for options in ((), ("--memory-backend", "uffd"), ("--prefetch",)):
        done = pyhv("snapshot", "restore", bad, *options, timeout=30)
        no_traceback(done)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
        assert done.stderr.startswith(b"pyhv: snapshot: "), done.stderr


def test_a_block_damaged_behind_the_check_stops_the_machine(packed, tmp_path):
    """Its stamp is the right one, so it is found only when it is wanted."""
    bad = linked(packed, tmp_path / "bad")
    path = f"{bad}/memory.zst"
    os.rename(f"{bad}/state.json", f"{bad}/state.old")      # not the one that others share
    status = os.stat(path)
    data = bytearray(Path(path).read_bytes())
    for at in range(2000, len(data) - 40_000, 1000):      # the table at the end stays right
        data[at] ^= 0xFF
    os.unlink(path)
    Path(path).write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    state = Snapshot(packed)
    state.state["memory"]["inode"] = os.stat(path).st_ino
    write_state(bad, state.state)
    done = pyhv("snapshot", "restore", bad, "--memory-backend", "uffd", stdin=QUESTION.encode() + b"\n", timeout=60)
    no_traceback(done)
    assert b"memory.zst: block" in done.stderr
    # while it is made, while it runs, or while Python itself waits for the page
    assert done.returncode in (1, 74) or (done.returncode == -9 and b"killed, since it can't end" in done.stderr)


# the file under a running machine ---------------------------------------------------------------------


def test_what_becomes_of_the_file_is_noticed(plain, tmp_path):
    for backend in ("file", "uffd"):
        folder = str(tmp_path / backend)
        shutil.copytree(plain, folder)
        with Going(restore(folder, backend=backend)) as shell:
            machine = shell.machine
            machine.memory.look()
            assert machine.warnings == []
            with open(f"{folder}/memory", "r+b") as file:
                os.pwrite(file.fileno(), b"x", machine.memory.size - 1)
            machine.memory.look()
            machine.memory.look()
            assert [text.partition(": ")[0] for text in machine.warnings] == [
                "the memory file under this machine was written to"]
            machine.freeze()            # nobody touches what is cut off
            os.truncate(f"{folder}/memory", machine.memory.size - 4096)
            os.unlink(f"{folder}/memory")
            machine.memory.look()
            assert [text.split()[7] for text in machine.warnings] == ["written", f"{machine.memory.size - 4096}",
                                                                       "deleted:"]
            assert isinstance(machine.memory, LazyMemory) == (backend == "uffd")
