"""The command line: bad input gets one clear line and the right exit code, good input what was asked for."""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from framework.elfwriter import bzimage, elf
from framework.run import PYHV, ROOT, needs_kvm, no_traceback, pyhv

HV = str(ROOT)


def one_line(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The run failed as it should: nothing on standard output, one line on standard error."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("pyhv: "), text
    return lines[0]


@needs_kvm
@pytest.mark.parametrize(("options", "hint"), [
    (("--memory", "0"), "--memory"),
    (("--memory", "1M"), "memory"),
    (("--memory", "100T"), "memory"),
    (("--memory", "many"), "memory"),
    (("--memory", "-5M"), "memory"),
    (("--cpus", "0"), "cpus"),
    (("--cpus", "65"), "cpus"),
    (("--cpus", "100000"), "cpus"),
    (("--cpus", "two"), "cpus"),
    (("--timeout", "-1"), "timeout"),
    (("--timeout", "soon"), "timeout"),
    (("--boot-protocol", "efi"), "protocol"),
    (("--backing", "tape"), "backing"),
    (("--hugepages", "3M"), "huge"),
    (("--softkvm", "perhaps"), "softkvm"),
    (("--debug-exit=99999",), "debug"),
    (("--debug-exit=here",), "debug-exit"),
    (("--trace", "everything"), "trace"),
    (("--profile=0",), "profile"),
    (("--no-such-option",), "--no-such-option"),
    (("--memory",), "--memory"),
    (("--log", "/no/such/folder/log"), "--log"),
    (("--json", "/no/such/folder/json"), "--json"),
    (("--symbols", "/no/such/file", "--trace", "io"), "/no/such/file"),
])
def test_bad_options(options: tuple[str, ...], hint: str) -> None:
    done = pyhv("boot", "guest:tiny", "--quiet", *options)
    assert done.returncode == 2, done.stderr.decode()
    assert hint.strip("-").lower() in one_line(done, 2).lower()


@needs_kvm
@pytest.mark.parametrize(("name", "content"), [
    ("empty", b""),
    ("one byte", b"\x7f"),
    ("text", b"this is no kernel\n" * 100),
    ("random", bytes((at * 7919 + at // 256) % 251 for at in range(70000))),
    ("truncated elf", elf()[:70]),
    ("arm64", elf(machine=183)),
    ("elf32 without multiboot", elf(bits=32)),
    ("big endian", elf(order=2)),
    ("segment outside RAM", elf([(1 << 40, b"x", None)])),
    ("segment that wraps", elf([((1 << 64) - 4096, b"x" * 8192, None)])),
    ("huge segment", elf([(0x100000, b"x", 1 << 62)])),
    ("segment on the boot data", elf([(0x7000, b"x" * 64, None)])),
    ("entry outside", elf(entry=0x5000000)),
    ("bzImage without payload", bzimage(b"")),
    ("bzImage of garbage", bzimage(gzip.compress(b"garbage" * 1000))),
    ("32-bit bzImage", bzimage(gzip.compress(elf()), xloadflags=0)),
    ("payload that lies", bzimage(gzip.compress(elf())[:-4] + b"\xff\xff\xff\x7f")),
    ("payload beyond the file", bzimage(gzip.compress(elf()), payload_length=1 << 30)),
])
def test_bad_kernels(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    one_line(pyhv("boot", str(path), "--quiet", "--timeout", "5"), 1)


@needs_kvm
@pytest.mark.parametrize("path", ["/no/such/kernel", "/", "/etc", "/dev/null", "/proc/self/mem"])
def test_paths_that_are_no_kernels(path: str) -> None:
    one_line(pyhv("boot", path), 1)


@needs_kvm
def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    one_line(pyhv("boot", str(tmp_path / "fifo"), timeout=10), 1)


@needs_kvm
def test_initrd_that_does_not_fit(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(elf())
    with initrd.open("wb") as file:
        file.truncate(200 << 20)
    line = one_line(pyhv("boot", str(kernel), "--initrd", str(initrd), "--quiet"), 1)
    assert "--memory" in line


@needs_kvm
def test_command_line_that_is_too_long(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf([(0x100000, b"\xf4" * 16 + b"Linux version 6", None)]))      # which takes 2047
    line = one_line(pyhv("boot", str(kernel), "--softkvm", "off", "--cmdline", "x" * 2048, "--quiet"), 2)
    assert "command line" in line


@needs_kvm
def test_more_memory_than_the_host_has() -> None:
    line = one_line(pyhv("boot", "guest:tiny", "--memory", "900G", "--prefault", "--quiet"), 2)
    assert "memory" in line.lower()


def test_unknown_command_and_help() -> None:
    done = pyhv("bote")
    assert done.returncode == 2 and b"boot" in done.stderr + done.stdout
    no_traceback(done)
    for arguments in (["--help"], ["boot", "--help"], ["kernel", "--help"], ["doctor", "--help"], ["bench", "--help"]):
        done = pyhv(*arguments)
        assert done.returncode == 0 and b"Usage: pyhv" in done.stdout
    assert pyhv("--version").stdout.startswith(b"pyhv")


def test_reader_of_help_goes_away() -> None:
    done = subprocess.run(["bash", "-c", f"{' '.join(PYHV)} boot --help | head -1"], capture_output=True, timeout=30,
                          check=False)
    no_traceback(done)


# doctor -------------------------------------------------------------------------------------------


@needs_kvm
def test_doctor_says_vms_can_run() -> None:
    done = pyhv("doctor")
    assert done.returncode == 0, done.stdout.decode()
    text = done.stdout.decode()
    for word in ("/dev/kvm", "API", "ring", "TUN", "cgroup", "overlayfs", "memory", "user namespaces"):
        assert word.lower() in text.lower(), word
    data = json.loads(pyhv("doctor", "--json").stdout)
    assert data["vms"] is True
    assert {check["status"] for check in data["checks"]} <= {"ok", "warn", "fail"}


def run_without_kvm(setup: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """pyhv in a mount namespace of its own, after `setup` has changed /dev there."""
    if os.geteuid():
        pytest.skip("needs root for a mount namespace")
    command = f"{setup}; exec {' '.join(PYHV)} {' '.join(arguments)}"
    return subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, timeout=60, check=False)


NO_DEVICE = "mkdir -p /run/pyhv-test-dev && mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"


@needs_kvm
def test_without_the_device() -> None:
    done = run_without_kvm(NO_DEVICE, "boot", "guest:tiny", "--quiet")
    assert "/dev/kvm" in one_line(done, 1)
    done = run_without_kvm(NO_DEVICE, "doctor")
    assert done.returncode == 1
    assert b"/dev/kvm" in done.stdout
    no_traceback(done)
    data = json.loads(run_without_kvm(NO_DEVICE, "doctor", "--json").stdout)
    assert data["vms"] is False


AS_NOBODY = """
import os, sys
sys.path.insert(0, "ROOT")
import json
from hv.cli.doctor import doctor
from hv.cli.main import main
from hv.guests import path
path("tiny")
import hv.machine.builder, hv.machine.platform, hv.boot.load, hv.kvm.vm, hv.cli.terminal, hv.cli.boot
os.setegid(65534); os.seteuid(65534)
code = main(["boot", "guest:tiny", "--quiet"])
print("boot", code)
print("doctor", doctor(False))
"""


@needs_kvm
def test_without_permission() -> None:
    """As nobody, in front of a /dev/kvm that is root's; the modules are loaded before, as only root may read them."""
    setup = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 600 /dev/kvm c 10 232"
    code = AS_NOBODY.replace("ROOT", HV)
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"{setup}; exec {sys.executable} -c '{code}'"],
                          capture_output=True, timeout=60, check=False)
    no_traceback(done)
    assert b"boot 1\n" in done.stdout and b"doctor 1\n" in done.stdout, (done.stdout, done.stderr)
    error = done.stderr.decode().strip()
    assert error.startswith("pyhv: ") and "/dev/kvm" in error and "group" in error, error
    assert b"/dev/kvm" in done.stdout and b"group" in done.stdout


def test_doctor_checks_do_not_need_kvm() -> None:
    done = run_without_kvm(NO_DEVICE, "doctor", "--json")
    areas = {check["area"] for check in json.loads(done.stdout)["checks"]}
    assert len(areas) >= 2


# what the boot path loads -------------------------------------------------------------------------


def test_import_hv_is_nearly_free() -> None:
    code = "import sys; before = set(sys.modules); import hv; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(ast.literal_eval(done.stdout)) <= {"hv", "__future__"}
