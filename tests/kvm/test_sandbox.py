"""A Sandbox as a library: the process that is the VM, and clients of its socket in another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import container
from framework.groups import until
from framework.run import ROOT
from framework.vms import PATIENCE, VmBundle, VmHome

from hv.errors import HvError, StateError
from hv.sandbox.client import SandboxClient, StartFailedError

pytestmark = container

# what hv/instance does: the process that makes the sandbox is the VM
HOST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from hv.container.spec import load_bundle
from hv.sandbox.sandbox import Sandbox
with Sandbox(load_bundle(sys.argv[1]), "box", sys.argv[2], warn=lambda text: print(text, file=sys.stderr)) as sandbox:
    sandbox.prepare()
    sandbox.start(0, 1, 2)
    code = sandbox.serve()
sys.exit(code)
"""


def begin(vm: VmBundle, folder: Path, *args: str, **options: object) -> subprocess.Popen[str]:
    """A sandbox in a process of its own, once it can be asked."""
    vm.config["process"]["args"] = list(args)
    vm.write()
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOST, str(vm.folder), str(folder)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | vm.home.environment, **options)  # type: ignore[call-overload]
    assert until(lambda: (folder / "vm.sock").exists() or process.poll() is not None, PATIENCE)
    return process


@pytest.fixture(scope="module")
def box(vm_home: VmHome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxClient]:
    """The client of one that serves many checks."""
    folder = tmp_path_factory.mktemp("box")
    with begin(vm_home.bundle(folder), folder / "run", "sh", "-c", "echo up; while :; do sleep 0.3; done") as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        client = SandboxClient(str(folder / "run"))
        try:
            yield client
            client.kill(signal.SIGKILL)
            assert process.wait(PATIENCE) == 137
        finally:
            process.kill()
            said = process.communicate(timeout=PATIENCE)
        assert said == ("", "")
    assert not (folder / "run/vm.sock").exists()


def run(box: SandboxClient, *args: str, **process: object) -> tuple[int, bytes]:
    """Exit code and output of one more program."""
    reader, writer = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    with open(reader, "rb") as file:
        try:
            running = box.exec({"args": list(args), "cwd": "/", "env": ["PATH=/bin"], **process}, null, writer, writer)
        finally:
            os.close(writer)
            os.close(null)
        said = file.read()
    code = running.wait(PATIENCE)
    running.close()
    return code, said


def test_programs_codes_and_failures(box):
    assert run(box, "sh", "-c", "echo hello; exit 4") == (4, b"hello\n")
    assert run(box, "sh", "-c", "kill -15 $$") == (143, b"")
    for program, code, why in (("absent", 127, "executable file not found"), ("/etc/passwd", 126, "permission denied")):
        with pytest.raises(StartFailedError, match=why) as caught:
            run(box, program)
        assert caught.value.exit_code == code
    with pytest.raises(HvError, match="cwd"):
        run(box, "true", cwd="relative")


def test_a_terminal_and_its_size(box):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        running = box.exec({"args": ["sh"], "cwd": "/", "env": ["PATH=/bin"], "terminal": True,
                            "consoleSize": {"height": 10, "width": 20}}, *(theirs.fileno(),) * 3)
        theirs.close()
        ours.settimeout(PATIENCE)
        said = b""

        def wait_for(text: bytes) -> None:
            nonlocal said
            while text not in said:
                said += ours.recv(4096)
            said = b""

        ours.sendall(b"stty size\n")
        wait_for(b"\r\n10 20\r\n")
        running.resize(33, 44)
        ours.sendall(b"sleep 0.3; stty size; exit 9\n")
        wait_for(b"\r\n33 44\r\n")
        assert running.wait(PATIENCE) == 9
        running.close()


def test_who_hangs_up_takes_the_program_along(box):
    null = os.open("/dev/null", os.O_RDWR)
    running = box.exec({"args": ["sleep", "12345"], "cwd": "/", "env": ["PATH=/bin"]}, null, null, null)
    assert any(row["pid"] == running.pid and row["command"] == ["sleep", "12345"] for row in box.processes())
    running.close()
    os.close(null)
    assert until(lambda: not any("12345" in row["command"] for row in box.processes()), 15)


