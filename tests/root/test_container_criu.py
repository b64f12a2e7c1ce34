"""Containers saved and made again by CRIU, beside runc; and, where CRIU can't on this kernel, that it is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import bundle as bundle
from framework.bundle import container
from framework.criu import COUNTER, needs_criu
from framework.criu import saved as saved
from framework.groups import until

pytestmark = container

needs_runc = pytest.mark.skipif(shutil.which("runc") is None, reason="runc is not installed")


def status(pid: int) -> dict[str, str]:
    """What must be as it was, of /proc/PID/status and limits."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kept = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigIgn",
            "NSpid")
    found = {name: lines[name].split()[-1] if name == "NSpid" else lines[name].strip() for name in kept}
    return found | {"limits": Path(f"/proc/{pid}/limits").read_text(),
                    "score": Path(f"/proc/{pid}/oom_score_adj").read_text()}


def mounts(pid: int) -> list[tuple[str, ...]]:
    """Mount point, options, kind of file system of what the process sees; for cgroups also which group."""
    rows = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        words = line.split()
        kind = words[words.index("-") + 1]
        rows.append((words[4], words[5], kind, words[3] if kind.startswith("cgroup") else ""))
    return sorted(rows)


# what works ----------------------------------------------------------------------------------------------------


@needs_criu
def test_a_container_goes_on_where_it_was(saved):
    made = saved.bundle
    saved.run(COUNTER)
    before, cgroup = saved.count(3), Path(f"/proc/{made.pid()}/cgroup").read_text()
    kept, seen = status(made.pid()), mounts(made.pid())
    assert saved.checkpoint().returncode == 0
    assert made.status() == "gone"
    made.gone()
    stopped = saved.count()
    assert stopped >= before and (saved.images / "descriptors.json").exists()
    time.sleep(0.5)
    assert saved.count() == stopped
    assert saved.restore("--pid-file", str(made.folder / "pid")).returncode == 0
    pid = made.pid()
    assert made.status() == "running" and pid == int((made.folder / "pid").read_text())
    assert saved.count(stopped + 2) > stopped
    assert status(pid) == kept
    assert mounts(pid) == seen
    assert Path(f"/proc/{pid}/cgroup").read_text() == cgroup
    assert os.readlink(f"/proc/{pid}/ns/cgroup") != os.readlink("/proc/self/ns/cgroup")
    done = made.call("exec", made.name, "sh", "-c", "cat /proc/self/cgroup; ip addr show lo; hostname; cat /proc/keys")
    assert "0::/\n" in done.stdout and "LOOPBACK,UP" in done.stdout and made.config["hostname"] in done.stdout, done
    assert made.call("kill", made.name, "KILL").returncode == 0
    until(lambda: made.status() == "stopped")
    assert made.call("delete", made.name).returncode == 0


@needs_criu
def test_it_can_be_saved_again_and_again(saved):
    saved.run(COUNTER)
    for _ in range(2):
        saved.count(saved.count() + 2)
        assert saved.checkpoint().returncode == 0
        assert saved.restore().returncode == 0


@needs_criu
def test_it_goes_on_beside_its_images(saved):
    saved.run(COUNTER)
    pid = saved.bundle.pid()
    assert saved.checkpoint("--leave-running").returncode == 0
    assert saved.bundle.status() == "running" and saved.bundle.pid() == pid
    saved.count(saved.count() + 2)


@needs_criu
def test_memory_first(saved):
    saved.run(COUNTER)
    first = saved.images.parent / "first"
    assert saved.checkpoint("--pre-dump", images=first).returncode == 0
    assert saved.bundle.status() == "running" and list(first.glob("pages-*.img"))
    assert saved.checkpoint("--parent-path", "../first").returncode == 0
    assert (saved.images / "parent").is_symlink()
    before = saved.count()
    assert saved.restore().returncode == 0
    saved.count(before + 2)


