"""Real Linux kernels, built from the distribution's source, to a shell that answers, and off again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from framework.linux import Shell, initrd, kernel, skip_without_build_tools
from framework.run import needs_kvm, pyhv

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def micro() -> Path:
    skip_without_build_tools()
    return kernel("micro")


@pytest.fixture(scope="module")
def smp() -> Path:
    skip_without_build_tools()
    return kernel("smp")


@pytest.mark.parametrize(("image", "protocol"), [
    ("vmlinux", None), ("vmlinux", "pvh"), ("bzImage", None), ("bzImage", "pvh"),
])
def test_micro_boots_to_a_shell_and_powers_off(micro: Path, image: str, protocol: str | None) -> None:
    with Shell(micro / image, memory=128 << 20, boot_protocol=protocol, timeout=120).booted() as shell:
        assert "x86_64 GNU/Linux" in shell.run("uname -a")
        assert "42\n" in shell.run("echo $((6 * 7))")
        assert shell.run("false").endswith("END 1\npyhv# ") or "END 1" in shell.run("false")
        assert shell.power_off() in ("poweroff", "halt", "reset")


def test_pasting_64_kib_into_the_shell_loses_nothing(micro: Path) -> None:
    lines = b"".join(b"%06d the quick brown fox jumps over the lazy dog, again and again\n" % n for n in range(970))
    assert len(lines) > 65000
    with Shell(micro / "vmlinux", memory=128 << 20, timeout=240).booted() as shell:
        shell.run("stty -echo")
        shell.machine.console.send(b"cat > /tmp/pasted; md5sum /tmp/pasted\n" + lines + b"\x04")
        shell.wait_for(hashlib.md5(lines).hexdigest().encode(), 150)


def test_reboot_and_panic_and_debug_are_told_apart(micro: Path) -> None:
    with Shell(micro / "vmlinux", memory=128 << 20, timeout=120).booted() as shell:
        shell.machine.console.send(b"reboot -f\n")
        outcome = shell.machine.wait(60)
        assert outcome is not None and (outcome.reason, outcome.code) == ("reset", 0)
    with Shell(micro / "vmlinux", memory=128 << 20, timeout=120, cmdline="rdinit=/no/init root=nothing") as shell:
        outcome = shell.machine.wait(90)
        assert outcome is not None and (outcome.reason, outcome.code) == ("crash", 134), outcome


def test_smp_four_processors(smp: Path) -> None:
    with Shell(smp / "bzImage", memory=256 << 20, cpus=4, timeout=240) as shell:
        shell.wait_for(b"smp: Brought up 1 node, 4 CPUs", 120)
        shell.wait_for(b"pyhv# ", 150)
        assert "4\n" in shell.run("nproc")
        assert "4\n" in shell.run("grep -c ^processor /proc/cpuinfo")
        assert shell.power_off() == "poweroff"              # by ACPI


def test_smp_kernel_by_pvh_on_two_processors(smp: Path) -> None:
    with Shell(smp / "vmlinux", memory=256 << 20, cpus=2, boot_protocol="pvh", timeout=240) as shell:
        shell.wait_for(b"pyhv# ", 150)
        assert "2\n" in shell.run("nproc")
        assert shell.power_off() == "poweroff"


def test_command_reports_phases_profile_and_share(micro: Path, tmp_path: Path) -> None:
    archive, report = tmp_path / "initrd", tmp_path / "report.json"
    archive.write_bytes(initrd())
    done = pyhv("boot", str(micro / "vmlinux"), "--initrd", str(archive), "--json", str(report), "--profile", "--stats",
                "--timeout", "100", stdin=b"reboot -f\n", timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    data = json.loads(report.read_text())
    assert data["phases"]["first_entry"] < data["phases"]["run_init"] < data["phases"]["end"]
    assert data["share_outside"] < 0.10
    profile = done.stderr.decode()
    assert re.search(r"\d+\.\d%\s+\d+  [a-z_]+", profile), profile      # symbols resolved
    if b"software KVM" in done.stderr:
        assert data["softkvm"]["syscall"] > 10
        assert "noxsave" in data["cmdline"] and "clearcpuid=" in profile       # printed, too


def test_kernel_list_and_again(micro: Path) -> None:
    done = pyhv("kernel", "list")
    assert done.returncode == 0
    assert str(micro / "vmlinux") in done.stdout.decode() and str(micro / "bzImage") in done.stdout.decode()
    assert kernel("micro") == micro             # found, not built again
