"""The runtime, or what it has made, killed at each step: `delete --force` removes what is there afterwards.

strace delivers the SIGKILL on entry of the n-th call that changes something, until the command gets through.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle

pytestmark = [*container, pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")]

# What the runtime itself does to the host, and where it waits; every one is an edge of a step.
OURS = "mkdir,rename,clone3,bind,listen,flock,socketpair,recvmsg,sendto"
# What only the container's first process does.
INSIDE = ("setsid,keyctl,sethostname,openat2,fsmount,move_mount,mknodat,symlinkat,pivot_root,umount2,capset,execveat,"
          "seccomp")
KILLED, TERMINATED = 137, 143


def strace(calls: str, number: int, *, follow: bool, signal: str = "KILL") -> list[str]:
    return ["strace", *(["-f"] if follow else []), "-qq", "-o", "/dev/null", "-e", f"trace={calls}",
            "-e", f"inject={calls}:signal={signal}:when={number}", *RUNTIME]


def processes(made: Bundle) -> list[str]:
    """Processes in the container's cgroups, and those of the runtime that name it; not those that init is to reap."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                text = (entry / "cgroup").read_text() + (entry / "cmdline").read_text()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if made.name in text and state != "Z":
                found.append(f"{entry.name}: {text!r:.300}")
    return found


def nothing_left(made: Bundle) -> None:
    end = time.monotonic() + 5
    while processes(made) and time.monotonic() < end:
        time.sleep(0.005)
    assert not processes(made)
    made.gone()


def kill_at_each_step(made: Bundle, calls: str, *words: str) -> int:
    """Kill `words` at the first, second, ... of each of `calls`, clean up each time; how often it died."""
    deaths = 0
    for call in calls.split(","):
        for number in range(1, 100):
            with (made.folder / "errors").open("w") as errors:      # no pipe: the container would hold it open
                done = made.call(*words, made.name, runtime=strace(call, number, follow=False), capture_output=False,
                                 stdout=subprocess.DEVNULL, stderr=errors)
            assert done.returncode in (0, KILLED, -9), (call, number, (made.folder / "errors").read_text())
            removed = made.call("delete", "--force", made.name)
            assert removed.returncode == 0, (call, number, removed.stderr)
            nothing_left(made)
            if done.returncode == 0:
                break               # it does not call that so often
            deaths += 1
    return deaths


def go(made: Bundle, way: str) -> None:
    """By far.py, or by a fork of the runtime, which a time namespace needs."""
    made.config["process"]["args"] = ["sleep", "1000"]
    if way == "fork":
        made.config["linux"]["namespaces"].append({"type": "time"})


@pytest.mark.parametrize("way", ["far", "fork"])
def test_create_is_killed_at_every_step(bundle, way):
    go(bundle, way)
    bundle.write()
    assert kill_at_each_step(bundle, OURS, "create") > 15