@needs_criu
def test_the_filter_and_the_limits_are_in_force_again(saved):
    made = saved.bundle
    made.config["process"] |= {"noNewPrivileges": True, "user": {"uid": 0, "gid": 0, "additionalGids": [7, 8]}}
    made.config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77}]}
    made.config["linux"]["resources"] |= {"memory": {"limit": 64 << 20}, "pids": {"limit": 20}}
    saved.run("while :; do mkdir /tmp/made 2>>/tmp/said; n=$((n+1)); echo $n >> /tmp/n; sleep 0.1; done")
    saved.count(2)
    before = status(made.pid())
    assert before["Seccomp"] == "2" and before["NoNewPrivs"] == "1"
    assert saved.checkpoint().returncode == 0
    assert saved.restore().returncode == 0
    assert status(made.pid()) == before
    said = made.rootfs / "tmp/said"
    size = said.stat().st_size
    until(lambda: said.stat().st_size > size and not (made.rootfs / "tmp/made").exists())   # it answers still
    figures = json.loads(made.call("events", "--stats", made.name).stdout)["data"]
    assert figures["memory"]["usage"]["limit"] == 64 << 20 and figures["pids"]["limit"] == 20


@needs_criu
def test_bind_mounts_come_from_where_the_bundle_says(saved):
    made = saved.bundle
    outer = made.folder / "outer"
    outer.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "below", str(outer)], check=True)
    try:
        (outer / "deep").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "below", str(outer / "deep")], check=True)
        (made.rootfs / "real").mkdir()
        (made.rootfs / "link").symlink_to("/real")
        (made.folder / "file").write_text("a file\n")
        made.config["mounts"] += [
            {"destination": "/link/data", "type": "bind", "source": str(outer), "options": ["rbind", "rprivate"]},
            {"destination": "/etc/one", "type": "bind", "source": str(made.folder / "file"), "options": ["bind", "ro"]}]
        saved.run("while :; do n=$((n+1)); echo $n > /real/data/deep/n; echo $n >> /tmp/n; sleep 0.1; done")
        saved.count(2)
        done = saved.checkpoint()
        assert done.returncode == 0, done.stderr
        assert (outer / "deep/n").exists()
        (outer / "deep/n").unlink()
        assert saved.restore().returncode == 0
        until((outer / "deep/n").exists)
        shown = made.call("exec", made.name, "sh", "-c", "cat /etc/one; echo more > /etc/one")
        assert shown.stdout == "a file\n", shown
        assert shown.returncode != 0 and "Read-only" in shown.stderr
        # another place
        assert saved.checkpoint().returncode == 0
        made.config["mounts"][-1]["source"] = str(made.folder / "another")
        (made.folder / "another").write_text("another file\n")
        made.write()
        assert saved.restore().returncode == 0
        assert made.call("exec", made.name, "cat", "/etc/one").stdout == "another file\n"
    finally:
        made.call("delete", "--force", made.name)
        subprocess.run(["umount", "-R", str(outer)], check=True)


@needs_criu
def test_joined_namespaces_are_joined_again(saved):
    made = saved.bundle
    holder = subprocess.Popen(["unshare", "--net", "--ipc", "--uts", "sleep", "1000"])
    try:
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/uts") != os.readlink("/proc/self/ns/uts"))
        for row in made.config["linux"]["namespaces"]:
            if row["type"] in ("network", "ipc", "uts"):
                leaf = {"network": "net"}.get(row["type"], row["type"])
                row["path"] = f"/proc/{holder.pid}/ns/{leaf}"
        made.config.pop("hostname")
        saved.run(COUNTER)
        saved.count(2)
        for _ in range(2):
            for leaf in ("net", "ipc", "uts"):
                inside, held = (os.readlink(f"/proc/{pid}/ns/{leaf}") for pid in (made.pid(), holder.pid))
                assert inside == held, leaf
            done = saved.checkpoint()
            assert done.returncode == 0, done.stderr
            done = saved.restore()
            assert done.returncode == 0, done.stderr
        saved.count(saved.count() + 2)
    finally:
        made.call("delete", "--force", made.name)
        holder.kill()
        holder.wait()


@needs_criu
def test_a_terminal_comes_back_over_the_socket(saved):
    made = saved.bundle
    made.config["process"]["terminal"] = True
    first = saved.listener("one")
    saved.run("stty -echo; while read line; do n=$((n+1)); echo $n:$line; done", "--console-socket", str(first.path))
    master = first.take()
    os.write(master, b"a\n")
    assert b"1:a" in saved.read(master, b"1:a")
    done = saved.checkpoint()
    assert done.returncode == 0, done.stderr
    os.close(master)
    second = saved.listener("two")
    done = saved.restore("--console-socket", str(second.path))
    assert done.returncode == 0, done.stderr
    master = second.take()
    os.write(master, b"b\n")
    assert b"2:b" in saved.read(master, b"2:b")
    os.close(master)


