"""`pyhv migrate` between processes, each of which may be killed in the middle."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from framework.control import Line
from framework.run import PYHV, needs_kvm, pyhv
from framework.vm import PREFIX, Vm

from hv.machine.control import folder
from hv.snapshot import wire

pytestmark = [needs_kvm, pytest.mark.timeout(240)]
# real mode: inc dword [0x500]; cmp word [0x500], 0; jnz start; mov dx, 0x3f8; mov al, '.'; out; jmp start
DOTS = bytes.fromhex("66ff060005" "833e000500" "75f4" "baf803" "b02e" "ee" "ebec")


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "dots.bin").write_bytes(DOTS)
    return str(tmp_path / "dots.bin")


def receiver(address: str, *options: str, tmp: Path | None = None) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([*PYHV, "migrate", "receive", address, "--timeout", "60", *options],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | ({"TMPDIR": str(tmp)} if tmp else {}))
    assert process.stderr is not None
    line = process.stderr.readline()
    assert b"waiting at" in line, line
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=20)


def test_the_commands(tmp_path, image):
    address = f"unix:{tmp_path}/move"
    target = receiver(address, "--name", f"{PREFIX}-there")
    try:
        with Vm("here", image, "--boot-protocol", "flat", "--memory", "16M") as vm:
            done = pyhv("migrate", "send", vm.name, address)
            assert done.returncode == 0, done.stderr
            lines = done.stderr.decode().splitlines()
            assert "pyhv: round 1: " in lines[0] and "the guest stood still for" in lines[-1]
            assert vm.end() == 0
        assert target.stdout is not None and target.stdout.read(5) == b"....."
        assert not os.path.exists(tmp_path / "move")
        with Line(f"{folder()}/{PREFIX}-there.sock") as line:
            assert line.ask("status")["state"] == "running"
            line.ask("stop", force=True)
        assert target.wait(20) == 0
    finally:
        end(target)


@pytest.mark.parametrize("arguments", [
    ("send", "no-such-vm", "unix:/tmp/x"), ("receive", "nowhere"), ("receive", "tcp:127.0.0.1:1", "--cert", "a"),
    ("receive", "unix:/no/such/folder/s"), ("receive", "unix:/tmp/pyhv-nobody", "--wait", "0.1"), ("send",),
    ("receive", "tls:127.0.0.1:1", "--cert", "/none", "--key", "/none", "--ca", "/none", "--wait", "0.1"),
    ("receive", "tcp:no.such.host.invalid:4444"), ("receive", "unix:/tmp/pyhv-nobody", "--wait", "-1"),
])
def test_bad_input_costs_one_line(arguments):
    done = pyhv("migrate", *arguments, timeout=20)
    lines = done.stderr.decode().splitlines()
    assert done.returncode in (1, 2), (done.returncode, lines)
    assert next(line for line in lines if "waiting at" not in line).startswith("pyhv: "), lines
    assert len(lines) <= 2 and "Traceback" not in done.stderr.decode()
    assert not os.path.exists("/tmp/pyhv-nobody")


class Slow:
    """Between source and target: passes the HELLO on and a little of the first PAGES, then nothing until `go`."""

    def __init__(self, at: str, to: str) -> None:
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(at)
        self.door.listen(1)
        self.stuck, self.go = threading.Event(), threading.Event()
        self.to = to
        self.threads = [threading.Thread(target=self._run)]
        self.threads[0].start()

    def _run(self) -> None:
        ours, _ = self.door.accept()
        theirs = socket.socket(socket.AF_UNIX)
        theirs.connect(self.to)

        def back() -> None:
            try:
                while data := theirs.recv(1 << 16):
                    ours.sendall(data)
                ours.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        self.threads.append(threading.Thread(target=back))
        self.threads[1].start()
        try:
            head = ours.recv(16, socket.MSG_WAITALL)
            left = wire._HEADER.unpack(head)[1] + 100
            theirs.sendall(head)
            while left and (data := ours.recv(left)):
                left -= len(data)
                theirs.sendall(data)
            self.stuck.set()
            self.go.wait(30)
            while data := ours.recv(1 << 16):
                theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        self.threads[1].join(30)
        ours.close()
        theirs.close()

    def close(self) -> None:
        self.go.set()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        self.door.close()


@pytest.mark.parametrize("who", ["target", "source", "client"])
def test_one_is_killed_in_the_middle(tmp_path, image, who):
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    target = receiver(f"unix:{tmp_path}/far", "--name", f"{PREFIX}-far", tmp=tmp)
    slow = Slow(f"{tmp_path}/near", f"{tmp_path}/far")
    sender = None
    try:
        vm = Vm("killed", image, "--boot-protocol", "flat", "--memory", "16M")
        try:
            sender = subprocess.Popen([*PYHV, "migrate", "send", vm.name, f"unix:{tmp_path}/near"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            assert slow.stuck.wait(20)
            {"target": target, "source": vm.process, "client": sender}[who].kill()
            time.sleep(0.1)
            slow.go.set()
            _, said = sender.communicate(timeout=60)
            assert b"Traceback" not in said
            if who != "client":
                assert sender.returncode == 1, said
            if who == "source":
                _, told = target.communicate(timeout=60)
                assert target.returncode == 1 and len(told.splitlines()) == 1 and told.startswith(b"pyhv: "), told
            else:
                with vm.line() as line:         # it goes on here
                    state, deadline = "", time.monotonic() + 20
                    while state != "running" and time.monotonic() < deadline:
                        state = line.ask("status")["state"]
                    printed = line.ask("stats")["console"]["printed"]
                    while line.ask("stats")["console"]["printed"] == printed:
                        assert time.monotonic() < deadline
                if who == "client":
                    _, told = target.communicate(timeout=60)
                    assert target.returncode == 1 and b"the other side says: aborted" in told, told
            assert not [name for name in os.listdir(tmp) if who != "target"]
        finally:
            if who == "source":
                vm.process.wait(20)
                assert vm.process.stderr is not None
                vm.process.stderr.close()
                pyhv("vm", "ls")            # sweeps its socket
            else:
                vm.__exit__()
    finally:
        slow.close()
        end(target)
        if sender is not None:
            end(sender)
