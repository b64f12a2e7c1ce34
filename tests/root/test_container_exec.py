"""`exec`: a program in a running container is what it should be, and where it should be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle

from hv.container.exec import ExecOptions, start_exec
from hv.container.runtime import Runtime
from hv.errors import ConfigError, HvError, StateError

pytestmark = container

RUNC = ["runc"]
needs_runc = pytest.mark.skipif(subprocess.run(["sh", "-c", "command -v runc"], capture_output=True).returncode != 0,
                                reason="runc is not installed")
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
WAIT = ("sleep", "1000")


def begin(made: Bundle, *args: str) -> int:
    """A running container; its first process."""
    done = made.create(*(args or WAIT))
    assert done.returncode == 0, done.stderr
    assert made.call("start", made.name).returncode == 0
    return made.pid()


def run(made: Bundle, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return made.call("exec", *words, **options)


def detached(made: Bundle, *words: str) -> int:
    """`exec --detach`, which must work; its pid. Its output is discarded: it would hold ours open."""
    file = made.folder / "pid"
    done = run(made, "--detach", "--pid-file", str(file), made.name, *words, capture_output=False,
               stdout=subprocess.DEVNULL)
    assert done.returncode == 0
    return int(file.read_text())


def under_runc(made: Bundle, *words: str) -> subprocess.CompletedProcess[str]:
    """`exec` under runc, in a container of the same configuration."""
    assert made.call("delete", "--force", made.name).returncode == 0
    silent: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    made.call("run", "--detach", made.name, runtime=RUNC, **silent)
    try:
        return run(made, *words, runtime=RUNC)
    finally:
        made.call("delete", "--force", made.name, runtime=RUNC)


def inside(made: Bundle, script: str, *flags: str) -> str:
    done = run(made, *flags, made.name, "sh", "-c", script)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_it_is_in_all_namespaces_and_the_cgroup_of_the_first_process(bundle):
    first = begin(bundle)
    pid = detached(bundle, *WAIT)
    for leaf in NAMESPACES:
        assert os.readlink(f"/proc/{pid}/ns/{leaf}") == os.readlink(f"/proc/{first}/ns/{leaf}"), leaf
    assert Path(f"/proc/{pid}/cgroup").read_text() == Path(f"/proc/{first}/cgroup").read_text()
    assert bundle.name in Path(f"/proc/{pid}/cgroup").read_text()
    assert sorted(json.loads(bundle.call("ps", "-f", "json", bundle.name).stdout)) == sorted([first, pid])


def test_it_leads_a_session_of_its_own(bundle):
    begin(bundle)
    pid, session = inside(bundle, "read -r pid name state parent group session rest < /proc/self/stat; echo $$ $session"
                          ).split()
    assert pid == session


@pytest.mark.parametrize("script, code", [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137),
                                          ("kill -TERM $$", 143)])
def test_its_exit_code_is_ours(bundle, script, code):
    begin(bundle)
    assert run(bundle, bundle.name, "sh", "-c", script).returncode == code


@needs_runc
@pytest.mark.parametrize("words, status", [
    (("{}", "absent"), 255), (("{}", "/etc"), 255), (("{}", "/etc/passwd"), 255), (("{}", "/bin/absent"), 255),
    (("{}",), 255), (("absent-container", "true"), 255), (("--detach", "--tty", "{}", "true"), 255)])
def test_what_cannot_be_run_is_told_as_runc_tells_it(bundle, words, status):
    """Engines look for these words, and give the user 126 or 127 by them."""
    begin(bundle)
    words = tuple(word.format(bundle.name) for word in words)
    ours = run(bundle, *words)
    theirs = under_runc(bundle, *words)
    assert ours.returncode == theirs.returncode == status
    for text in ("executable file not found in $PATH", "permission denied", "no such file or directory",
                 "does not exist", "process args cannot be empty", "cannot allocate tty"):
        assert (text in ours.stderr) == (text in theirs.stderr), (ours.stderr, theirs.stderr)
    assert len(ours.stderr.splitlines()) == 1


PROBE = """
cat /proc/self/status | grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|SigBlk|SigIgn)'
env | sort | grep -v -E '^(SHLVL|_)='
pwd; umask; ulimit -n
ls /proc/self/fd | wc -l
cat /proc/self/cgroup | wc -l
cat /proc/self/oom_score_adj
"""


@needs_runc
@pytest.mark.parametrize("flags", [
    (), ("--user", "1000:100", "-g", "7", "-g", "8"), ("--user", "1000"), ("--cwd", "/tmp"),
    ("-e", "A=1", "-e", "B=x y"), ("--cap", "CAP_SYS_CHROOT"), ("--no-new-privs",)], ids=" ".join)
def test_it_is_who_runc_makes_it(bundle, flags):
    bundle.config["process"]["user"] = {"uid": 0, "gid": 0, "additionalGids": [3, 4]}
    bundle.config["process"]["noNewPrivileges"] = "--no-new-privs" not in flags and not any("CAP" in x for x in flags)
    bundle.config["process"]["env"].append("FROM=container")
    bundle.config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 600, "hard": 600}]
    begin(bundle)
    ours = inside(bundle, PROBE, *flags)
    done = under_runc(bundle, *flags, bundle.name, "sh", "-c", PROBE)
    assert done.returncode == 0, done.stderr
    assert ours.splitlines() == done.stdout.splitlines()


def test_a_process_file_is_all_of_it(bundle):
    begin(bundle)
    process = {"args": ["sh", "-c", "id -u; pwd; echo $X; umask; grep CapEff /proc/self/status; ulimit -n"],
               "cwd": "/tmp", "env": ["PATH=/bin", "X=from the file"],
               "user": {"uid": 1000, "gid": 1000, "umask": 0o77},
               "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]}
    (bundle.folder / "process.json").write_text(json.dumps(process))
    done = run(bundle, "--process", str(bundle.folder / "process.json"), bundle.name)
    uid, cwd, x, umask, effective, files = done.stdout.splitlines()
    assert (uid, cwd, x, umask, files) == ("1000", "/tmp", "from the file", "0077", "77")
    assert effective.split()[1] == "0" * 16
    (bundle.folder / "process.json").write_text(json.dumps(process | {"cwd": "tmp"}))
    done = run(bundle, "--process", str(bundle.folder / "process.json"), bundle.name)
    assert done.returncode == 255 and "process.cwd" in done.stderr


def test_limits_are_the_containers_where_it_names_none(bundle):
    bundle.config["process"]["rlimits"] = [{"type": "RLIMIT_NPROC", "soft": 50, "hard": 60},
                                           {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]
    begin(bundle)
    text = inside(bundle, "grep -E 'processes|core' /proc/self/limits", "--user", "1000")
    assert [row.split()[-3:-1] for row in text.splitlines()] == [["0", "0"], ["50", "60"]]


def test_the_filter_of_the_container_holds(bundle):
    bundle.config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 39}]}
    for with_privileges in (True, False):
        bundle.config["process"]["noNewPrivileges"] = not with_privileges
        begin(bundle)
        done = run(bundle, "--user", "1000", bundle.name, "mkdir", "/tmp/x")
        assert "Directory not empty" in done.stderr
        assert inside(bundle, "grep Seccomp: /proc/self/status").split() == ["Seccomp:", "2"]
        bundle.call("delete", "--force", bundle.name)


def test_a_filter_with_a_supervisor_tells_it_of_exec_too(bundle):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(bundle.folder / "supervisor"))
    listener.listen()
    listener.settimeout(20)
    told: list[dict[str, Any]] = []

    def supervise() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            data, fds, _, _ = socket.recv_fds(connection, 65536, 4)
            told.append(json.loads(data) | {"got": len(fds)})
            for fd in fds:
                os.close(fd)
            connection.close()

    thread = threading.Thread(target=supervise)
    thread.start()
    bundle.config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(bundle.folder / "supervisor"),
        "syscalls": [{"names": ["mknod"], "action": "SCMP_ACT_NOTIFY"}]}
    begin(bundle)
    pid = detached(bundle, *WAIT)
    thread.join(20)
    listener.close()
    assert [row["got"] for row in told] == [1, 1]
    assert told[1]["pid"] == pid != told[0]["pid"]
    assert told[1]["state"]["id"] == bundle.name


# states ------------------------------------------------------------------------------------------------


def test_a_stopped_container_refuses(bundle):
    begin(bundle)
    bundle.call("kill", bundle.name, "KILL")
    deadline = time.monotonic() + 10
    while bundle.status() != "stopped" and time.monotonic() < deadline:
        time.sleep(0.02)
    done = run(bundle, bundle.name, "true")
    assert done.returncode == 255 and "cannot exec in a stopped container" in done.stderr


def test_a_paused_container_refuses_or_lets_it_wait(bundle):
    begin(bundle)
    bundle.call("pause", bundle.name)
    done = run(bundle, bundle.name, "true")
    assert done.returncode == 255 and "cannot exec in a paused container" in done.stderr
    waiting = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "exec", "--ignore-paused", bundle.name,
                                "echo", "x"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        bundle.call("resume", bundle.name)
        assert waiting.communicate(timeout=10)[0] == "x\n"
    finally:
        bundle.call("resume", bundle.name)
        waiting.kill()
        waiting.wait()


def test_a_created_container_can_be_entered(bundle):
    assert bundle.create("true").returncode == 0
    assert "pyhv-init" in inside(bundle, "cat /proc/1/comm")
    assert bundle.status() == "created"


# cgroups, failure, the library ---------------------------------------------------------------------------


def test_a_group_below_the_containers(bundle):
    first = begin(bundle)
    rows = [row.split(":", 2) for row in Path(f"/proc/{first}/cgroup").read_text().splitlines()]
    pids = next(path for _, names, path in rows if "pids" in names.split(","))
    folder = Path("/sys/fs/cgroup/pids" + pids)
    if not folder.is_dir():
        pytest.skip("no cgroup version 1 with pids at /sys/fs/cgroup/pids")
    (folder / "sub").mkdir()
    where = inside(bundle, "grep pids: /proc/self/cgroup", "--cgroup", "pids:/sub")
    assert where.strip().endswith("/sub")
    done = run(bundle, "--cgroup", "pids:/absent", bundle.name, "true")
    assert done.returncode == 255 and "no such group" in done.stderr
    done = run(bundle, "--cgroup", "pids:/../..", bundle.name, "true")
    assert done.returncode == 255 and "below the container" in done.stderr


def test_where_no_process_may_be_made_it_says_so_and_leaves_nothing(bundle):
    bundle.config["linux"]["resources"]["pids"] = {"limit": 1}
    begin(bundle)
    done = run(bundle, bundle.name, "true")
    assert done.returncode == 255 and "Resource temporarily unavailable" in done.stderr
    assert len(json.loads(bundle.call("ps", "-f", "json", bundle.name).stdout)) == 1


def test_a_killed_runtime_leaves_only_the_program(bundle):
    begin(bundle)
    going = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "exec", bundle.name, *WAIT],
                             stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while len(json.loads(bundle.call("ps", "-f", "json", bundle.name).stdout)) < 2:
        assert time.monotonic() < deadline
    going.kill()
    going.wait()
    assert bundle.call("delete", "--force", bundle.name).returncode == 0
    bundle.gone()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signals_are_passed_on(bundle, number, code):
    begin(bundle)
    going = subprocess.Popen([*RUNTIME, "--root", str(bundle.state), "exec", bundle.name, "sh", "-c",
                              "echo ready; exec sleep 1000"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert going.stdout and going.stdout.read(6) == b"ready\n"
    going.stdout.close()
    time.sleep(0.1)
    going.send_signal(number)
    assert going.wait(10) == code


def test_from_a_program_with_threads(bundle):
    begin(bundle)
    runtime = Runtime(str(bundle.state))
    before = sorted(os.listdir("/proc/self/fd"))
    codes = []

    def one(number: int) -> None:
        process = {"args": ["sh", "-c", f"exit {number}"], "cwd": "/", "env": ["PATH=/bin"]}
        pid = start_exec(runtime, bundle.name, process)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(codes) == list(range(8))
    for process, kind in (({"args": ["absent"], "cwd": "/"}, HvError), ({"args": [], "cwd": "/"}, ConfigError),
                          ({"args": ["true"], "cwd": "/", "terminal": True}, ConfigError)):
        with pytest.raises(kind):
            start_exec(runtime, bundle.name, process)
    with pytest.raises(ConfigError):
        start_exec(runtime, bundle.name, {"args": ["true"], "cwd": "/"}, ExecOptions(cgroups=("nothing:/x",)))
    with pytest.raises(StateError):
        start_exec(runtime, "absent", {"args": ["true"], "cwd": "/"})
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_librarys_face(bundle):
    """Create, start, exec, stats, wait, delete from a program, without a process of pyhv."""
    bundle.config["process"]["args"] = ["sh", "-c", "trap 'exit 3' TERM; while true; do sleep 0.02; done"]
    bundle.write()
    runtime = Runtime(str(bundle.state))
    runtime.create(bundle.name, str(bundle.folder))
    runtime.start(bundle.name)
    pid = runtime.exec(bundle.name, {"args": ["sh", "-c", "exit 4"], "cwd": "/", "env": ["PATH=/bin"]})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert runtime.stats(bundle.name)["pids"]["current"] >= 1
    with pytest.raises(StateError, match="runs on"):
        runtime.wait(bundle.name, 0.05)
    runtime.kill(bundle.name, signal.SIGTERM)
    assert runtime.wait(bundle.name, 10) == 3
    assert runtime.wait(bundle.name, 10) is None        # its code has been taken
    runtime.delete(bundle.name)
