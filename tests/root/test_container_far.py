"""Both ways to a container: its first process as a program that is told what to do (far.py), and as a fork of the
runtime. They make the same calls, so what comes of it is the same, errors too."""

from __future__ import annotations

import json
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import Bundle, container, plain_signals
from framework.bundle import bundle as bundle

from hv.container import far
from hv.container.process import Plan
from hv.container.runtime import CreateOptions, Runtime
from hv.container.state import Record
from hv.errors import HvError, KernelError
from hv.linux.syscall import call_at

pytestmark = container
LOOK = ("cat /proc/self/mountinfo; grep -v '^Vm\\|^Rss\\|ctxt\\|^Cpus\\|^Mems' /proc/self/status; pwd; id; env;"
        " ulimit -a; ls -lnR /dev; ls -l /proc/self/fd; cat /proc/self/limits; hostname; umask;"
        " stat -c '%a %u %g' /tmp /srv")


def by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it done that way, and see that it was."""
    if way == "fork":
        monkeypatch.setattr(far, "able", lambda plan: False)
    else:
        monkeypatch.setattr("hv.container.process.clone", None)
        monkeypatch.setattr("hv.container.process.stage_one", None)


def run(made: Bundle) -> tuple[int | None, str]:
    """Exit code and what the program has written to the container's /tmp/out."""
    made.write()
    runtime = Runtime(str(made.state))
    runtime.create(made.name, str(made.folder), start=True)
    try:
        code = runtime.wait(made.name, 20)
        out = made.rootfs / "tmp/out"
        return code, plain_signals(out.read_text()) if out.exists() else ""
    finally:
        runtime.delete(made.name, force=True)


def change(config: dict[str, Any]) -> None:
    """Much of what a configuration can ask for, without what needs the fork."""
    config["root"]["readonly"] = False
    config["process"] |= {"cwd": "/made/for/it",
                          "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6], "umask": 7},
                          "oomScoreAdj": 100, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}],
                          "args": ["sh", "-c", f"({LOOK}) > /tmp/out 2>&1; exit 3"]}
    config["mounts"] += [
        {"destination": "/srv", "type": "tmpfs", "source": "none", "options": ["ro", "size=64k"]},
        {"destination": "/deep/er/file", "source": "/etc/hostname", "options": ["bind", "ro"]},
        {"destination": "/tree", "source": "/proc", "type": "bind", "options": ["rbind", "rro", "slave"]},
        {"destination": "/link", "type": "tmpfs", "options": ["mode=711"]}]
    config["linux"]["devices"] = [{"path": "/dev/more/full", "type": "c", "major": 1, "minor": 7, "uid": 9, "gid": 9,
                                   "fileMode": 0o640}, {"path": "/dev/pipe", "type": "p"}]
    config["linux"]["maskedPaths"] += ["/etc/passwd", "/none"]
    config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}
    config["linux"]["resources"] |= {"pids": {"limit": 50}}


@pytest.mark.parametrize("propagation", ["", "rprivate"])
def test_the_program_sees_the_same(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, propagation: str) -> None:
    change(bundle.config)
    bundle.config["linux"]["rootfsPropagation"] = propagation
    seen = []
    for way in ("far", "fork"):
        (bundle.rootfs / "link").unlink(missing_ok=True)
        (bundle.rootfs / "link").symlink_to("not/there/yet")
        with monkeypatch.context() as patch:
            by(way, patch)
            code, text = run(bundle)
        assert code == 3, text
        (bundle.rootfs / "tmp/out").unlink()
        # numbers that count on, times, sizes of a moment
        lines = [line for line in text.splitlines() if not line.startswith(("Pid", "total"))]
        seen.append([" ".join(word for word in line.split() if ":" not in word or word.endswith(":"))
                     if " - " not in line else line.split(None, 3)[3] for line in lines])
    assert len(seen[0]) > 120
    assert seen[0] == seen[1]


