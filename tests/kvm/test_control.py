"""`pyhv vm` and the control sockets of real guests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.control import Line
from framework.run import PYHV, ROOT, needs_kvm, no_traceback, pyhv
from framework.terminal import OnTerminal
from framework.vm import Vm

from hv import Machine, MachineConfig
from hv.machine.control import folder
from hv.machine.control_commands import COMMANDS

pytestmark = [needs_kvm, pytest.mark.timeout(600)]
# l: mov dx, 0x601; in al, dx; test al, 1; jz l; mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt
OBEY_POWER_BUTTON = bytes.fromhex("ba0106" "ec" "a801" "74f8" "ba0406" "b80034" "ef" "f4")
COUNT = bytes.fromhex("66ff060005" "ebf9")                          # real mode: inc dword [0x500]; jmp back


@pytest.fixture(scope="module")
def echo() -> Iterator[Vm]:
    """A guest that sends back what is typed, with a network card and a balloon that it does not know."""
    with Vm("echo", "guest:echo", "--cmdline", "echo", "--net", "none", "--balloon", "--stats") as vm:
        with vm.line() as line:
            line.ask("console", history=4096)
            line.wait_for(b"echo: ready")
        yield vm


def ls() -> dict[str, dict[str, object]]:
    done = pyhv("vm", "ls", "--json")
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


# a running VM -----------------------------------------------------------------------------------------

def test_ls_status_and_stats(echo: Vm) -> None:
    row = ls()[echo.name]
    assert row["pid"] == echo.process.pid and row["state"] == "running" and row["memory"] == 128 << 20
    assert row["kernel"] == "guest:echo" and str(row["cmdline"]).endswith("echo") and row["cpus"] == 1
    assert [device["name"] for device in row["devices"]] == ["net0", "balloon0"]     # type: ignore[attr-defined]
    table = pyhv("vm", "ls").stdout.decode().splitlines()
    assert table[0].split() == ["NAME", "PID", "STATE", "UPTIME", "CPUS", "MEMORY", "KERNEL"]
    assert any(line.split()[:3] == [echo.name, str(echo.process.pid), "running"] for line in table)
    assert f"pid       {echo.process.pid}" in pyhv("vm", "status", echo.name).stdout.decode()
    data = json.loads(pyhv("vm", "stats", echo.name, "--json").stdout)
    assert data["measured"] and data["vcpus"][0]["exits"]["IO"] > 10 and data["vcpus"][0]["cpu_seconds"] > 0
    assert 0 < data["memory"]["pss"] <= data["memory"]["rss"] < data["memory"]["process_rss"] < 1 << 30
    assert data["console"]["printed"] > 10 and data["devices"]["net0"]["sent"] == 0
    text = pyhv("vm", "stats", echo.name).stdout.decode()
    assert "of processor time; exits: " in text and "guest memory" in text


def test_pause_and_resume(echo: Vm) -> None:
    with echo.line() as line, echo.line() as asking:
        line.ask("console")
        assert pyhv("vm", "pause", echo.name).returncode == 0
        assert ls()[echo.name]["state"] == "paused"
        assert pyhv("vm", "pause", echo.name).returncode == 0       # twice does no harm
        line.send(b"typed while paused")
        before = asking.ask("stats")
        time.sleep(0.3)
        after = asking.ask("stats")
        assert before["vcpus"] == after["vcpus"] and before["console"]["printed"] == after["console"]["printed"]
        assert pyhv("vm", "resume", echo.name).returncode == 0
        line.wait_for(b"typed while paused")
        assert ls()[echo.name]["state"] == "running"


def test_device_commands(echo: Vm) -> None:
    with echo.line() as line:
        assert line.ask("balloon", target=32 << 20) == {"id": None, "ok": True, "target": 32 << 20, "actual": 0}
        assert line.ask("balloon")["target"] == 32 << 20
        assert "a balloon of" in line.ask("balloon", target=1 << 40)["error"]
        assert "a balloon of -1" in line.ask("balloon", target=-1)["error"]
        assert line.ask("link", device="net0", up=False)["up"] is False
        assert line.ask("link", device="net0", up=True)["up"] is True
        assert line.ask("link", device="net1", up=True)["hint"] == "it has net0"
        assert "no net device" in line.ask("link", device="balloon0", up=True)["error"]
        assert "not between" in line.ask("stop", timeout=-1)["error"]
        assert "not between" in line.ask("stop", timeout=1e9)["error"]
        line.send(b'{"command": "stop", "timeout": NaN}\n')
        assert "not between" in line.read()["error"]
        assert "not between" in line.ask("console", history=-1)["error"]
        assert "surrogate" in line.ask("input", text="\ud800")["error"]
        commands = line.ask("help")["commands"]
        assert commands["stop"] == {"timeout": "float", "force": "bool"} and commands["balloon"] == {"target": "int"}
        documented = (ROOT / "docs/control.md").read_text()
        assert all(f"| `{name}`" in documented or f", `{name}` |" in documented for name in COMMANDS)


def test_typing_by_command(echo: Vm) -> None:
    with echo.line() as line, echo.line() as typist:
        line.ask("console")
        assert typist.ask("input", text="ça va\n")["bytes"] == 7
        line.wait_for("ça va".encode())


def test_console_on_a_terminal_and_back(echo: Vm) -> None:
    with echo.line() as beside, OnTerminal("vm", "console", echo.name) as run:
        beside.ask("console")
        run.wait_for(b"Ctrl-A d leaves it")
        run.wait_for(b"echo: ready")                # what was printed before
        assert not termios.tcgetattr(run.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        run.type(b"abc\x03def\x1a")                 # Ctrl-C and Ctrl-Z are the guest's
        run.wait_for(b"abc\x03def\x1a")
        beside.wait_for(b"abc\x03def\x1a")          # several see it
        beside.send(b"from beside")
        run.wait_for(b"from beside")
        run.type(b"\x01h")
        run.wait_for(b"leave the guest running")
        run.type(b"\x01a")
        run.wait_for(b"\x01")
        run.type(b"\x01d")
        assert run.end() == 0
        assert termios.tcgetattr(run.slave) == run.before
        assert b"the VM runs on" in run.output
        beside.send(b"alive")
        beside.wait_for(b"alive")


def test_a_viewer_types_nothing(echo: Vm) -> None:
    with echo.line() as beside, OnTerminal("vm", "console", echo.name, "--view") as run:
        beside.ask("console")
        run.wait_for(b"echo: ready")
        run.type(b"NOTHING")
        beside.send(b"something")
        run.wait_for(b"something")
        assert b"NOTHING" not in run.output
        run.type(b"\x01d")
        assert run.end() == 0


def test_the_control_socket_by_its_path(echo: Vm) -> None:
    assert pyhv("vm", "status", echo.path).returncode == 0


# mistakes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "code", "text"), [
    (("status", "no-such-vm"), 1, b"no VM no-such-vm is running - `pyhv vm ls`"),
    (("console", "/no/such.sock"), 1, b"no VM /no/such.sock is running"),
    (("pause", "a b"), 2, b"VM name 'a b'"), (("stop",), 2, b"Missing argument 'NAME'"),
    (("stop", "x", "--timeout", "-1"), 2, b"--timeout"), (("fly", "x"), 2, b"No such command 'fly'"),
    (("stats", "/etc/passwd"), 1, b"is running"),
])
def test_a_mistake_costs_one_line(words: tuple[str, ...], code: int, text: bytes) -> None:
    done = pyhv("vm", *words)
    no_traceback(done)
    assert done.returncode == code and text in done.stderr and done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.parametrize(("options", "text"), [
    (("--name", "a/b"), b"VM name 'a/b'"), (("--name", ".."), b"VM name '..'"),
    (("--control", "/no/such/folder/x.sock"), b"control socket /no/such/folder/x.sock"),
    (("--control", "/tmp/" + "x" * 120), b"possible are 107"),
    (("--control", "/tmp/x.sock", "--no-control"), b"exclude each other"),
])
def test_a_socket_that_can_not_be_had_stops_the_boot(options: tuple[str, ...], text: bytes) -> None:
    done = pyhv("boot", "guest:tiny", "--quiet", *options)
    no_traceback(done)
    assert done.returncode == 2 and done.stdout == b"" and text in done.stderr and done.stderr.count(b"\n") == 1, done


def test_a_name_in_use_is_refused(echo: Vm) -> None:
    done = pyhv("boot", "guest:tiny", "--quiet", "--name", echo.name)
    assert done.returncode == 2 and done.stdout == b""
    assert b"a VM of that name is running" in done.stderr and done.stderr.count(b"\n") == 1
    assert ls()[echo.name]["state"] == "running"


# life and death ---------------------------------------------------------------------------------------

def test_a_killed_vm_leaves_no_name_behind() -> None:
    with Vm("killed", "guest:echo") as vm:
        vm.process.kill()
        vm.process.wait(10)
        assert os.path.exists(vm.path)
        with Vm("killed", "guest:echo") as again:       # its name is free at once
            assert ls()[again.name]["pid"] == again.process.pid
            again.process.kill()
            again.process.wait(10)
            assert again.name not in ls() and not os.path.exists(again.path)


def test_a_vm_whose_process_is_stopped_is_silent() -> None:
    with Vm("silent", "guest:echo") as vm:
        vm.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert ls()[vm.name] == {"name": vm.name, "state": "silent"}
        assert time.monotonic() - start < 10
        assert f"{vm.name}" in pyhv("vm", "ls").stdout.decode()
        vm.process.send_signal(signal.SIGCONT)
        assert ls()[vm.name]["state"] == "running"


def test_the_usual_name_and_none(tmp_path: Path) -> None:
    command = [*PYHV, "boot", "guest:echo", "--quiet", "--timeout", "30"]
    usual, none, elsewhere = (subprocess.Popen([*command, *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                              for more in ((), ("--no-control",), ("--control", str(tmp_path / "x"), "--name", "n")))
    try:
        for process in (usual, none, elsewhere):
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"echo: ready")
        deadline = time.monotonic() + 5
        while f"vm-{usual.pid}" not in (rows := ls()):      # it comes a moment after the guest's start
            assert time.monotonic() < deadline
        assert rows[f"vm-{usual.pid}"]["pid"] == usual.pid
        assert not {none.pid, elsewhere.pid} & {row.get("pid") for row in rows.values()}
        with Line(str(tmp_path / "x")) as line:
            assert line.ask("status")["name"] == "n"
    finally:
        for process in (usual, none, elsewhere):
            process.terminate()
            process.communicate(timeout=20)
    assert not os.path.exists(f"{folder()}/vm-{usual.pid}.sock") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("pause", [False, True], ids=["running", "paused"])
def test_the_power_button(tmp_path: Path, pause: bool) -> None:
    image = tmp_path / "obeys.img"
    image.write_bytes(OBEY_POWER_BUTTON.ljust(510, b"\0") + b"\x55\xaa")
    with Vm("obeys", str(image), "--boot-protocol", "flat") as vm, vm.line() as line:
        if pause:
            line.ask("pause")
        reply = line.ask("stop", timeout=30)
        assert (reply["reason"], reply["code"], reply["forced"]) == ("poweroff", 0, False)
        assert line.ended()
        assert vm.end() == 0


def test_a_guest_that_ignores_its_power_button() -> None:
    with Vm("ignores", "guest:echo") as vm:
        start = time.monotonic()
        done = pyhv("vm", "stop", vm.name, "--timeout", "0.5")
        assert done.returncode == 0 and b"did not answer its power button within 0.5 s" in done.stderr
        assert 0.5 < time.monotonic() - start < 10
        assert not os.path.exists(vm.path)          # stop returns when it is over
        assert vm.end(2) == 0


def test_by_force() -> None:
    with Vm("forced", "guest:echo") as vm:
        done = pyhv("vm", "stop", vm.name, "--force")
        assert (done.returncode, done.stderr) == (0, b"")
        assert vm.end(2) == 0


def test_who_waits_learns_of_another_end() -> None:
    with Vm("other-end", "guest:echo") as vm, vm.line() as line, vm.line() as other:
        line.send(b'{"command": "stop", "timeout": 60}\n')
        other.ask("status")
        vm.process.terminate()
        reply = line.read()
        assert (reply["ok"], reply["reason"], reply["code"]) == (True, "terminated", 143)
        assert vm.end() == 143


# the library ------------------------------------------------------------------------------------------

def test_a_machine_of_the_library_has_a_socket_when_asked(tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    with Machine(MachineConfig(COUNT, boot_protocol="flat", memory=16 << 20, cpus=2)) as machine:
        assert machine.control is None
        machine.serve_control(path, {"peek": "framework.peek:peek"})
        thread = threading.Thread(target=machine.run)
        thread.start()
        try:
            with Line(path) as line:
                assert line.ask("status")["kernel"] == "(bytes)"
                first = line.ask("peek")["count"]
                deadline = time.monotonic() + 10
                while line.ask("peek")["count"] == first:
                    assert time.monotonic() < deadline
                assert line.ask("pause")["state"] == "paused"
                still = line.ask("peek")["count"]
                time.sleep(0.1)
                assert line.ask("peek")["count"] == still
                assert line.ask("resume")["state"] == "running"
                while line.ask("peek")["count"] == still:
                    assert time.monotonic() < deadline
                assert line.ask("stop", force=True)["forced"] is True
                assert machine.outcome is not None and machine.outcome.reason == "quit"
        finally:
            machine.stop()
            thread.join(10)
        assert not thread.is_alive()
    assert not os.path.exists(path)
