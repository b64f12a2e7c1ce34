"""Who the program is: ids, capabilities, limits, environment, descriptors, signals; beside runc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle  # a fixture

pytestmark = container

STATUS = "grep -E '^(Uid|Gid|Groups|Umask|Cap|NoNewPrivs|Seccomp:|SigBlk|SigIgn)' /proc/self/status"
PROBE = STATUS + ("; id; env | sort; pwd; cat /proc/self/limits; cat /proc/self/oom_score_adj; hostname; "
                  "cat /proc/self/personality; ls -l /proc/self/ns | sed 's/.*-> //;s/:.*//' | sort; "
                  "cut -d' ' -f41 /proc/self/stat; nproc; tr '\\0' ' ' </proc/1/cmdline")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "user": {"user": {"uid": 1000, "gid": 1000, "additionalGids": [5, 77]}},
    "umask": {"user": {"uid": 0, "gid": 0, "umask": 0o77}},
    "stranger": {"user": {"uid": 4242, "gid": 4343}},
    "all sets": {"capabilities": {name: ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_KILL"]
                                  for name in ("bounding", "effective", "permitted", "inheritable", "ambient")}},
    "no capabilities": {"capabilities": {}},
    "ambient for a user": {"user": {"uid": 1000, "gid": 1000}, "capabilities": {
        name: ["CAP_NET_BIND_SERVICE", "CAP_KILL"] for name in (
            "bounding", "effective", "permitted", "inheritable", "ambient")}},
    "more privileges": {"noNewPrivileges": False, "user": {"uid": 1000, "gid": 1000}},
    "limits": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
                           {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                           {"type": "RLIMIT_NPROC", "soft": 64, "hard": 64}]},
    "oom": {"oomScoreAdj": 500},
    "environment": {"env": ["PATH=/bin", "A=1=2", "B=", "A=3", "HOME=/nowhere"]},
    "directory": {"cwd": "/etc", "user": {"uid": 1000, "gid": 1000}},
}


@pytest.mark.skipif(shutil.which("runc") is None, reason="runc is not installed")
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_under_runc(bundle: Bundle, case: str) -> None:
    bundle.config["process"] |= CASES[case]
    bundle.config["ociVersion"] = "1.0.2"
    mine = bundle.shell(PROBE)
    theirs = bundle.shell(PROBE, runtime=["runc"])
    assert mine == theirs


def test_with_a_filter_and_without_new_privileges_the_sets_are_the_same(bundle: Bundle) -> None:
    """The filter needs CAP_SYS_ADMIN while it is loaded; nothing of that stays."""
    bundle.config["process"] |= {"noNewPrivileges": False, "user": {"uid": 1000, "gid": 1000}}
    without = bundle.shell(STATUS)
    bundle.config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}]}
    assert bundle.shell(STATUS) == without.replace("Seccomp:\t0", "Seccomp:\t2")
    bundle.config["process"]["noNewPrivileges"] = True
    assert "Seccomp:\t2" in bundle.shell(STATUS)


def test_descriptors(bundle: Bundle) -> None:
    """None but the standard streams, whatever the caller has open without O_CLOEXEC."""
    bundle.config["process"]["args"] = ["sh", "-c", "ls /proc/1/fd; true"]
    bundle.write()
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    try:
        for fd in files:
            os.set_inheritable(fd, True)
        command = [*RUNTIME, "--root", str(bundle.state), "run", bundle.name]
        done = subprocess.run(command, cwd=bundle.folder, close_fds=False, capture_output=True, text=True, timeout=20,
                              stdin=subprocess.DEVNULL)
        assert done.stdout.split() == ["0", "1", "2"], done
    finally:
        for fd in files:
            os.close(fd)


def test_preserved_descriptors(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sh", "-c", "cat <&3; cat <&4; ls /proc/1/fd; true"]
    bundle.write()
    for name in ("one", "two"):
        (bundle.folder / name).write_text(name + "\n")
    command = f"{' '.join(RUNTIME)} --root {bundle.state} run --preserve-fds 2 {bundle.name}"
    script = f"exec 3<one 4<two 5<one; exec {command}"
    done = subprocess.run(["sh", "-c", script], cwd=bundle.folder, capture_output=True, text=True, timeout=20,
                          stdin=subprocess.DEVNULL)
    assert done.stdout.split() == ["one", "two", "0", "1", "2", "3", "4"], done


def test_socket_activation(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sh", "-c", "cat <&3; env | grep LISTEN | sort"]
    bundle.write()
    (bundle.folder / "one").write_text("one\n")
    script = f"exec 3<one; LISTEN_FDS=1 exec {' '.join(RUNTIME)} --root {bundle.state} run {bundle.name}"
    done = subprocess.run(["sh", "-c", script], cwd=bundle.folder, capture_output=True, text=True, timeout=20,
                          stdin=subprocess.DEVNULL)
    assert done.stdout == "one\nLISTEN_FDS=1\nLISTEN_PID=1\n", done


def test_signals_are_as_a_program_expects_them(bundle: Bundle) -> None:
    """Python ignores SIGPIPE; nobody may inherit that. Nor what the caller blocks."""
    bundle.config["process"]["args"] = ["grep", "-E", "Sig(Blk|Ign|Cgt)", "/proc/self/status"]
    bundle.write()
    import signal

    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        done = bundle.call("run", bundle.name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    # 32 and 33 are the C library's own: nobody can set them by its functions, and a test runner may hand them on
    sets = [int(line.split()[1], 16) & ~(3 << 31) for line in done.stdout.splitlines()]
    assert sets == [0, 0, 0]


def test_scheduling(bundle: Bundle) -> None:
    bundle.config["process"] |= {"scheduler": {"policy": "SCHED_BATCH", "nice": 7},
                                 "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}}
    assert bundle.shell("cut -d' ' -f19,41 /proc/self/stat") == "7 3\n"      # nice, policy (proc(5))


def test_personality(bundle: Bundle) -> None:
    bundle.config["linux"]["personality"] = {"domain": "LINUX32"}
    assert bundle.shell("uname -m") == "i686\n"


def test_time_namespace(bundle: Bundle) -> None:
    bundle.config["linux"]["namespaces"].append({"type": "time"})
    bundle.config["linux"]["timeOffsets"] = {"boottime": {"secs": 1_000_000, "nanosecs": 5}}
    assert float(bundle.shell("cut -d' ' -f1 /proc/uptime")) > 1_000_000


def test_session_keyring(bundle: Bundle) -> None:
    out = bundle.shell("cat /proc/self/ns/uts >/dev/null 2>&1; cat /proc/key-users")
    assert out                              # the kernel has keyrings
    bundle.config["process"]["args"] = ["true"]
    bundle.write()
    assert bundle.call("run", "--no-new-keyring", bundle.name).returncode == 0


def test_sysctls_and_names(bundle: Bundle) -> None:
    bundle.config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.msgmax": "9000", "kernel.domainname": "dom"}
    bundle.config["hostname"] = "inside"
    host = Path("/proc/sys/kernel/msgmax").read_text()
    script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax /proc/sys/kernel/domainname; hostname"
    assert bundle.shell(script).split() == ["1", "9000", "dom", "inside"]
    assert Path("/proc/sys/kernel/msgmax").read_text() == host


def test_loopback_is_up(bundle: Bundle) -> None:
    assert "LOOPBACK,UP" in bundle.shell("ip link show lo")


def test_joined_namespaces(bundle: Bundle) -> None:
    holder = subprocess.Popen(["unshare", "-n", "-u", "-i", "-p", "-f", "--mount-proc", "sh", "-c",
                               "hostname holder; echo ready; exec sleep 1000"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    child = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
    try:
        paths = {"network": "net", "uts": "uts", "ipc": "ipc", "pid": "pid"}
        bundle.config["linux"]["namespaces"] = [{"type": "mount"}, *(
            {"type": kind, "path": f"/proc/{child}/ns/{leaf}"} for kind, leaf in paths.items())]
        bundle.config["hostname"] = ""
        out = bundle.shell("hostname; for n in net uts ipc pid; do readlink /proc/self/ns/$n; done; cat /proc/1/comm")
        assert out.splitlines() == ["holder", *(os.readlink(f"/proc/{child}/ns/{leaf}")
                                                for leaf in ("net", "uts", "ipc", "pid")), "sleep"]
        bundle.config["linux"]["namespaces"][1]["path"] = f"/proc/{child}/ns/uts"       # of another kind
        done = bundle.run("true")
        assert done.returncode == 1 and "network" in done.stderr
    finally:
        subprocess.run(["kill", "-9", str(child)], check=False)
        holder.kill()
        holder.stdout.close()
        holder.wait()
