"""The console device in a real Linux guest: hvc0 for the shell, ports as sockets and files, the terminal's size."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, initrd, kernel, skip_without_build_tools
from framework.run import needs_kvm
from framework.terminal import OnTerminal

from hv.devices.virtio.console_config import ConsoleConfig

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

MIB = 1 << 20


class Guest(Shell):
    """A guest whose only console is hvc0, with two ports more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        console = ConsoleConfig(True, (f"agent,socket={folder}/agent", f"log,file={folder}/log"))
        super().__init__(kernel("micro") / "vmlinux", devices=(console,), timeout=600)
        self.machine.console.resize(111, 37)

    def begin(self, command: str) -> None:
        """Type a command, to be waited for by `end`."""
        self.machine.console.send(command.encode() + b"; echo E''ND $?\n")

    def end(self, *expected: bytes, timeout: float = 120) -> None:
        for text in (*expected, b"END 0\r\n", b"pyhv# "):
            self.wait_for(text, timeout)

    def client(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(60)
        made.connect(f"{self.folder}/agent")
        return made


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    skip_without_build_tools()
    with Guest(tmp_path_factory.mktemp("console")) as guest:
        guest.booted()
        yield guest
        device = guest.machine.devices["console0"]
        assert device.driven and not device.faults, device.fault_texts


def test_kernel_messages_and_shell_are_on_hvc0(guest: Guest) -> None:
    output = bytes(guest.machine.console.output)
    assert output.count(b"Linux version") == 1      # by the serial port, before hvc0 was there
    assert output.count(b"console [hvc0] enabled") == 1 and output.count(b"Run /init") == 1
    assert guest.run("tty; cat /sys/class/tty/console/active").split()[:2] == ["/dev/hvc0", "hvc0"]


def test_size_at_first_and_when_it_changes(guest: Guest) -> None:
    assert guest.run("stty size").startswith("37 111\n")
    guest.machine.console.resize(95, 29)
    assert guest.run("sleep 0.2; stty size").startswith("29 95\n")


def test_ports_have_their_names(guest: Guest) -> None:
    assert guest.run("cd /sys/class/virtio-ports; cat vport0p1/name vport0p2/name; ls /dev/vport*; cd").split()[:5] == [
        "agent", "log", "/dev/vport0p0", "/dev/vport0p1", "/dev/vport0p2"]


def test_a_mebibyte_both_ways(guest: Guest) -> None:
    data = os.urandom(MIB)
    with guest.client() as client:
        guest.begin(f"head -c {MIB} < /dev/vport0p1 > /tmp/data; md5sum /tmp/data")
        client.sendall(data)
        guest.end(hashlib.md5(data).hexdigest().encode())
        guest.begin("cat /tmp/data > /dev/vport0p1; rm /tmp/data")
        seen = b""
        while len(seen) < MIB:
            time.sleep(0.01)        # a client slower than the guest, at first
            part = client.recv(16 << 10)
            assert part
            seen += part
        assert seen == data
        guest.end()


def test_a_client_goes_away_and_comes_back(guest: Guest) -> None:
    for turn in range(2):
        with guest.client() as client:
            client.sendall(b"turn %d\n" % turn)
            guest.begin("cat /dev/vport0p1")
            guest.wait_for(b"\nturn %d\r\n" % turn)
        guest.end()         # there is no more to read
    with guest.client() as client:
        guest.run("echo still there > /dev/vport0p1")
        assert client.recv(100) == b"still there\n"


def test_a_file_gets_what_the_guest_writes(guest: Guest) -> None:
    assert guest.run("for i in 1 2 3; do echo line $i; done > /dev/vport0p2").startswith("END 0")
    assert (guest.folder / "log").read_text() == "line 1\nline 2\nline 3\n"


def test_64_kib_pasted_lose_nothing(guest: Guest) -> None:
    data = b"".join(b"%07d\n" % number for number in range(8192))
    guest.begin("stty raw -echo; echo rea''dy; head -c 65536 | md5sum; stty sane")
    guest.wait_for(b"ready\n")
    guest.machine.console.send(data)
    guest.end(hashlib.md5(data).hexdigest().encode())


def test_an_idle_console_does_nothing(guest: Guest) -> None:
    device = guest.machine.devices["console0"]
    calls: list[int] = []
    notified = device.notified
    with guest.client():
        guest.run("true")
        device.notified = lambda index: (calls.append(index), notified(index))[1]       # type: ignore[method-assign]
        (_, thread), = guest.machine.io_threads
        wakes: list[float] = []
        step = thread.loop._step
        thread.loop._step = lambda end: (wakes.append(time.monotonic()), step(end))[1]  # type: ignore[method-assign]
        time.sleep(3)
        del device.notified, thread.loop._step
    assert not calls and len(wakes) <= 1


def test_on_a_terminal_the_size_follows(tmp_path: Path) -> None:
    """As the command has it: ports on a device of their own, the size by the console's configuration space."""
    (tmp_path / "initrd").write_bytes(initrd())
    with OnTerminal("boot", str(kernel("micro") / "vmlinux"), "--initrd", f"{tmp_path}/initrd", "--console", "virtio",
                    "--port", f"log,file={tmp_path}/log", "--timeout", "300", size=(41, 123)) as run:
        run.wait_for(b"pyhv# ", timeout=200)
        assert b"unable to open an initial console" not in run.output
        run.type(b"stty size\r")
        run.wait_for(b"41 123\r\n", timeout=60)
        run.resize(30, 90)
        run.type(b"sleep 0.3; stty size\r")
        run.wait_for(b"30 90\r\n", timeout=60)
        run.type(b"cd /sys/class/virtio-ports; grep -l log */name; echo hello > /dev/vport1p1; echo writ''ten\r")
        run.wait_for(b"vport1p1/name", timeout=60)
        run.wait_for(b"written", timeout=60)
        assert (tmp_path / "log").read_bytes() == b"hello\n"
        run.type(b"\x01x")
        assert run.end() == 0
