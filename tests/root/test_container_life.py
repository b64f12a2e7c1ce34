"""Create, start, run, kill, delete: states, exit codes, what is left, faults at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle  # a fixture

from hv.container.runtime import CreateOptions, Runtime
from hv.errors import HvError, StateError

pytestmark = container


def until(condition: Any, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_whole_life(bundle: Bundle) -> None:
    pid_file = bundle.folder / "pid"
    done = bundle.create("sh", "-c", "echo begun >/tmp/begun; exec sleep 1000", flags=("--pid-file", str(pid_file)))
    assert done.returncode == 0, done.stderr
    pid = int(pid_file.read_text())
    assert bundle.status() == "created" and bundle.pid() == pid
    assert not (bundle.rootfs / "tmp/begun").exists()
    assert "pyhv-init" in os.readlink(f"/proc/{pid}/exe")           # no Python waits there
    assert bundle.call("start", bundle.name).returncode == 0
    assert bundle.status() == "running"
    assert until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
    assert Path(f"/proc/{pid}/status").read_text().count("PPid:\t1\n")      # nobody of pyhv is left
    again = bundle.call("start", bundle.name)
    assert again.returncode == 1 and "running" in again.stderr
    refused = bundle.call("delete", bundle.name)
    assert refused.returncode == 1 and "not stopped" in refused.stderr
    assert bundle.call("kill", bundle.name, "KILL").returncode == 0
    assert until(lambda: bundle.status() == "stopped")
    dead = bundle.call("kill", bundle.name)
    assert dead.returncode == 1 and "not running" in dead.stderr
    assert "stopped" in bundle.call("start", bundle.name).stderr
    assert bundle.call("delete", bundle.name).returncode == 0
    gone = bundle.call("delete", bundle.name)
    assert gone.returncode == 1 and "does not exist" in gone.stderr
    assert bundle.call("delete", "--force", bundle.name).returncode == 0


@pytest.mark.parametrize(("script", "code"), [
    ("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_exit_codes(bundle: Bundle, script: str, code: int) -> None:
    # the first process of a pid namespace is not killed by its own signals: a child of it is
    bundle.config["linux"]["namespaces"] = [row for row in bundle.config["linux"]["namespaces"] if row["type"] != "pid"]
    bundle.config["mounts"] = [row for row in bundle.config["mounts"] if row["destination"] != "/proc"]
    bundle.config["linux"]["maskedPaths"] = bundle.config["linux"]["readonlyPaths"] = []
    assert bundle.run("sh", "-c", script).returncode == code


def test_state_has_what_engines_read(bundle: Bundle) -> None:
    bundle.config["annotations"] = {"org.example.key": "ä"}
    bundle.create("sleep", "1000")
    state = json.loads(bundle.call("state", bundle.name).stdout)
    assert state.pop("pid") > 1 and state.pop("created").startswith("20")
    assert state == {"ociVersion": "1.2.0", "id": bundle.name, "status": "created", "bundle": str(bundle.folder),
                     "rootfs": str(bundle.rootfs), "annotations": {"org.example.key": "ä"}, "owner": ""}


def test_a_name_in_use(bundle: Bundle) -> None:
    bundle.create("sleep", "1000")
    second = bundle.create("sleep", "1000")
    assert second.returncode == 1 and "exists" in second.stderr
    assert bundle.status() == "created"


@pytest.mark.parametrize(("args", "words"), [
    (["nonexistent"], "executable file not found in $PATH"), (["/nonexistent"], "no such file or directory"),
    (["/etc/passwd"], "permission denied"), (["/bin"], "permission denied"), (["./bin/nothing"], "no such file"),
    (["/etc/passwd/x"], "no such file or directory"), (["/tmp/loop"], "too many levels of symbolic links")])
def test_programs_that_cannot_be_run(bundle: Bundle, args: list[str], words: str) -> None:
    (bundle.rootfs / "tmp/loop").symlink_to("loop")
    done = bundle.create(*args)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert bundle.status() == "gone"
    done = bundle.run(*args)
    assert done.returncode == 1 and words in done.stderr


def test_a_program_that_fails_only_when_it_is_run(bundle: Bundle) -> None:
    """A script whose interpreter is missing, a file that is no program: create can't know, start says so."""
    for content, words in (("#!/no/interpreter\n", "no such file or directory"),
                           ("\x7fELFnonsense", "exec format error")):
        program = bundle.rootfs / "tmp/program"
        program.write_text(content)
        program.chmod(0o755)
        assert bundle.create("/tmp/program").returncode == 0
        done = bundle.call("start", bundle.name)
        assert done.returncode == 1 and f'exec: "/tmp/program": {words}' in done.stderr
        assert until(lambda: bundle.status() == "stopped")
        assert bundle.call("delete", bundle.name).returncode == 0
        done = bundle.run("/tmp/program")
        assert done.returncode == 1 and words in done.stderr


def test_no_rootfs(bundle: Bundle) -> None:
    bundle.config["root"]["path"] = "nowhere"
    done = bundle.run("true")
    assert done.returncode == 1 and "root.path" in done.stderr and "nowhere" in done.stderr


