"""podman and conmon, Debian's, with `pyhv-runtime` as their runtime: what their users do works as with runc."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle
from framework.engines import ENVIRONMENT, IMAGE, RUNTIME, Podman, groups_under, needs, until
from framework.terminal import OnTerminal

pytestmark = container
needs_podman = needs("podman", "conmon")
INITS = ("/usr/libexec/podman/catatonit", "/usr/bin/catatonit")       # where podman looks for it
LOOP = "while :; do sleep 0.1; done"
GREEDY = ("dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1")      # its buffer is 64 MiB


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    made = Podman()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def running(podman: Podman) -> Iterator[str]:
    """The name of a detached container that ends with 5 when it is asked to."""
    podman.call(*podman.new("run", "--detach", "--name", "box"), IMAGE, "sh", "-c",
                f"trap 'echo asked; exit 5' TERM; echo begun; {LOOP}")
    until(lambda: "begun" in podman.said("logs", "box"))
    yield "box"
    podman.call("rm", "--force", "--time", "0", "--ignore", "box")


@needs_podman
@pytest.mark.parametrize("words, code, text", [
    (("sh", "-c", "echo out; exit 7"), 7, ""), (("true",), 0, ""), (("sh", "-c", "kill -9 $$ & wait; exit 3"), 3, ""),
    (("/bin/absent",), 127, "no such file or directory"), (("absent",), 127, "executable file not found in $PATH"),
    (("/etc/passwd",), 126, "permission denied"), (("/etc",), 126, "permission denied")])
def test_podman_run_gives_the_programs_exit_code(podman, words, code, text):
    assert text in podman.run(IMAGE, *words, code=code).stderr


@needs_podman
def test_podman_run_passes_standard_input_and_output(podman):
    done = podman.run("--interactive", IMAGE, "sh", "-c", "cat; echo aside >&2", input="a line\n")
    assert (done.stdout, done.stderr) == ("a line\n", "aside\n")


@needs_podman
def test_podman_life_of_a_detached_container(podman, running):
    """ps, logs, stop with a grace, exit code, start again, kill, rm; nothing is left."""
    assert podman.said("ps", "--format", "{{.Names}} {{.Status}}").startswith("box Up")
    first = podman.inspect("box")["State"]["Pid"]
    conmon = Path(f"/proc/{first}/status").read_text().split("PPid:\t")[1].split()[0]
    assert Path(f"/proc/{conmon}/comm").read_text() == "conmon\n"
    children = Path(f"/proc/{conmon}/task/{conmon}/children").read_text().split()
    assert children == [str(first)]         # nobody of the runtime stays with it
    podman.call("stop", "--time", "20", "box")
    state = podman.inspect("box")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 5)
    assert podman.said("logs", "box").split() == ["begun", "asked"]
    podman.call("start", "box")
    podman.call("kill", "--signal", "KILL", "box")
    until(lambda: podman.inspect("box")["State"]["Status"] == "exited")
    assert podman.inspect("box")["State"]["ExitCode"] == 137
    podman.call("rm", "box")
    assert until(lambda: not [path for path in groups_under(podman.parent) if path.name.startswith("libpod-")])


@needs_podman
def test_podman_stop_kills_what_does_not_listen(podman):
    podman.call(*podman.new("run", "--detach", "--name", "deaf"), IMAGE, "sh", "-c", f"trap '' TERM; {LOOP}")
    podman.call("stop", "--time", "1", "deaf")
    assert podman.inspect("deaf")["State"]["ExitCode"] == 137
    podman.call("rm", "deaf")


@needs_podman
def test_podman_create_init_start_and_wait(podman):
    """The runtime's create and start one after the other, and the hook of both: the program runs at start only."""
    podman.call(*podman.new("create", "--name", "two"), IMAGE, "sh", "-c", "echo now; exit 4")
    podman.call("init", "two")
    assert podman.inspect("two")["State"]["Status"] == "initialized" and podman.said("logs", "two") == ""
    podman.call("start", "two")
    assert podman.said("wait", "two") == "4" and podman.said("logs", "two") == "now"
    podman.call("rm", "two")


