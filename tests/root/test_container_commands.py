"""ps, pause, resume, update, events, features, checkpoint, and `--init`: what they do, and that engines can read it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle

pytestmark = container

RUNC = ["runc"]
needs_runc = pytest.mark.skipif(subprocess.run(["sh", "-c", "command -v runc"], capture_output=True).returncode != 0,
                                reason="runc is not installed")
WAIT = ("sleep", "1000")


def begin(made: Bundle, *args: str, flags: tuple[str, ...] = ()) -> int:
    done = made.create(*(args or WAIT), flags=flags)
    assert done.returncode == 0, done.stderr
    assert made.call("start", made.name).returncode == 0
    return made.pid()


def comes(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def value(made: Bundle, controller: str, leaf: str) -> str:
    """What a file of the container's version 1 group says."""
    for row in Path(f"/proc/{made.pid()}/cgroup").read_text().splitlines():
        _, names, path = row.split(":", 2)
        if controller in names.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}/{leaf}").read_text().strip()
    pytest.skip(f"no cgroup version 1 with {controller}")


# ps ---------------------------------------------------------------------------------------------------


def test_ps_lists_the_containers_processes_and_no_others(bundle):
    first = begin(bundle, "sh", "-c", "sleep 1000 & sleep 1001 & wait")
    comes(lambda: len(json.loads(bundle.call("ps", "-f", "json", bundle.name).stdout)) == 3)
    pids = json.loads(bundle.call("ps", "--format=json", bundle.name).stdout)
    assert first in pids and len({os.readlink(f"/proc/{pid}/ns/pid") for pid in pids}) == 1
    lines = bundle.call("ps", bundle.name).stdout.splitlines()
    assert lines[0].split()[:3] == ["UID", "PID", "PPID"]
    assert sorted(int(line.split()[1]) for line in lines[1:]) == sorted(pids)
    lines = bundle.call("ps", bundle.name, "-o", "pid,args").stdout.splitlines()
    assert lines[0].split() == ["PID", "COMMAND"] and any("sleep 1001" in line for line in lines)
    done = bundle.call("ps", bundle.name, "-o", "args")
    assert done.returncode == 1 and "PID" in done.stderr


@needs_runc
def test_ps_prints_what_runc_prints(bundle):
    shapes = []
    for runtime in (RUNTIME, RUNC):
        bundle.config["process"]["args"] = list(WAIT)
        bundle.write()
        bundle.call("run", "-d", bundle.name, runtime=runtime, capture_output=False, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL)
        table = bundle.call("ps", bundle.name, runtime=runtime).stdout.splitlines()
        parsed = json.loads(bundle.call("ps", "-f", "json", bundle.name, runtime=runtime).stdout)
        shapes.append(([line.split()[-2:] for line in table], [type(item) for item in parsed]))
        bundle.call("delete", "--force", bundle.name, runtime=runtime)
    assert shapes[0] == shapes[1]


# pause, resume, update, events ----------------------------------------------------------------------------


def test_pause_stops_all_processes_and_resume_lets_them_go_on(bundle):
    bundle.config["root"]["readonly"] = False
    begin(bundle, "sh", "-c", "while true; do echo >> /tmp/lines; sleep 0.01; done")
    lines = bundle.rootfs / "tmp/lines"
    comes(lambda: lines.exists() and lines.stat().st_size > 2)
    assert bundle.call("pause", bundle.name).returncode == 0
    assert bundle.status() == "paused"
    before = lines.stat().st_size
    time.sleep(0.2)
    assert lines.stat().st_size == before
    done = bundle.call("pause", bundle.name)
    assert done.returncode == 1 and "paused" in done.stderr
    assert bundle.call("resume", bundle.name).returncode == 0
    assert bundle.status() == "running"
    comes(lambda: lines.stat().st_size > before)
    done = bundle.call("resume", bundle.name)
    assert done.returncode == 1 and "running" in done.stderr


