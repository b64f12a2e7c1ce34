"""The last program: its bytes are its source, and it does what the table says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from framework.run import ROOT

from hv.container import stub


@pytest.mark.skipif(shutil.which("as") is None, reason="no assembler here (binutils)")
def test_the_bytes_are_the_source(tmp_path: Path) -> None:
    listing = tmp_path / "stub.o"
    subprocess.run(["as", str(ROOT / "hv/container/stub.S"), "-o", str(listing)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(listing), str(tmp_path / "stub.bin")], check=True)
    assert (tmp_path / "stub.bin").read_bytes() == stub.CODE


def run(code: str) -> subprocess.CompletedProcess[bytes]:
    head = ("import os, sys; sys.path.insert(0, '.'); from hv.container import stub\n"
            "from hv.container.stub import Steps, become\n")
    return subprocess.run([sys.executable, "-ISE", "-c", head + code], capture_output=True, timeout=20, check=False,
                          cwd=ROOT)


def test_runs_a_program_with_its_arguments_and_environment() -> None:
    done = run("s = Steps(2)\n"
               "s.add(stub.EXEC, 59, b'/bin/sh', [b'sh', b'-c', b'echo $0 $1 $X; exit 5', b'', b'two'], [b'X=y z'])\n"
               "become(s)")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"two y z\n", b"")


def test_reports_the_step_and_the_error() -> None:
    done = run("s = Steps(2); s.add(stub.KEEP, 39); s.add(stub.EXEC, 59, b'/nonexistent', [b'x'], [])\nbecome(s)")
    assert done.returncode == 1
    assert stub.explain(done.stderr, "prog") == 'exec: "prog": no such file or directory'
    done = run("s = Steps(2); s.add(stub.FILTER, 317, 77, 0, 0)\nbecome(s)")
    assert stub.explain(done.stderr, "prog") == "linux.seccomp: Invalid argument"


def test_its_file_cannot_be_written() -> None:
    child = subprocess.Popen([sys.executable, "-ISE", "-c",
                              "import sys; sys.path.insert(0, '.'); from hv.container import stub\n"
                              "s = stub.Steps(2); s.add(stub.WAIT, 34); stub.become(s)"], cwd=ROOT)     # 34: pause
    try:
        for _ in range(1000):
            if "memfd:pyhv-init" in os.readlink(f"/proc/{child.pid}/exe"):
                break
            time.sleep(0.01)
        assert "memfd:pyhv-init" in os.readlink(f"/proc/{child.pid}/exe")
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with pytest.raises(OSError):
                fd = os.open(f"/proc/{child.pid}/exe", flags)
                try:
                    os.write(fd, b"x")
                finally:
                    os.close(fd)
        assert os.open(f"/proc/{child.pid}/exe", os.O_RDONLY) >= 0
    finally:
        child.kill()
        child.wait()


def test_a_second_run_of_itself_ends_at_once() -> None:
    done = run("r, w = os.pipe(); s = Steps(w); s.add(stub.KEEP, 72, w, 2, 1)\n"       # F_SETFD, FD_CLOEXEC
               "s.add(stub.EXEC, 59, b'/proc/self/exe', [b'x'], []); os.set_inheritable(w, True)\nbecome(s)")
    assert done.returncode == 1