@needs_podman
@pytest.mark.skipif(not any(map(os.path.exists, INITS)), reason="catatonit is not installed")
def test_podman_init_reaps_and_passes_signals_on(podman):
    """`--init`: the engine's own small init, bound into the container, is the first process."""
    orphan = "(sh -c 'sleep 0.1 & echo $! >/tmp/orphan') && sleep 0.5 && test ! -e /proc/$(cat /tmp/orphan)"
    said = podman.shell(f"readlink /proc/1/exe; echo $$; cat /proc/$$/status | grep PPid; {orphan} && echo reaped",
                        "--init")
    program, number, parent, reaped = said.splitlines()
    assert "init" in program and number != "1" and parent == "PPid:\t1" and reaped == "reaped"
    podman.run("--init", IMAGE, "sh", "-c", "exit 9", code=9)
    podman.call(*podman.new("run", "--detach", "--init", "--name", "inits"), IMAGE, "sh", "-c",
                f"trap 'echo asked; exit 5' TERM; echo begun; {LOOP}")
    try:
        assert until(lambda: "begun" in podman.said("logs", "inits"))
        podman.call("stop", "--time", "20", "inits")
        assert podman.inspect("inits")["State"]["ExitCode"] == 5 and "asked" in podman.said("logs", "inits")
    finally:
        podman.call("rm", "--force", "--time", "0", "inits")


@needs_podman
def test_podman_exec(podman, running):
    assert podman.said("exec", running, "cat", "/proc/1/comm") == "sh"
    podman.call("exec", running, "sh", "-c", "exit 3", code=3)
    podman.call("exec", running, "sh", "-c", "kill -9 $$", code=137)
    assert "no such file" in podman.call("exec", running, "/bin/absent", code=127).stderr
    assert "permission denied" in podman.call("exec", running, "/etc/passwd", code=126).stderr
    assert podman.said("exec", "--interactive", running, "cat", input="through\n") == "through"
    said = podman.said("exec", "--env", "GREETING=hi", "--workdir", "/tmp", "--user", "5:6", running, "sh", "-c",
                       "echo $GREETING $(pwd) $(id -u):$(id -g)")
    assert said == "hi /tmp 5:6"
    podman.call("exec", "--detach", running, "sleep", "77")
    assert until(lambda: "sleep 77" in podman.said("top", running, "pid", "args"))
    assert "CapEff:\t0000000000000000" in podman.said("exec", "--user", "5", running, "cat", "/proc/self/status")
    everything = "CapEff:\t" + Path("/proc/self/status").read_text().split("CapEff:\t")[1].split()[0]
    assert everything in podman.said("exec", "--privileged", running, "cat", "/proc/self/status")


def group_file(podman: Podman, name: str, leaf: str) -> str:
    """A file of the container's cgroup."""
    of = podman.inspect(name)["Id"]
    return next(path / leaf for path in groups_under(podman.parent) if of in path.name and (path / leaf).exists()
                ).read_text()


@needs_podman
def test_podman_pause_stats_and_update(podman, running):
    podman.call("pause", running)
    assert group_file(podman, running, "freezer.state") == "FROZEN\n"
    assert podman.said("ps", "--all", "--format", "{{.Status}}") == "Paused"
    podman.call("unpause", running)
    assert podman.said("ps", "--format", "{{.Status}}").startswith("Up")
    row = json.loads(podman.said("stats", "--no-stream", "--format", "json", running))[0]
    assert int(row["pids"]) >= 1 and not row["mem_usage"].startswith("0B")
    podman.call("update", "--memory", "64m", running)
    assert group_file(podman, running, "memory.limit_in_bytes") == f"{64 << 20}\n"


@needs_podman
def test_podman_terminal(podman, running):
    """run --tty, exec --tty and attach: the size of the caller's terminal, what is typed, the exit code."""
    script = "tty; sleep 0.5; stty size; read line; echo got $line; exit 3"
    command = podman.command(*podman.new("run", "--rm", "-it"), IMAGE, "sh", "-c", script)
    with OnTerminal(command=command, size=(30, 100)) as terminal:
        terminal.wait_for(b"30 100")
        terminal.type(b"keys\r")
        terminal.wait_for(b"got keys")
        assert terminal.end(30) == 3 and b"/dev/pts/0" in terminal.output
    with OnTerminal(command=podman.command("exec", "-it", running, "sh", "-c", script), size=(31, 101)) as terminal:
        terminal.wait_for(b"31 101")
        terminal.type(b"keys\r")
        assert terminal.end(30) == 3 and b"got keys" in terminal.output and b"/dev/pts/" in terminal.output
    podman.call(*podman.new("run", "--detach", "-it", "--name", "later"), IMAGE, "sh")
    with OnTerminal(command=podman.command("attach", "later"), size=(32, 102)) as terminal:
        terminal.type(b"echo $((6 * 7)); exit 9\r")
        terminal.end(30)
        assert b"\n42" in terminal.output
    assert podman.said("wait", "later") == "9"
    podman.call("rm", "later")


