"""A real Linux under `pyhv vm`: its console, its time while it is paused, its power button."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from framework.linux import initrd, kernel
from framework.run import needs_kvm, pyhv
from framework.terminal import OnTerminal
from framework.vm import Vm

pytestmark = [needs_kvm, pytest.mark.timeout(600)]


class Shell:
    """The shell of a Linux VM, at its console by the control socket."""

    def __init__(self, vm: Vm) -> None:
        self.line = vm.line()
        self.line.socket.settimeout(90)
        self.line.ask("console", history=1 << 20)
        self.line.wait_for(b"pyhv# ", 90)

    def run(self, command: str) -> str:
        self.line.send(b"echo B''EGIN; " + command.encode() + b"; echo E''ND\n")
        text = self.line.wait_for(b"END\r\n", 60)
        self.line.wait_for(b"pyhv# ", 60)
        return text.replace(b"\r", b"").partition(b"BEGIN\n")[2].removesuffix(b"END\n").decode()


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vm, Shell]]:
    """Two processors, ACPI, a shell."""
    image = tmp_path_factory.mktemp("linux") / "rd.cpio"
    image.write_bytes(initrd())
    with Vm("linux", str(kernel("smp") / "vmlinux"), "--initrd", str(image), "--cpus", "2", "--rng") as vm:
        shell = Shell(vm)
        shell.run("dmesg -n 1")         # no kernel message in between what commands print
        yield vm, shell
        shell.line.socket.close()


def test_time_stands_still_in_a_paused_linux(linux: tuple[Vm, Shell]) -> None:
    vm, shell = linux
    clocks = "cat /proc/uptime; date +%s; cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
    host = time.monotonic()
    uptime, date, source = shell.run(clocks).splitlines()
    with vm.line() as line:
        assert line.ask("pause")["state"] == "paused"
        before = line.ask("stats")
        time.sleep(6)
        after = line.ask("stats")
        for vcpu, later in zip(before["vcpus"], after["vcpus"], strict=True):
            assert later["cpu_seconds"] - vcpu["cpu_seconds"] < 0.001       # its thread went to sleep
        assert before["softkvm"] == after["softkvm"] and before["console"] == after["console"]
        assert line.ask("resume")["state"] == "running"
    uptime_after, date_after, source_after = shell.run(clocks).splitlines()
    passed = time.monotonic() - host
    assert 0 < float(uptime_after.split()[0]) - float(uptime.split()[0]) < passed - 5.5, (uptime, uptime_after, passed)
    assert 0 <= int(date_after) - int(date) < passed - 4.5
    assert source_after == source       # no clock was found to be unreliable
    for _ in range(3):
        with vm.line() as line:
            line.ask("pause")
            line.ask("resume")
    assert shell.run("dmesg | grep -ciE 'stall|lockup|unstable|watchdog: BUG|time jumped'").strip() == "0"


def test_a_sleep_is_as_long_as_its_pause_makes_it(linux: tuple[Vm, Shell]) -> None:
    vm, shell = linux
    start = time.monotonic()
    shell.line.send(b"sleep 2; echo wo''ke\n")
    with vm.line() as line:
        time.sleep(0.5)
        line.ask("pause")
        time.sleep(3)
        line.ask("resume")
    shell.line.wait_for(b"woke", 30)
    assert time.monotonic() - start > 4.9
    shell.line.wait_for(b"pyhv# ")


def test_the_shell_of_a_linux_on_a_terminal(linux: tuple[Vm, Shell]) -> None:
    vm, _ = linux
    with OnTerminal("vm", "console", vm.name) as run:
        run.wait_for(b"pyhv# ")
        run.type(b"expr 6 '*' 7; cat /proc/cpuinfo | grep -c ^processor\r")
        run.wait_for(b"42\r\n2\r\n", 30)
        run.type(b"\x01d")
        assert run.end() == 0


def test_a_linux_shuts_down_by_its_power_button(linux: tuple[Vm, Shell]) -> None:
    """This kernel has no button driver: a loop looks at PWRBTN_STS (ACPI 6.4, 4.8.3.1), as one would."""
    vm, shell = linux
    assert "ACPI PM1a_EVT_BLK" in shell.run("grep 0600-0603 /proc/ioports")
    shell.line.send(b"until dd if=/dev/port bs=1 skip=$((0x601)) count=1 2>/dev/null | grep -q $(printf '\\001'); do "
                    b"sleep 0.2; done; echo down''now; poweroff -f\n")
    time.sleep(0.5)
    done = pyhv("vm", "stop", vm.name, "--timeout", "60", timeout=90)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"downnow" in shell.line.wait_for(b"downnow")
    assert vm.end(5) == 0