def test_a_paused_container_can_be_killed_and_deleted(bundle):
    begin(bundle)
    bundle.call("pause", bundle.name)
    assert bundle.call("kill", bundle.name, "KILL").returncode == 0
    comes(lambda: bundle.status() == "stopped")
    assert bundle.call("delete", bundle.name).returncode == 0
    begin(bundle)
    bundle.call("pause", bundle.name)
    assert bundle.call("delete", "--force", bundle.name).returncode == 0


def test_update_changes_what_is_named_and_nothing_else(bundle):
    bundle.config["linux"]["resources"] |= {"memory": {"limit": 64 << 20}, "pids": {"limit": 50},
                                            "cpu": {"shares": 512}}
    begin(bundle)
    assert bundle.call("update", "--memory", "96m", "--pids-limit=40", bundle.name).returncode == 0
    assert value(bundle, "memory", "memory.limit_in_bytes") == str(96 << 20)
    assert value(bundle, "pids", "pids.max") == "40" and value(bundle, "cpu", "cpu.shares") == "512"
    done = bundle.call("update", "--resources", "-", bundle.name, stdin=None, input='{"cpu": {"shares": 256}}')
    assert done.returncode == 0, done.stderr
    assert value(bundle, "cpu", "cpu.shares") == "256" and value(bundle, "pids", "pids.max") == "40"
    (bundle.folder / "new.json").write_text('{"pids": {"limit": 30}}')
    assert bundle.call("update", "-r", str(bundle.folder / "new.json"), bundle.name).returncode == 0
    assert value(bundle, "pids", "pids.max") == "30"


@pytest.mark.parametrize("words, text", [
    (("--memory", "much"), "--memory 'much'"), (("--pids-limit", "x"), "--pids-limit 'x'"), (("--l3-cache-schema", "x"),
     "--l3-cache-schema"), (("--resources", "/absent"), "/absent"), (("--cpu-share",), "needs a value")])
def test_update_refuses_by_name(bundle, words, text):
    begin(bundle)
    done = bundle.call("update", *words, *([bundle.name] if len(words) > 1 else []))
    assert done.returncode == 1 and text in done.stderr and len(done.stderr.splitlines()) == 1
    for content in ("[]", "{", '{"memory": 5}', '{"memory": {"limit": "x"}}'):
        done = bundle.call("update", "-r", "-", bundle.name, stdin=None, input=content)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, (content, done.stderr)


def test_a_stopped_container_has_nothing_to_update_or_watch(bundle):
    begin(bundle, "true")
    comes(lambda: bundle.status() == "stopped")
    for words in (("update", "--pids-limit", "5"), ("events", "--stats"), ("pause",), ("resume",)):
        done = bundle.call(*words, bundle.name)
        assert done.returncode == 1 and ("not running" in done.stderr or "stopped" in done.stderr), words


def keys(tree: object, depth: int) -> object:
    return {key: keys(item, depth - 1) for key, item in tree.items()} if isinstance(tree, dict) and depth else None


@needs_runc
def test_the_figures_have_the_names_that_runc_gives_them(bundle):
    found = []
    for runtime in (RUNTIME, RUNC):
        bundle.config["process"]["args"] = list(WAIT)
        bundle.write()
        bundle.call("run", "-d", bundle.name, runtime=runtime, capture_output=False, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL)
        line = json.loads(bundle.call("events", "--stats", bundle.name, runtime=runtime).stdout)
        assert line["type"] == "stats" and line["id"] == bundle.name
        found.append(line["data"])
        bundle.call("delete", "--force", bundle.name, runtime=runtime)
    ours, theirs = found
    assert set(ours) >= set(theirs) - {"intel_rdt", "network_interfaces"}
    for part in ("cpu", "memory", "pids"):
        assert set(ours[part]) >= set(theirs[part]), part
    assert set(ours["memory"]["usage"]) >= set(theirs["memory"]["usage"])
    assert 0 < ours["memory"]["usage"]["usage"] < 1 << 30 and ours["pids"]["current"] == 1