def test_figures_pause_and_what_can_t_be_asked_then(box):
    figures = box.stats()
    assert figures["vm"] == {"memory": 256 << 20, "cpus": 1, "uptime": figures["vm"]["uptime"]}
    box.pause()
    assert box.paused()
    with pytest.raises(StateError, match="is paused"):
        box.stats()
    box.resume()
    assert not box.paused() and box.stats()["cpu"]["usage"]["total"] >= figures["cpu"]["usage"]["total"]


def test_programs_beside_each_other(box):
    found: dict[int, tuple[int, bytes]] = {}

    def one(n: int) -> None:
        found[n] = run(box, "sh", "-c", f"sleep 0.2; echo {n}; exit {n}")

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == {n: (n, b"%d\n" % n) for n in range(4)}


@pytest.mark.parametrize("data", [
    b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x04\0\0\0null", b"GET / HTTP/1.0\r\n\r\n",
    b"\x0d\0\0\0" + b'{"do":"exec"}', b"\x12\0\0\0" + b'{"do":"kill","x":1', b"\x0a\0\0\0" + b'{"do":"x"}'])
def test_nonsense_at_the_socket_harms_nobody(box, data):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"{box.folder}/vm.sock")
        peer.settimeout(0.2)
        peer.sendall(data)
        try:
            answer = peer.recv(4096)
        except TimeoutError:
            answer = b"error"           # it waits for the rest
        assert answer == b"" or b"error" in answer
    assert not box.paused()


def test_numbers_out_of_range_are_named(box):
    for message, why in (({"do": "kill", "signal": 65}, "signal 65"), ({"do": "kill"}, "signal None"),
                         ({"do": "resize", "rows": -1, "columns": 1}, "rows -1"),
                         ({"do": "stop", "milliseconds": True, "signal": 1}, "milliseconds True"),
                         ({"do": "nothing"}, "is no request"), ({"do": "start"}, "has been started")):
        with pytest.raises(HvError, match=why):
            box._ask(message)


def test_stop_asks_and_then_ends(vm_home: VmHome, tmp_path: Path) -> None:
    """SIGTERM is not taken: the VM ends a second later, and who waits is told."""
    vm = vm_home.bundle(tmp_path)
    script = "trap 'echo no' TERM; echo up; while :; do sleep 0.1; done"
    with begin(vm, tmp_path / "run", "sh", "-c", script) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        client = SandboxClient(str(tmp_path / "run"))
        try:
            client.stop(8.0)
            assert client.wait(PATIENCE) == 137
            assert process.wait(PATIENCE) == 137
            assert process.stdout.read() == "no\n"
        finally:
            process.kill()
    with pytest.raises(StateError, match="no VM runs"):
        client.kill(9)


def test_a_guest_that_ends_itself(vm_home: VmHome, tmp_path: Path) -> None:
    """By its kernel's panic, which is no exit of the program's."""
    vm = vm_home.bundle(tmp_path)
    vm.config["process"]["capabilities"] = {kind: ["CAP_SYS_ADMIN", "CAP_SYS_BOOT"]
                                            for kind in ("bounding", "effective", "permitted")}
    with begin(vm, tmp_path / "run", "sh", "-c", "busybox reboot -f; sleep 1000") as process:
        assert process.wait(PATIENCE) == 0, "a reboot ends a VM, as with `pyhv boot`"


def test_two_first_runs_make_one_template(vm_home: VmHome, tmp_path: Path) -> None:
    environment = vm_home.environment | {"PYHV_DATA": str(tmp_path / "data")}
    processes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        vm = vm_home.bundle(tmp_path / name)
        vm.config["process"]["args"] = ["echo", name]
        vm.write()
        (tmp_path / name / "run").mkdir()
        processes.append(subprocess.Popen([sys.executable, "-c", HOST, str(vm.folder), str(tmp_path / name / "run")],
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                          env=os.environ | environment))
    said = [process.communicate(timeout=2 * PATIENCE) for process in processes]
    assert [out for out, _ in said] == ["one\n", "two\n"] and [process.returncode for process in processes] == [0, 0]
    assert sum("is booted once" in errors for _, errors in said) == 1
    made = [path for path in (tmp_path / "data/templates").iterdir() if (path / "state.json").exists()]
    assert len(made) == 1 and json.loads((made[0] / "state.json").read_bytes().split(b"\n", 1)[1])["parent"] is None