@needs_podman
def test_podman_memory_limit(podman):
    """Who takes more than there is gets killed, the others of the host don't."""
    assert podman.run("--memory", "20m", "--memory-swap", "20m", IMAGE, *GREEDY, code=137)


@needs_podman
@pytest.mark.parametrize("flags, script, expected", [
    (("--read-only", "--tmpfs", "/scratch"), "touch /a 2>/dev/null || echo refused; touch /scratch/a && echo made",
     "refused\nmade"),
    (("--cap-drop", "all"), "grep CapBnd /proc/self/status", "CapBnd:\t0000000000000000"),
    (("--user", "7:8", "--group-add", "9", "--umask", "077"), "id -u; id -G; umask", "7\n8 9\n0077"),
    ((), "grep Seccomp: /proc/self/status", "Seccomp:\t2"),
    (("--security-opt", "seccomp=unconfined"), "grep Seccomp: /proc/self/status", "Seccomp:\t0"),
    (("--security-opt", "no-new-privileges"), "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1"),
    (("--sysctl", "net.ipv4.ip_forward=1"), "cat /proc/sys/net/ipv4/ip_forward", "1"),
    (("--device", "/dev/kmsg:/dev/log:r"), "stat -c %t:%T /dev/log; (: > /dev/log) 2>/dev/null || echo refused",
     "1:b\nrefused"),
    (("--hostname", "elsewhere"), "hostname", "elsewhere"),
    (("--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000"), "tr -s ' ' < /proc/self/uid_map; id -u",
     "0 100000 1000\n0"),
    (("--pids-limit", "9"), "for i in 1 2 3 4 5 6 7 8 9; do sleep 0.2 & done", ""),
    (("--workdir", "/tmp"), "pwd", "/tmp"),
    (("--shm-size", "1m"), "dd if=/dev/zero of=/dev/shm/a bs=1M count=2 2>&1 | grep -c 'No space'", "1"),
    (("--privileged",), "test -e /dev/kmsg -a -w /sys && echo open", "open")], ids=str)
def test_podman_options_reach_the_container(podman, flags, script, expected):
    if "--pids-limit" in flags:
        assert "fork" in podman.run(*flags, IMAGE, "sh", "-c", script, code=None).stderr
    else:
        assert podman.shell(script, *flags) == expected


@needs_podman
def test_podman_volumes_keep_their_options(podman, tmp_path):
    (tmp_path / "file").write_text("of the host\n")
    said = podman.shell("cat /mnt/file; touch /mnt/new 2>/dev/null || echo refused; grep ' /mnt ' /proc/self/mounts",
                        "--volume", f"{tmp_path}:/mnt:ro,nosuid,nodev,noexec")
    lines = said.splitlines()
    assert lines[:2] == ["of the host", "refused"]
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(lines[2].split()[3].split(","))
    podman.shell("echo from inside > /mnt/new", "--volume", f"{tmp_path}:/mnt")
    assert (tmp_path / "new").read_text() == "from inside\n"


@needs_podman
def test_podman_joins_another_containers_namespaces(podman, running):
    script = "for kind in net pid ipc; do readlink /proc/self/ns/$kind; done"
    theirs = podman.said("exec", running, "sh", "-c", script)
    done = podman.call("run", "--rm", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", "--cgroup-parent",
                       f"/{podman.parent}", *(f"--{kind}=container:{running}" for kind in ("network", "pid", "ipc")),
                       IMAGE, "sh", "-c", script)
    assert done.stdout.strip() == theirs


@needs_podman
def test_podman_finds_the_runtime_by_name(podman):
    """containers.conf names it, as docs/containers.md shows."""
    command = podman.command(*podman.new("run", "--rm"), IMAGE, "echo", "by name", runtime="pyhv")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "by name\n"


@needs_podman
def test_podman_tells_a_refused_setting(podman):
    """An error of the runtime reaches the user as one line that names the cause."""
    done = podman.run("--ulimit", "nofile=1048577:99999999", IMAGE, "true", code=126)
    assert re.search(r"rlimit|RLIMIT_NOFILE", done.stderr) and "Traceback" not in done.stderr