def terminate_at_each_step(made: Bundle, calls: str) -> int:
    """SIGTERM to `create` at the 1st, 2nd, ... of each of `calls`: nothing is left, or it is done. How often not."""
    ended = 0
    for call in calls.split(","):
        for number in range(1, 100):
            done = made.call("create", made.name, runtime=strace(call, number, follow=False, signal="TERM"),
                             capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            assert done.returncode in (0, TERMINATED, -15), (call, number)      # -15: it had not begun
            if done.returncode == 0:
                assert made.status() == "created"
                assert made.call("delete", "--force", made.name).returncode == 0
            nothing_left(made)
            if done.returncode == 0:
                break
            ended += 1
    return ended


@pytest.mark.parametrize("way", ["far", "fork"])
def test_create_is_terminated_at_every_step(bundle, way):
    go(bundle, way)
    bundle.write()
    assert terminate_at_each_step(bundle, OURS + ",rt_sigprocmask,write,pwrite64") > 40


def test_create_in_two_steps_is_terminated_at_every_step(bundle):
    """Where a pid namespace is joined, by another process that has the first one as its parent's child."""
    bundle.config["process"]["args"] = ["sleep", "1000"]
    for row in bundle.config["linux"]["namespaces"]:
        if row["type"] == "pid":
            row["path"] = f"/proc/{os.getpid()}/ns/pid"
    bundle.write()
    assert terminate_at_each_step(bundle, "socketpair,clone,fork,waitid,wait4,recvmsg,sendto,rt_sigprocmask") > 10


def test_create_is_terminated_around_a_hook(bundle):
    """The hook ends with it, also one whose number the runtime did not have yet when the signal came."""
    bundle.config["process"]["args"] = ["sleep", "1000"]
    script = f"exec -a hook-{bundle.name} sleep 1"          # named so that processes() finds it
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/bash", "args": ["bash", "-c", script]}]}
    bundle.write()
    ended = 0
    for call in ("memfd_create", "clone", "clone3", "vfork", "waitid", "wait4", "rt_sigprocmask"):
        for number in range(1, 100):
            done = bundle.call("create", bundle.name, runtime=strace(call, number, follow=False, signal="TERM"),
                               capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if done.returncode == 0:
                break               # it does not call that so often
            assert done.returncode == TERMINATED, (call, number)
            assert not any("hook-" in row for row in processes(bundle)), (call, number)
            nothing_left(bundle)
            ended += 1
        assert bundle.call("delete", "--force", bundle.name).returncode == 0
    assert ended > 10


def test_run_is_killed_at_the_end(bundle):
    bundle.config["process"]["args"] = ["true"]
    bundle.write()
    assert kill_at_each_step(bundle, "signalfd4,wait4,flock,rmdir,unlink", "run") > 10


def test_the_first_process_is_killed_at_every_step(bundle):
    """Then the runtime lives, says so, and leaves nothing by itself."""
    bundle.config["process"]["args"] = ["true"]
    bundle.write()
    deaths = 0
    for call in INSIDE.split(","):
        for number in range(1, 100, 3):
            done = bundle.call("run", bundle.name, runtime=strace(call, number, follow=True))
            if done.returncode == 0:
                break
            deaths += 1
            assert done.returncode in (1, KILLED), (call, number, done.returncode, done.stderr)
            assert "Traceback" not in done.stderr
            assert done.stderr.startswith("pyhv-runtime: ") or done.returncode == KILLED, done.stderr
            nothing_left(bundle)
    assert deaths > 25


def test_start_is_killed_at_every_step(bundle):
    """The container is created or running then, never lost, and a second `start` says which."""
    for call in ("flock", "connect", "unlink", "recvfrom"):
        assert bundle.create("sleep", "1000").returncode == 0
        assert bundle.call("start", bundle.name, runtime=strace(call, 1, follow=False)).returncode in (KILLED, -9), call
        status = bundle.status()
        assert status in ("created", "running"), (call, status)
        again = bundle.call("start", bundle.name)
        assert again.returncode == 0 or "started" in again.stderr, again.stderr
        assert "Traceback" not in again.stderr
        end = time.monotonic() + 5
        while bundle.status() != "running" and time.monotonic() < end:
            time.sleep(0.01)
        assert bundle.status() == "running", call
        assert bundle.call("delete", "--force", bundle.name).returncode == 0
        nothing_left(bundle)


def test_delete_is_killed_at_every_step(bundle):
    """Whatever was removed already, the next `delete --force` removes the rest."""
    for call in ("flock", "pidfd_send_signal", "kill", "rmdir", "unlink"):
        for number in range(1, 100):
            assert bundle.create("sleep", "1000").returncode == 0
            done = bundle.call("delete", "--force", bundle.name, runtime=strace(call, number, follow=False))
            assert bundle.call("delete", "--force", bundle.name).returncode == 0
            nothing_left(bundle)
            if done.returncode == 0:
                break