def test_events_come_until_the_end(bundle):
    begin(bundle)
    watching = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "events", "--interval", "100ms", bundle.name],
                                stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout
        for _ in range(3):
            assert json.loads(watching.stdout.readline())["type"] == "stats"
        bundle.call("kill", bundle.name, "KILL")
        assert watching.wait(10) == 0
        watching.stdout.close()
    finally:
        watching.kill()
        watching.wait()


# features, checkpoint ---------------------------------------------------------------------------------------


@needs_runc
def test_features_have_the_form_of_runcs(bundle):
    ours, theirs = (json.loads(bundle.call("features", runtime=runtime).stdout) for runtime in (RUNTIME, RUNC))
    assert set(ours) >= set(theirs) and set(ours["linux"]) >= set(theirs["linux"])
    assert ours["hooks"] == theirs["hooks"] and set(ours["linux"]["namespaces"]) > set(theirs["linux"]["namespaces"])
    for name in ("capabilities", "seccomp"):
        assert type(ours["linux"][name]) is type(theirs["linux"][name])
    for name in ("actions", "operators", "archs"):
        assert set(ours["linux"]["seccomp"][name]) >= set(theirs["linux"]["seccomp"][name]), name
    # of a file system, or refused by name
    assert set(theirs["mountOptions"]) - set(ours["mountOptions"]) <= {"acl", "noacl", "remount"}


# --init, zombies, exit codes -----------------------------------------------------------------------------------


ORPHAN = "(sh -c 'sleep 0.1 &'); sleep 0.4; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l"


def test_orphans_are_reaped_only_where_that_was_asked_for(bundle):
    """The first process is the user's, who may not reap; with --init it is one that does."""
    bundle.config["process"]["args"] = ["sh", "-c", "exec sleep 1000"]
    begin(bundle, *bundle.config["process"]["args"])
    assert bundle.call("exec", bundle.name, "sh", "-c", ORPHAN).stdout.strip() == "1"
    bundle.call("delete", "--force", bundle.name)
    begin(bundle, *bundle.config["process"]["args"], flags=("--init",))
    assert bundle.call("exec", bundle.name, "sh", "-c", ORPHAN).stdout.strip() == "0"
    bundle.call("delete", "--force", bundle.name)
    bundle.config["annotations"] = {"io.pyhv.init": "true"}
    begin(bundle, *bundle.config["process"]["args"])
    assert bundle.call("exec", bundle.name, "sh", "-c", ORPHAN).stdout.strip() == "0"


def test_a_first_process_that_reaps_is_small_and_has_nothing_open(bundle):
    first = begin(bundle, *WAIT, flags=("--init",))
    assert sorted(os.listdir(f"/proc/{first}/fd")) == ["0", "1", "2"]
    assert "pyhv-init" in os.readlink(f"/proc/{first}/exe")
    rows = Path(f"/proc/{first}/status").read_text()
    assert int(rows.split("VmRSS:")[1].split()[0]) < 256        # kB


@needs_runc
@pytest.mark.parametrize("flags", [(), ("--init",)], ids=" ".join)
@pytest.mark.parametrize("script, code", [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)])
def test_exit_codes_are_runcs(bundle, flags, script, code):
    """$$ is the first process, which the kernel shields from signals that it does not handle; with --init it is not."""
    bundle.config["process"]["args"] = ["sh", "-c", script]
    bundle.write()
    ours = bundle.call("run", *flags, bundle.name).returncode
    theirs = bundle.call("run", bundle.name, runtime=RUNC).returncode
    assert ours == (code if flags else theirs)


@pytest.mark.parametrize("flags", [(), ("--init",)], ids=" ".join)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR2, 140)])
def test_signals_to_run_are_the_programs(bundle, flags, number, code):
    script = f"trap 'exit {code}' {number.value}; echo ready; while true; do sleep 0.02; done"
    bundle.config["process"]["args"] = ["sh", "-c", script]
    bundle.write()
    going = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "run", *flags, bundle.name], cwd=bundle.folder,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert going.stdout and going.stdout.read(6) == b"ready\n"
        going.stdout.close()
        time.sleep(0.1)
        going.send_signal(number)
        assert going.wait(10) == code
    finally:
        going.kill()
        going.wait()
    bundle.gone()
