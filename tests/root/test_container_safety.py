"""What the field's CVEs taught: each attack from inside, tried."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle  # a fixture

from hv.linux.creds import CAPABILITIES

pytestmark = container

CAPS = ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_FOWNER"]
ALL = list(CAPABILITIES)
_IDS = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
MAPS = {"uidMappings": _IDS, "gidMappings": _IDS}


def interpreter() -> str:
    return os.path.realpath(sys.executable)


@pytest.fixture
def unharmed() -> object:
    before = hashlib.sha256(Path(interpreter()).read_bytes()).hexdigest()
    yield None
    assert hashlib.sha256(Path(interpreter()).read_bytes()).hexdigest() == before


def test_the_runtime_as_the_program(bundle: Bundle, unharmed: object) -> None:
    """CVE-2019-5736: /proc/self/exe is the runtime until the program runs."""
    for path in ("/proc/self/exe", "/tmp/link", "/tmp/script"):
        (bundle.rootfs / "tmp/link").unlink(missing_ok=True)
        (bundle.rootfs / "tmp/link").symlink_to("/proc/self/exe")
        (bundle.rootfs / "tmp/script").write_text("#!/proc/self/exe\n")
        (bundle.rootfs / "tmp/script").chmod(0o755)
        done = bundle.run(path, "-c", "print('python ran')")
        assert done.returncode == 1 and "runtime itself" in done.stderr and "python ran" not in done.stdout, path


def test_the_runtime_as_an_interpreter_that_is_swapped_in(bundle: Bundle, unharmed: object) -> None:
    """The check at create is passed, then the program is replaced: the sealed stub is what is run, and it ends."""
    program = bundle.rootfs / "tmp/program"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    assert bundle.create("/tmp/program").returncode == 0
    program.write_text("#!/proc/self/exe\n")
    assert bundle.call("start", bundle.name).returncode in (0, 1)
    end = time.monotonic() + 5
    while bundle.status() != "stopped" and time.monotonic() < end:
        time.sleep(0.05)
    assert bundle.status() == "stopped"


def test_a_created_containers_binary_is_sealed(bundle: Bundle, unharmed: object) -> None:
    bundle.create("true")
    exe = f"/proc/{bundle.pid()}/exe"
    assert "memfd:pyhv-init" in os.readlink(exe)
    with pytest.raises(OSError):
        fd = os.open(exe, os.O_WRONLY)
        try:
            os.write(fd, b"x")
        finally:
            os.close(fd)


WATCH = ("while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] && continue; [ $p = /proc/$$ ] && continue; "
         "e=$(readlink $p/exe) && echo \"$e\" >>/tmp/seen; ls $p/fd >/dev/null 2>&1 && ls -l $p/fd >>/tmp/fds; "
         "(echo x >>$p/exe) 2>/dev/null; done; done")


def watched(bundle: Bundle, caps: list[str], *, userns: str = "", runtime: list[str] | None = None) -> str:
    """What a container with `caps` sees in /proc of another one that is made in its pid (and user) namespace."""
    bundle.config["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), caps)
    bundle.config["root"]["readonly"] = False
    if userns == "joined":
        bundle.config["linux"]["namespaces"].append({"type": "user"})
        bundle.config["linux"] |= MAPS
        (bundle.rootfs / "tmp").chmod(0o777)
    bundle.create("sh", "-c", WATCH)
    bundle.call("start", bundle.name)
    first = bundle.pid()
    shared = {"pid", "user"} if userns == "joined" else {"pid"}
    (bundle.folder / "other").mkdir()
    with Bundle(bundle.folder / "other", name=f"{bundle.name}-2") as other:
        other.state = bundle.state
        other.config["linux"]["namespaces"] = [
            row for row in other.config["linux"]["namespaces"] if row["type"] not in shared] + [
            {"type": kind, "path": f"/proc/{first}/ns/{kind}"} for kind in sorted(shared)]
        if userns:
            other.config["linux"]["namespaces"].append({"type": "time"})
            other.config["linux"]["timeOffsets"] = {"boottime": {"secs": 1}}
        if userns == "new":             # in which the pid namespace's /proc can't be mounted
            other.config["linux"]["namespaces"].append({"type": "user"})
            other.config["linux"] |= MAPS
            other.config["mounts"] = [row for row in other.config["mounts"] if row["destination"] != "/proc"]
        for _ in range(2 if runtime else 5):
            done = other.run("sleep", "0.05", runtime=runtime)
            assert done.returncode == 0, done.stderr
    bundle.call("kill", bundle.name, "KILL")
    return "".join(path.read_text(errors="replace") for path in sorted((bundle.rootfs / "tmp").iterdir()))


def test_from_a_shared_pid_namespace_nothing_of_the_host_is_reached(bundle: Bundle, unharmed: object) -> None:
    """A container with all that it takes watches the pid namespace while another is created in it."""
    seen = watched(bundle, [word for word in CAPS if word != "CAP_SYS_PTRACE"])
    assert interpreter() not in seen and "python" not in seen
    assert str(bundle.state) not in seen and "config.json" not in seen


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize(("userns", "caps"), [
    ("joined", ALL), ("new", [word for word in CAPS if word != "CAP_SYS_PTRACE"])])
def test_nor_in_the_moments_of_user_and_time_namespaces(bundle: Bundle, unharmed: object, userns: str,
                                                        caps: list[str]) -> None:
    """With every capability of its own user namespace: CAP_SYS_PTRACE counts for what was run in there, not for the
    runtime. And with root's ids over one that is being made. strace makes the moments long."""
    slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=unshare,setns,setsid",
            "-e", "inject=unshare,setns,setsid:delay_exit=150000", *RUNTIME]
    seen = watched(bundle, caps, userns=userns, runtime=slow)
    assert interpreter() not in seen and "python" not in seen
    assert str(bundle.state) not in seen and "config.json" not in seen


def test_what_the_hosts_ptrace_capability_reaches(bundle: Bundle) -> None:
    """docs/security.md, What is not kept out. Should this fail: it is, and that page is to be changed."""
    assert interpreter() in watched(bundle, ["CAP_SYS_PTRACE"])


def test_proc_is_masked_before_the_program_runs(bundle: Bundle) -> None:
    out = bundle.shell("(echo x >/proc/sys/kernel/core_pattern) 2>&1; (echo x >/proc/irq/default_smp_affinity) 2>&1; "
                       "ls /sys/firmware; cat /proc/keys")
    assert out.count("Read-only file system") == 2 and len(out.splitlines()) == 2


def test_the_programs_first_moment_is_in_its_cgroup(bundle: Bundle) -> None:
    rows = bundle.config["linux"]["namespaces"]
    bundle.config["linux"]["namespaces"] = [row for row in rows if row["type"] != "cgroup"]
    lines = bundle.shell("cat /proc/self/cgroup").splitlines()
    assert lines and all(line.rpartition(":")[2].endswith(f"/pyhv-{bundle.name}") for line in lines)