@needs_criu
def test_in_the_foreground_its_end_is_ours(saved):
    made = saved.bundle
    saved.run("while ! test -e /tmp/end; do n=$((n+1)); echo $n >> /tmp/n; sleep 0.1; done; echo said; exit 7",
              stdout=subprocess.PIPE)
    saved.count(2)
    assert saved.checkpoint().returncode == 0
    (made.rootfs / "tmp/end").touch()
    done = made.call("restore", "--image-path", str(saved.images), made.name)
    assert done.returncode == 1 and "standard error was the file" in done.stderr, done.stderr
    made.gone()
    with (made.folder / "errors").open("a") as errors:
        done = made.call("restore", "--image-path", str(saved.images), made.name, capture_output=False,
                         stdout=subprocess.PIPE, stderr=errors)
    assert (done.returncode, done.stdout) == (7, "said\n")
    made.gone()


@needs_criu
def test_hooks_of_the_runtimes_side_run(saved):
    made = saved.bundle
    script = made.folder / "hook"
    script.write_text(f'#!/bin/sh\necho "$1 $(cat)" >> {made.folder}/hooks\n')
    script.chmod(0o755)
    kinds = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    made.config["hooks"] = {kind: [{"path": str(script), "args": ["hook", kind]}] for kind in kinds
                            if kind not in ("startContainer", "createContainer")}
    saved.run(COUNTER)
    saved.count(2)
    assert saved.checkpoint().returncode == 0
    said = made.folder / "hooks"
    said.unlink()
    assert saved.restore().returncode == 0
    rows = [line.split(" ", 1) for line in said.read_text().splitlines()]
    assert [kind for kind, _ in rows] == ["prestart", "createRuntime", "poststart"]
    states = [json.loads(text) for _, text in rows]
    assert all(state["pid"] == made.pid() and state["id"] == made.name for state in states)
    assert [state["status"] for state in states] == ["creating", "creating", "running"]


@needs_criu
def test_connections_only_where_they_are_asked_for(saved):
    saved.run("(sleep 1000 | nc -l -p 99 > /tmp/got) & sleep 3; "
              "(while :; do n=$((n+1)); echo $n; echo $n >> /tmp/n; sleep 0.1; done) | nc 127.0.0.1 99")
    saved.count(3)
    done = saved.checkpoint()
    assert done.returncode == 1 and "onnected TCP socket" in done.stderr, done.stderr
    saved.count(saved.count() + 2)      # it goes on
    done = saved.checkpoint("--tcp-established")
    assert done.returncode == 0, done.stderr


@needs_criu
@needs_runc
def test_images_are_runcs_as_well(saved):
    made = saved.bundle
    runc = ["runc", "--root", str(made.folder / "runc")]
    made.config["process"]["args"] = ["sh", "-c", COUNTER]
    made.config["linux"].pop("seccomp", None)
    made.config["ociVersion"] = "1.0.2"
    made.config["linux"]["cgroupsPath"] = f"/pyhv-{made.name}"     # runc makes the group that is in the images
    made.config["root"]["readonly"] = False
    made.write()
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "timeout": 60,
                             "stderr": subprocess.DEVNULL, "cwd": made.folder}
    there = ["--image-path", str(saved.images), "--work-path", str(saved.images.parent / "work")]
    try:
        subprocess.run([*runc, "run", "--detach", made.name], check=True, **quiet)
        saved.count(2)
        subprocess.run([*runc, "checkpoint", *there, made.name], check=True, **quiet)
        before = saved.count()
        done = saved.restore()
        assert done.returncode == 0, done.stderr
        saved.count(before + 2)
        shutil.rmtree(saved.images)
        done = saved.checkpoint()
        assert done.returncode == 0, done.stderr
        before = saved.count()
        subprocess.run([*runc, "restore", "--detach", *there, made.name], check=True, **quiet)
        saved.count(before + 2)
    finally:
        subprocess.run([*runc, "delete", "--force", made.name], capture_output=True, check=False)
