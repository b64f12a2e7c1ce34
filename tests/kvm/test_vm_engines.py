"""podman and conmon, Debian's, with `pyhv-vm-runtime` as their runtime: their users see a container."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import container
from framework.engines import IMAGE, Podman, needs, until
from framework.terminal import OnTerminal
from framework.vms import VmHome

pytestmark = [*container, needs("podman", "conmon")]
LOOP = "while :; do sleep 0.2; done"


class VmPodman(Podman):
    """See Podman."""

    def __init__(self, home: VmHome) -> None:
        self.runtime = str(home.runtime)
        super().__init__()

    def command(self, *words: str, runtime: str = "") -> list[str]:
        return super().command(*words, runtime=runtime or self.runtime)


@pytest.fixture(scope="module")
def podman(vm_home: VmHome) -> Iterator[VmPodman]:
    made = VmPodman(vm_home)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def running(podman: VmPodman) -> Iterator[str]:
    """The name of a detached VM that ends with 5 when it is asked to."""
    podman.call(*podman.new("run", "--detach", "--name", "box", "--hostname", "guest"), IMAGE, "sh", "-c",
                f"trap 'echo asked; exit 5' TERM; echo begun; {LOOP}")
    until(lambda: "begun" in podman.said("logs", "box"), 20)
    yield "box"
    podman.call("rm", "--force", "--time", "0", "--ignore", "box")


@pytest.mark.parametrize("words, code, text", [
    (("sh", "-c", "echo out; exit 7"), 7, ""), (("sh", "-c", "kill -9 $$"), 137, ""),
    (("absent",), 127, "executable file not found in $PATH"), (("/etc/passwd",), 126, "permission denied")])
def test_run_gives_the_programs_exit_code(podman, words, code, text):
    assert text in podman.run(IMAGE, *words, code=code).stderr


def test_run_passes_standard_input_and_output_and_has_a_kernel_of_its_own(podman):
    done = podman.run("--interactive", IMAGE, "sh", "-c", "cat; uname -r; echo aside >&2", input="a line\n")
    lines = done.stdout.split("\n")
    assert lines[0] == "a line" and lines[1] != os.uname().release and done.stderr == "aside\n"


def test_volumes_tmpfs_environment_and_files_of_the_engine(podman, tmp_path):
    (tmp_path / "f").write_text("from the host")
    out = podman.shell("cat /v/f; echo; touch /r/x || echo refused; echo $A; grep guest-1 /etc/hostname; "
                       "echo x >/v/made; mount | grep -c ' /t '; test -e /run/.containerenv && echo there",
                       "--volume", f"{tmp_path}:/v", "--volume", f"{tmp_path}:/r:ro", "--tmpfs", "/t", "--env", "A=b c",
                       "--hostname", "guest-1")
    assert out.split("\n") == ["from the host", "refused", "b c", "guest-1", "1", "there"]
    assert (tmp_path / "made").read_text() == "x\n"


def test_run_on_a_terminal(podman):
    """-it: echo, size, a signal typed, the exit code."""
    words = podman.command(*podman.new("run", "--rm", "--interactive", "--tty", IMAGE, "sh"))
    with OnTerminal(command=words, size=(24, 80)) as shell:
        shell.wait_for(b"# ")
        shell.type(b"stty size; tty\n")
        shell.wait_for(b"24 80\r\n/dev/pts/0\r\n")
        shell.resize(50, 120)
        shell.type(b"sleep 0.5; stty size\n")
        shell.wait_for(b"50 120\r\n")
        shell.type(b"sleep 1000\n")
        shell.wait_for(b"sleep 1000")
        shell.type(b"\x03")
        shell.wait_for(b"# ")
        shell.type(b"exit 3\n")
        assert shell.end(30) == 3


def test_memory_is_the_vm_s(podman):
    total = podman.shell("grep MemTotal /proc/meminfo; nproc", "--memory", "300m")
    found = re.search(r"MemTotal: +(\d+) kB", total)
    assert found is not None and 300 << 10 < int(found[1]) < 384 << 10 and total.endswith("\n1")


def test_exec_and_inspect_a_detached_one(podman, running):
    pid = podman.inspect(running)["State"]["Pid"]
    assert "pyhv" in Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    assert podman.said("exec", running, "hostname") == "guest"
    assert podman.call("exec", running, "sh", "-c", "exit 4", code=4).stdout == ""
    assert podman.said("exec", "--interactive", running, "cat", input="in\n") == "in"
    assert podman.call("exec", running, "absent", code=127).stdout == ""
    assert podman.said("exec", "--user", "1000", "--workdir", "/tmp", running, "sh", "-c", "id -u; pwd") == "1000\n/tmp"


def test_exec_on_a_terminal(podman, running):
    words = podman.command("exec", "--interactive", "--tty", running, "sh")
    with OnTerminal(command=words, size=(30, 90)) as shell:
        shell.wait_for(b"# ")
        shell.type(b"stty size; exit 6\n")
        shell.wait_for(b"30 90\r\n")
        assert shell.end(30) == 6


def test_pause_and_figures(podman, running):
    podman.call("pause", running)
    assert podman.inspect(running)["State"]["Status"] == "paused"
    podman.call("unpause", running)
    assert podman.said("stats", "--no-stream", "--format", "{{.Name}}", running) == "box"
    assert podman.said("exec", running, "echo", "on") == "on"


def test_stop_logs_start_again_kill_rm(podman, running):
    podman.call("stop", "--time", "20", running)
    state = podman.inspect(running)["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 5)
    assert podman.said("logs", running).split() == ["begun", "asked"]
    podman.call("start", running)
    podman.call("kill", "--signal", "KILL", running)
    until(lambda: podman.inspect(running)["State"]["Status"] == "exited", 20)
    assert podman.inspect(running)["State"]["ExitCode"] == 137
    podman.call("rm", running)
    assert running not in podman.said("ps", "--all", "--format", "{{.Names}}")
