"""Running the `pyhv` command as a user does: a process of its own, bounded, its output collected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYHV = [sys.executable, "-ISE", str(ROOT / "bin" / "pyhv")]     # what its first lines, a shell script, end in

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm can't be opened here")


Done = subprocess.CompletedProcess[bytes]


def pyhv(*arguments: str, stdin: bytes = b"", timeout: float = 60, **options: object) -> Done:
    """Run `pyhv ARGUMENTS` to its end; output as bytes. A hang is a failure after `timeout` seconds."""
    return subprocess.run([*PYHV, *arguments], input=stdin, capture_output=True, timeout=timeout, check=False,
                          **options)  # type: ignore[call-overload, no-any-return]


def boot(kernel: str, *options: str, stdin: bytes = b"", timeout: float = 60) -> Done:
    """`pyhv boot KERNEL OPTIONS`, the guest bounded a little tighter than the process."""
    limit = () if any(option.startswith("--timeout") for option in options) else ("--timeout", str(timeout - 5))
    return pyhv("boot", kernel, *limit, *options, stdin=stdin, timeout=timeout)


def no_traceback(done: Done) -> None:
    """A traceback is a bug, whatever the input."""
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