def test_kill_by_number_name_and_all(bundle: Bundle) -> None:
    script = "trap 'echo got' USR1; sleep 1000 & sleep 1000 & while :; do sleep 0.05; done"
    bundle.create("sh", "-c", script)
    bundle.call("start", bundle.name)
    pid = bundle.pid()
    for word in ("USR1", "SIGUSR1", "sigusr1", "10"):
        assert bundle.call("kill", bundle.name, word).returncode == 0
    assert alive(pid)
    bad = bundle.call("kill", bundle.name, "NOSUCH")
    assert bad.returncode == 1 and "NOSUCH" in bad.stderr
    assert bundle.call("kill", "--all", bundle.name, "KILL").returncode == 0
    assert until(lambda: not alive(pid))


def test_delete_force_ends_everything(bundle: Bundle) -> None:
    bundle.config["linux"]["namespaces"] = [row for row in bundle.config["linux"]["namespaces"] if row["type"] != "pid"]
    bundle.create("sh", "-c", "sleep 1001 & sleep 1002 & wait")
    bundle.call("start", bundle.name)
    pid = bundle.pid()
    procs = Path(f"/sys/fs/cgroup/pids/pyhv-{bundle.name}/cgroup.procs")
    assert until(lambda: len(procs.read_text().split()) >= 3)
    members = [int(word) for word in procs.read_text().split()]
    assert pid in members
    assert bundle.call("delete", "--force", bundle.name).returncode == 0
    assert not any(alive(member) for member in members)


def test_pid_reuse_does_not_hit_a_stranger(bundle: Bundle) -> None:
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        bundle.create("sleep", "1000")
        path = bundle.state / bundle.name / "state.json"
        state = json.loads(path.read_text())
        first = state["pid"]
        path.write_text(json.dumps(state | {"pid": stranger.pid}))
        assert bundle.status() == "stopped"
        assert bundle.call("kill", bundle.name, "KILL").returncode == 1
        assert bundle.call("delete", "--force", bundle.name).returncode == 0
        assert stranger.poll() is None
        assert until(lambda: not alive(first))
    finally:
        stranger.kill()
        stranger.wait()


def test_a_cgroup_of_somebody_else_is_left_alone(bundle: Bundle) -> None:
    place = Path("/sys/fs/cgroup/pids") / f"other-{bundle.name}"
    place.mkdir()
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        (place / "cgroup.procs").write_text(str(stranger.pid))
        bundle.config["linux"]["cgroupsPath"] = f"/{place.name}"
        done = bundle.run("true")
        assert done.returncode == 1 and "cgroupsPath" in done.stderr
        assert stranger.poll() is None and place.exists()
    finally:
        stranger.kill()
        stranger.wait()
        place.rmdir()


@pytest.mark.parametrize("moment", range(12))
def test_the_runtime_killed_while_it_creates(bundle: Bundle, moment: int) -> None:
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()
    process = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "create", "-b", str(bundle.folder), bundle.name],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # the record appears first: count from there, in steps of a third of a millisecond
    until(lambda: (bundle.state / bundle.name).exists() or process.poll() is not None)
    end = time.perf_counter() + moment / 3000
    while time.perf_counter() < end:
        pass
    process.kill()
    process.wait()
    done = bundle.call("delete", "--force", bundle.name)
    assert done.returncode == 0, done.stderr
    bundle.gone()
    marker = str(bundle.folder)
    assert until(lambda: not any(marker in Path(f"/proc/{pid}/mountinfo").read_text(errors="replace")
                                 for pid in os.listdir("/proc") if pid.isdecimal() and alive(int(pid))
                                 and pid != str(os.getpid()) and os.access(f"/proc/{pid}/mountinfo", os.R_OK)))


def test_two_starts_at_once(bundle: Bundle) -> None:
    bundle.create("sleep", "1000")
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(bundle.call("start", bundle.name).returncode))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [0, 1, 1, 1]


def test_many_from_parallel_callers(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()
    failures: list[str] = []
    silent: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL}

    def work(number: int) -> None:
        for turn in range(3):
            name = f"{bundle.name}-{number}-{turn}"
            for words in (("create", name), ("start", name), ("kill", name, "KILL"), ("delete", "--force", name)):
                # a file, not a pipe: the container would hold that open
                with (bundle.folder / f"errors-{number}").open("w") as errors:
                    done = bundle.call(*words, stderr=errors, **silent)
                if done.returncode:
                    failures.append(f"{words}: {(bundle.folder / f'errors-{number}').read_text()}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_from_a_program_with_threads(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sh", "-c", "exit 9"]
    bundle.write()
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    before = set(os.listdir("/proc/self/fd"))
    try:
        runtime = Runtime(str(bundle.state))
        record = runtime.create(bundle.name, str(bundle.folder), CreateOptions())
        assert runtime.status(record) == "created"
        with pytest.raises(StateError):
            runtime.create(bundle.name, str(bundle.folder), CreateOptions())
        runtime.start(bundle.name)
        _, status = os.waitpid(int(record.data["pid"]), 0)
        assert os.waitstatus_to_exitcode(status) == 9
        runtime.delete(bundle.name)
        bundle.config["process"]["args"] = ["nonexistent"]
        bundle.write()
        with pytest.raises(HvError, match="not found"):
            runtime.create(bundle.name, str(bundle.folder), CreateOptions())
    finally:
        end.set()
        other.join()
    runtime.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_creates_undoes_everything(bundle: Bundle, number: int) -> None:
    mark = bundle.folder / "mark"
    script = f"echo $$ >{mark}.n; mv {mark}.n {mark}; sleep 1000"
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}
    bundle.write()
    process = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "create", "-b", str(bundle.folder), bundle.name],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert until(mark.exists)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    bundle.gone()
    assert until(lambda: not alive(int(mark.read_text())))      # it is killed, and ends when the kernel gets to it
