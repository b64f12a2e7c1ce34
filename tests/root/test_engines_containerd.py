"""containerd, Debian's, through its own runc shim with `--runc-binary pyhv-runtime`.

User namespaces are podman's part (test_engines.py): ctr forgets --runc-binary where --uidmap is given.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import container
from framework.engines import IMAGE, Containerd, needs, until
from framework.terminal import OnTerminal

pytestmark = [*container, needs("containerd", "ctr")]
LOOP = "while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def ctr() -> Iterator[Containerd]:
    made = Containerd()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def running(ctr: Containerd) -> Iterator[str]:
    """The name of a detached container that ends with 8 when it is asked to."""
    ctr.call(*ctr.new("box", "--detach"), "sh", "-c", f"trap 'exit 8' TERM; {LOOP}")
    yield "box"
    ctr.call("task", "delete", "--force", "box", code=None)
    ctr.call("container", "rm", "box", code=None)


@pytest.mark.parametrize("words, code, text", [
    (("sh", "-c", "echo out; exit 5"), 5, ""), (("/bin/absent",), 1, "no such file or directory"),
    (("absent",), 1, "executable file not found in $PATH"), (("/etc/passwd",), 1, "permission denied")])
def test_run_gives_the_programs_exit_code(ctr, words, code, text):
    done = ctr.run("one", *words, code=code)
    assert text in done.stderr and ("out" in done.stdout) == (code == 5)


def test_life_of_a_detached_container(ctr, running):
    """start, ps, figures, pause, resume, signal, exit code, delete; a shim stays with it, no runtime."""
    assert ctr.task(running) == "RUNNING"
    pid = next(row.split()[1] for row in ctr.said("task", "ls").splitlines() if row.startswith(running))
    shim = Path(f"/proc/{pid}/status").read_text().split("PPid:\t")[1].split()[0]
    assert "containerd-shim" in Path(f"/proc/{shim}/comm").read_text()
    assert set(Path(f"/proc/{shim}/task/{shim}/children").read_text().split()) <= {pid}
    assert pid in ctr.said("task", "ps", running).split()
    figures = {row.split()[0]: row.split()[1] for row in ctr.said("task", "metrics", running).splitlines()[3:]
               if len(row.split()) == 2}
    assert int(figures["memory.usage_in_bytes"]) > 0 and int(figures["pids.current"]) >= 1
    ctr.call("task", "pause", running)
    assert ctr.task(running) == "PAUSED"
    ctr.call("task", "resume", running)
    assert ctr.task(running) == "RUNNING"
    ctr.call("task", "kill", "--signal", "SIGTERM", running)
    assert until(lambda: ctr.task(running) == "STOPPED")
    assert "exit code 8" in ctr.call("task", "delete", running).stderr
    ctr.call("container", "rm", running)
    assert not list((ctr.folder / "runc" / "default").iterdir())


def test_exec(ctr, running):
    def inside(name: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return ctr.call("task", "exec", "--exec-id", name, running, *words, code=code)

    assert inside("e1", "cat", "/proc/1/comm").stdout == "sh\n"
    inside("e2", "sh", "-c", "exit 6", code=6)
    assert "no such file or directory" in inside("e3", "/absent", code=1).stderr
    command = ctr.command("task", "exec", "--exec-id", "e4", "--tty", running, "sh", "-c",
                          "tty; sleep 0.5; stty size; read line; echo got $line; exit 3")
    with OnTerminal(command=command, size=(31, 101)) as terminal:
        terminal.wait_for(b"31 101")
        terminal.type(b"keys\r")
        terminal.wait_for(b"got keys")
        assert terminal.end(30) == 3


def test_terminal(ctr):
    command = ctr.command(*ctr.new("tty", "--rm", "--tty"), "sh", "-c",
                          "tty; sleep 0.5; stty size; read line; echo got $line; exit 3")
    with OnTerminal(command=command, size=(30, 100)) as terminal:
        terminal.wait_for(b"30 100")
        terminal.type(b"keys\r")
        terminal.wait_for(b"got keys")
        assert terminal.end(30) == 3 and b"/dev/pts/0" in terminal.output


def test_memory_running_out_is_an_event(ctr):
    """The shim watches the container's cgroup: it must be where the runtime's state says, before the program runs."""
    with (ctr.folder / "events").open("w") as file:
        watcher = subprocess.Popen(ctr.command("events"), stdout=file)
    try:
        # the shim begins to watch when start has returned; a program that is quicker than that goes unnoticed
        words = ("sh", "-c", "sleep 1; exec dd if=/dev/zero of=/dev/null bs=64M")
        ctr.run("greedy", *words, flags=("--memory-limit", str(20 << 20)), code=137)
        assert until(lambda: "/tasks/oom" in (ctr.folder / "events").read_text())
    finally:
        watcher.terminate()
        watcher.wait(10)


@pytest.mark.parametrize("flags, script, expected", [
    (("--read-only",), "touch /a 2>/dev/null || echo refused", "refused"),
    (("--seccomp",), "grep Seccomp: /proc/self/status", "Seccomp:\t2"),
    (("--cwd", "/tmp", "--env", "A=B"), "pwd; echo $A", "/tmp\nB"),
    (("--cap-drop", "CAP_KILL"), "grep CapBnd /proc/self/status", "CapBnd:\t00000000a80425db"),
    (("--device", "/dev/fuse"), "stat -c %t:%T /dev/fuse", "a:e5"),
    (("--net-host",), "readlink /proc/self/ns/net", ""),
    (("--mount", "type=bind,src=/etc,dst=/mnt,options=rbind:ro"), "touch /mnt/a 2>/dev/null || echo refused",
     "refused")], ids=str)
def test_options_reach_the_container(ctr, flags, script, expected):
    if "--net-host" in flags:
        expected = os.readlink("/proc/self/ns/net")
    if "--device" in flags and not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    assert ctr.run("one", "sh", "-c", script, flags=flags).stdout.rstrip("\n") == expected


def test_containers_at_the_same_time(ctr):
    running = [subprocess.Popen(ctr.command(*ctr.new(f"many{number}", "--rm"), "sh", "-c", f"exit {number}"),
                                stdin=subprocess.DEVNULL) for number in range(1, 7)]
    assert [process.wait(60) for process in running] == list(range(1, 7))
    assert not [name for name in ctr.said("container", "ls", "-q").split() if name.startswith("many")]
    assert IMAGE in ctr.said("images", "ls", "-q")
