"""Moments of a run, for those who measure it.

    PYHV_PHASES=FILE pyhv run ...       FILE gets lines `NAME NANOSECONDS`, of CLOCK_MONOTONIC (man 2 clock_gettime)

    command     pyhv has begun                          made        its program runs, or the guest has it running
    rootfs      the root file system is assembled       restored    a VM: its guest goes on from the template
    network     its namespace and cards are there       answered    a VM: the agent has told that all is set up
    config      config.json is written

Without the variable a moment costs a look into the environment. Driven by tests/root/test_bench_run.py.
"""

from __future__ import annotations

__all__ = ["mark"]

import os
from time import monotonic_ns


def mark(name: str) -> None:
    """It is now. Nothing where nobody asked, or the file can't be written."""
    path = os.environ.get("PYHV_PHASES")
    if not path:
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        os.write(fd, f"{name} {monotonic_ns()}\n".encode())
    except OSError:
        pass
    finally:
        os.close(fd)