class Conmon:
    """conmon on its own: the folder that it writes to, and what it said on its pipe."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.folder = bundle, bundle.folder / "conmon"
        self.folder.mkdir()

    def call(self, *flags: str, name: str = "") -> dict[str, object]:
        """Run conmon; what it says as soon as the container is there: its pid in `data`, or -1 and a message."""
        name = name or self.bundle.name
        ends, writes = os.pipe()
        command = ["conmon", "--api-version", "1", "--cid", self.bundle.name, "--cuuid", name, "--name", name,
                   "--runtime", RUNTIME, "--runtime-arg", "--root", "--runtime-arg", str(self.bundle.state), "--bundle",
                   str(self.bundle.folder), "--container-pidfile", str(self.folder / "pid"), "--conmon-pidfile",
                   str(self.folder / "conmon-pid"), "--exit-dir", str(self.folder), "--persist-dir", str(self.folder),
                   "--log-path", f"k8s-file:{self.folder}/log", "--log-level", "error", "--full-attach", *flags]
        try:
            # it writes a file `oom` into its working directory
            subprocess.run(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=ENVIRONMENT | {"_OCI_SYNCPIPE": str(writes)},
                           pass_fds=[writes], timeout=30, check=False)
            os.close(writes)
            with os.fdopen(ends) as file:
                said: dict[str, object] = json.loads(file.readline())
                return said
        finally:
            self.conmon_ended = lambda: not Path(f"/proc/{(self.folder / 'conmon-pid').read_text()}").exists()

    def code(self) -> int:
        """The exit code that conmon wrote down."""
        file = self.folder / self.bundle.name
        return int(until(lambda: file.exists() and file.read_text()))

    def log(self) -> list[str]:
        """Stream, F or P, and text of each line."""
        return [line.split(" ", 1)[1] for line in (self.folder / "log").read_text().splitlines()]


@pytest.fixture
def conmon(bundle: Bundle) -> Conmon:
    return Conmon(bundle)


def begin(conmon: Conmon, script: str, *flags: str, terminal: bool = False) -> None:
    conmon.bundle.config["process"] |= {"args": ["sh", "-c", script], "terminal": terminal}
    conmon.bundle.write()
    pid = conmon.call(*flags)["data"]
    assert isinstance(pid, int) and pid > 0 and conmon.bundle.pid() == pid
    assert conmon.bundle.status() == "created" and not conmon.log()
    assert conmon.bundle.call("start", conmon.bundle.name).returncode == 0


@needs("conmon")
def test_conmon_keeps_output_and_exit_code(conmon):
    begin(conmon, "echo out; echo aside >&2; exit 6")
    assert conmon.code() == 6
    assert sorted(conmon.log()) == ["stderr F aside", "stdout F out"]
    assert until(conmon.conmon_ended)


@needs("conmon")
def test_conmon_on_a_terminal(conmon):
    """The descriptor of the terminal comes to conmon's socket."""
    begin(conmon, "tty; test -t 0 && echo a terminal; exit 4", "--terminal", terminal=True)
    assert conmon.code() == 4
    assert [line.replace("\r", "") for line in conmon.log()] == ["stdout F /dev/pts/0", "stdout F a terminal"]


@needs("conmon")
def test_conmon_sees_signals_and_memory_run_out(conmon):
    conmon.bundle.config["linux"]["resources"]["memory"] = {"limit": 20 << 20, "swap": 20 << 20}
    begin(conmon, "exec " + " ".join(GREEDY))
    assert conmon.code() == 128 + signal.SIGKILL
    assert (conmon.folder / "oom").exists()


@needs("conmon")
def test_conmon_exec(conmon):
    begin(conmon, LOOP)
    second = Conmon.__new__(Conmon)
    second.bundle, second.folder = conmon.bundle, conmon.bundle.folder / "exec"
    second.folder.mkdir()
    process = conmon.bundle.config["process"] | {"args": ["sh", "-c", "echo in $(cat /proc/1/comm); exit 8"]}
    (second.folder / "process.json").write_text(json.dumps(process))
    said = second.call("--exec", "--exec-process-spec", str(second.folder / "process.json"), name="second")
    assert isinstance(said["data"], int) and said["data"] > 0
    code = second.folder / conmon.bundle.name
    assert int(until(lambda: code.exists() and code.read_text())) == 8
    assert second.log() == ["stdout F in sh"]
    process["args"] = ["/absent"]
    (second.folder / "process.json").write_text(json.dumps(process))
    said = second.call("--exec", "--exec-process-spec", str(second.folder / "process.json"), name="third")
    assert said["data"] == -1 and "no such file or directory" in str(said["message"])
    conmon.bundle.call("kill", conmon.bundle.name, "KILL")
    assert conmon.code() == 137


@needs("conmon")
def test_conmon_gets_the_reason_of_a_failure(conmon):
    conmon.bundle.config["process"]["args"] = ["/absent"]
    conmon.bundle.write()
    said = conmon.call()
    assert said["data"] == -1 and "no such file or directory" in str(said["message"])
