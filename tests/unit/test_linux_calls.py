"""The light door to system calls, and what is built on it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from framework.run import ROOT

from hv.errors import KernelError
from hv.linux import creds, ns
from hv.linux.syscall import buffer, syscall, try_syscall


def test_results_and_errors() -> None:
    assert syscall("getpid", 39) == os.getpid()
    place = buffer(4096)
    length = syscall("getcwd", 79, place, 4096)
    assert place.raw[:length] == os.getcwdb() + b"\0"
    assert try_syscall(3, 1 << 20) == -errno.EBADF
    with pytest.raises(KernelError, match="close: EBADF") as caught:
        syscall("close", 3, 1 << 20, hint="do this")
    assert caught.value.hint == "do this" and caught.value.errno == errno.EBADF


def test_negative_numbers_and_bytes() -> None:
    fd = syscall("openat", 257, -100, b"/dev/null\0", os.O_RDWR | os.O_CLOEXEC)     # AT_FDCWD
    try:
        assert syscall("write", 1, fd, b"abc", 3) == 3
    finally:
        os.close(fd)


def test_no_ctypes_package() -> None:
    code = ("import sys; sys.path.insert(0, '.'); import hv.linux.ns, hv.linux.mount, hv.linux.creds\n"
            "print('ctypes' in sys.modules)")
    done = subprocess.run([sys.executable, "-ISE", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_capabilities_read_back() -> None:
    effective, permitted, inheritable = creds.capability_sets()
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file if line.startswith("Cap"))
    shown = tuple(int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh"))
    assert (effective, permitted, inheritable) == shown
    creds.set_capabilities(effective, permitted, inheritable)
    assert creds.CAPABILITIES[creds.last_capability()] in ("CAP_CHECKPOINT_RESTORE", "CAP_BPF")
    header, data = creds.capability_data(1 << 40 | 5, 7, 9)
    assert header == bytes.fromhex("2205082000000000")      # _LINUX_CAPABILITY_VERSION_3, this process
    assert data[:12] == b"\5\0\0\0\7\0\0\0\t\0\0\0" and data[12:16] == (1 << 8).to_bytes(4, "little")


def test_a_clone_is_a_child() -> None:
    code = ("import os, sys; sys.path.insert(0, '.'); from hv.linux import ns; pid = ns.clone(0)\n"
            "if not pid: os._exit(7)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ns.single_threaded())")
    done = subprocess.run([sys.executable, "-ISE", "-c", code], capture_output=True, text=True, check=True, timeout=20,
                          cwd=ROOT)
    assert done.stdout == "7 True\n"


def test_a_process_with_threads_is_told_from_one_without() -> None:
    code = ("import sys, threading; sys.path.insert(0, '.'); from hv.linux import ns; end = threading.Event()\n"
            "threading.Thread(target=end.wait).start(); print(ns.single_threaded()); end.set()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20,
                          cwd=ROOT)
    assert done.stdout == "False\n"


def test_pidfds() -> None:
    child = subprocess.Popen(["sleep", "100"])
    fd = ns.pidfd_open(child.pid)
    assert not os.get_inheritable(fd)
    ns.pidfd_send_signal(fd, 9)
    assert child.wait(10) == -9
    with pytest.raises(KernelError, match="ESRCH"):
        ns.pidfd_send_signal(fd, 9)
    os.close(fd)


def test_limits() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    creds.set_limit(resource.RLIMIT_CORE, 0, hard)
    try:
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, hard)
    finally:
        creds.set_limit(resource.RLIMIT_CORE, soft, hard)