BAD = {
    "no program": lambda c: c["process"].update(args=["nothing-there"]),
    "no such path": lambda c: c["process"].update(args=["/nothing/there"]),
    "not to be run": lambda c: c["process"].update(args=["/etc/passwd"]),
    "a folder": lambda c: c["process"].update(args=["/etc"]),
    "no interpreter": lambda c: c["process"].update(args=["/script"]),
    "ourselves": lambda c: c["process"].update(args=["/proc/self/exe"]),
    "cwd is a file": lambda c: c["process"].update(cwd="/etc/passwd"),
    "cwd outside": lambda c: c["process"].update(cwd="/proc/self/fd/5"),
    "no such source": lambda c: c["mounts"].append({"destination": "/x", "source": "/none/such", "options": ["bind"]}),
    "no such file system": lambda c: c["mounts"].append({"destination": "/x", "type": "nonefs"}),
    "no such option": lambda c: c["mounts"].append({"destination": "/x", "type": "tmpfs", "options": ["nonsense=5"]}),
    "into proc": lambda c: c["mounts"].append({"destination": "/toproc", "type": "tmpfs"}),
    "a file in the way": lambda c: c["mounts"].append({"destination": "/etc/passwd/x", "type": "tmpfs"}),
    "a device in the way": lambda c: c["linux"].update(devices=[{"path": "/etc/passwd", "type": "c", "major": 1,
                                                                 "minor": 3}]),
    "a sysctl": lambda c: c["linux"].update(sysctl={"net.none": "1"}),
    "a limit": lambda c: c["process"].update(rlimits=[{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 1 << 40}]),
    "a namespace": lambda c: c["linux"]["namespaces"].__setitem__(
        [row["type"] for row in c["linux"]["namespaces"]].index("uts"), {"type": "uts", "path": "/proc/self/ns/net"}),
    "a user": lambda c: (c["process"].update(user={"uid": 0, "gid": 0, "additionalGids": list(range(70000))})),
    "no path": lambda c: c["mounts"].append({"destination": "/x\ud800", "type": "tmpfs"}),
    "no sysctl": lambda c: c["linux"].update(sysctl={"net.ipv4.ip_forward\0x": "1"}),
    "no text": lambda c: c["linux"].update(sysctl={"net.ipv4.ip_forward": "\ud800"}),
    "no host": lambda c: c.update(hostname="a\ud800"),
    "proc is a link": lambda c: c["mounts"].insert(0, {"destination": "/toproc", "type": "proc"}),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_are_the_same(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (bundle.rootfs / "toproc").symlink_to("proc/tty")
    (bundle.rootfs / "script").write_text("#!/nothing/there\n")
    (bundle.rootfs / "script").chmod(0o755)
    BAD[what](bundle.config)
    said = []
    for way in ("far", "fork"):
        with monkeypatch.context() as patch:
            by(way, patch)
            with pytest.raises(HvError) as told:
                run(bundle)
        said.append(str(told.value) + (f" - {told.value.hint}" if told.value.hint and way == "far" else ""))
        bundle.gone()
    assert said[0] == said[1]


def test_no_python_is_in_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the container is made, and while it waits to be started."""
    by("far", monkeypatch)
    bundle.config["process"]["args"] = ["true"]
    bundle.write()
    runtime, found = Runtime(str(bundle.state)), []

    def look(pid: int) -> None:
        exe, maps = os.readlink(f"/proc/{pid}/exe"), Path(f"/proc/{pid}/maps").read_text()
        found.append((pid, exe, "python" in maps, os.stat(f"/proc/{pid}/status").st_uid,
                      int(Path(f"/proc/{pid}/statm").read_text().split()[1])))

    def ready() -> None:
        look(runtime.group(Record(str(bundle.state), bundle.name).load()).pids()[0])

    runtime.create(bundle.name, str(bundle.folder), CreateOptions(on_ready=ready))
    pid = json.loads((bundle.state / bundle.name / "state.json").read_text())["pid"]
    look(pid)
    assert len(os.listdir(f"/proc/{pid}/fd")) == 4          # the standard ones and the socket that it waits at
    runtime.start(bundle.name)
    assert runtime.wait(bundle.name, 20) == 0
    runtime.delete(bundle.name)
    assert [row[0] for row in found] == [pid, pid]
    for _, exe, python, _, pages in found:
        assert "memfd:pyhv-init" in exe and not python and pages < 100, found


def test_from_many_threads_at_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them forks, and no descriptor of one container gets into another or stays."""
    by("far", monkeypatch)
    bundle.config["process"]["args"] = ["sh", "-c", "exit $(ls /proc/self/fd | wc -l)"]
    bundle.write()
    runtime, codes, before = Runtime(str(bundle.state)), [], len(os.listdir("/proc/self/fd"))

    def one(number: int) -> None:
        for round in range(3):
            name = f"{bundle.name}-{number}-{round}"
            runtime.create(name, str(bundle.folder), start=True)
            codes.append(runtime.wait(name, 30))
            runtime.delete(name)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [4] * 12        # the standard ones, and the folder that ls reads
    runtime.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_memory_limit_that_is_too_low_kills_the_container_alone(bundle: Bundle,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process shares no memory with the runtime, or the kernel would end that too."""
    by("far", monkeypatch)
    bundle.config["process"]["args"] = ["true"]
    bundle.config["linux"]["resources"] |= {"memory": {"limit": 4096}}
    with pytest.raises(HvError):
        run(bundle)
    bundle.gone()


def test_where_nobody_can_be_born_in_a_group_it_is_moved_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.7, or a sandbox without clone3."""
    by("far", monkeypatch)
    launch = far.Program.launch

    def refuse(self: far.Program, flags: int, cgroup: int, kept: list[int], born: object) -> int:
        if cgroup >= 0:
            raise KernelError("clone3", 38)
        return launch(self, flags, cgroup, kept, born)

    monkeypatch.setattr(far.Program, "launch", refuse)
    bundle.config["linux"]["namespaces"] = [row for row in bundle.config["linux"]["namespaces"]
                                            if row["type"] != "cgroup"]
    bundle.config["root"]["readonly"] = False
    bundle.config["process"]["args"] = ["sh", "-c", "cat /proc/self/cgroup > /tmp/out"]
    code, text = run(bundle)
    assert code == 0 and text
    for line in text.splitlines():
        assert line.endswith(f"/pyhv-{bundle.name}"), text


def test_a_signal_right_behind_the_clone_leaves_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler's exception, before the interpreter has the number of the new process."""
    by("far", monkeypatch)

    def interrupted(*words: int) -> int:
        call_at(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(far, "call_at", interrupted)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        run(bundle)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    bundle.gone()
    assert len(os.listdir("/proc/self/fd")) <= before + 1       # the program, kept for the next one


def test_what_needs_python_or_rights_is_done_by_a_fork(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def see(plan: Plan) -> bool:
        plans.append(plan)
        return able(plan)

    able = far.able
    monkeypatch.setattr(far, "able", see)
    assert run(bundle)[0] == 0
    plan, = plans
    assert able(plan)
    plan.pivot = False
    assert not able(plan)
    plan.pivot = True
    monkeypatch.setattr(far, "rootless", lambda: True)
    assert not able(plan)


@pytest.mark.parametrize("way", ["far", "fork"])
def test_a_file_is_made_for_a_mount_in_a_root_that_becomes_read_only(bundle: Bundle, monkeypatch: pytest.MonkeyPatch,
                                                                     way: str) -> None:
    by(way, monkeypatch)
    bundle.config["root"]["readonly"] = True
    bundle.config["mounts"].append({"destination": "/new/file", "source": "/etc/passwd", "options": ["bind", "ro"]})
    bundle.config["process"]["args"] = ["sh", "-c", "test -s /new/file && ! touch /x && exit 7"]
    assert run(bundle) == (7, "")
    assert (bundle.rootfs / "new/file").stat().st_mode == 0o100644


def test_few_descriptors_are_enough(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not closed at once is closed before there are too many."""
    by("far", monkeypatch)
    bundle.config["mounts"] += [{"destination": f"/many/{number}", "type": "tmpfs"} for number in range(60)]
    bundle.config["process"]["args"] = ["sh", "-c", "exit $(grep -c /many/ /proc/mounts)"]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, before[1]))
    try:
        assert run(bundle) == (60, "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
