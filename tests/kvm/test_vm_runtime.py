"""`pyhv-vm-runtime` alone, with a busybox bundle: the commands of an OCI runtime, in a real guest."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import RUNTIME, container
from framework.groups import until
from framework.vms import PATIENCE, VM_RUNTIME, VmBundle, VmHome

pytestmark = container


@pytest.fixture
def vm(vm_home: VmHome, tmp_path: Path) -> Iterator[VmBundle]:
    """A bundle; nothing of it is left at the end."""
    made = vm_home.bundle(tmp_path)
    yield made
    made.call("delete", "--force", made.name)
    made.gone()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.fixture(scope="module")
def box(vm_home: VmHome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmBundle]:
    """One that runs in the background and serves many checks: volumes, a name, a user's program."""
    folder = tmp_path_factory.mktemp("box")
    made = vm_home.bundle(folder)
    for name in ("volume", "locked"):
        (folder / name).mkdir()
        (folder / name / "f").write_text(name)
    (folder / "file").write_text("one file\n")
    made.config["hostname"] = "guest-7"
    made.config["mounts"] += [
        {"destination": "/volume", "type": "bind", "source": str(folder / "volume"), "options": ["rbind", "rw"]},
        {"destination": "/locked", "type": "bind", "source": str(folder / "locked"), "options": ["bind", "ro"]},
        {"destination": "/etc/file", "type": "bind", "source": str(folder / "file"), "options": ["bind", "ro"]},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m", "mode=755"]},
        {"destination": "/run/secret", "type": "bind", "source": str(folder / "file"), "options": ["bind", "ro"]}]
    made.config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}
    done = made.create("sh", "-c", "echo begun; trap 'exit 5' TERM; while :; do sleep 0.2; done")
    assert done.returncode == 0, done.stderr
    assert made.status() == "created"
    assert made.call("start", made.name).returncode == 0
    yield made
    assert made.call("delete", "--force", made.name).returncode == 0
    made.gone()


def execute(vm: VmBundle, *words: str, flags: tuple[str, ...] = (), **options: object) -> str:
    done = vm.call("exec", *flags, vm.name, *words, **options)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return str(done.stdout)


# run -----------------------------------------------------------------------------------------------


def test_run_passes_streams_and_the_exit_code(vm):
    done = vm.run("sh", "-c", "cat; echo aside >&2; id -u; exit 7", stdin=None, input="a line\n")
    assert (done.stdout, done.stderr, done.returncode) == ("a line\n0\n", "aside\n", 7)


def test_run_of_what_is_no_program(vm):
    done = vm.run("absent")
    assert done.returncode == 1 and 'exec: "absent": executable file not found in $PATH' in done.stderr
    done = vm.run("/etc/passwd")
    assert done.returncode == 1 and 'exec: "/etc/passwd": permission denied' in done.stderr


def test_run_takes_the_terminal_it_is_on(vm):
    vm.config["process"]["terminal"] = True
    vm.config["process"]["args"] = ["sh", "-c", "stty size; tty; read line; echo got $line; exit 3"]
    vm.write()
    child, master = pty.fork()
    if not child:
        os.chdir(vm.folder)
        os.execvpe(VM_RUNTIME[0], [*VM_RUNTIME, "--root", str(vm.state), "run", vm.name],
                   os.environ | vm.home.environment)
    import termios

    termios.tcsetwinsize(master, (33, 101))
    said = b""
    while b"/dev/pts/" not in said:
        said += os.read(master, 4096)
    os.write(master, b"words\r")
    try:
        while data := os.read(master, 4096):
            said += data
    except OSError:
        pass
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert b"33 101\r\n/dev/pts/0\r\n" in said and b"got words\r\n" in said


def test_a_read_only_root_and_a_user(vm):
    vm.config["root"]["readonly"] = True
    vm.config["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [7]}
    vm.config["process"]["cwd"] = "/tmp"
    out = vm.shell("id; pwd; echo $HOME; touch /tmp/x || echo refused; grep NoNewPrivs /proc/self/status")
    assert out.split("\n")[0].startswith("uid=1000") and "7" in out.split("\n")[0]
    assert out.split("\n")[1:3] == ["/tmp", "/tmp"] and "refused" in out and "NoNewPrivs:\t1" in out
    assert not list((vm.rootfs / "tmp").iterdir())


def test_signals_reach_the_program_and_its_end_is_ours(vm):
    vm.config["process"]["args"] = ["sh", "-c", "trap 'echo asked; exit 9' TERM; echo up; while :; do sleep 0.1; done"]
    vm.write()
    with subprocess.Popen([*VM_RUNTIME, "--root", str(vm.state), "run", vm.name], cwd=vm.folder, text=True,
                          stdout=subprocess.PIPE, env=os.environ | vm.home.environment) as runs:
        assert runs.stdout is not None and runs.stdout.readline() == "up\n"
        runs.terminate()
        assert runs.communicate(timeout=PATIENCE)[0] == "asked\n" and runs.returncode == 9


@pytest.mark.parametrize("change, why", [
    ({"namespaces": [{"type": "user"}, {"type": "mount"}], "uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}],
      "gidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}, "linux.namespaces: user"),
    ({"devices": [{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]}, "/dev/kvm: a device of the host")])
def test_what_is_refused_leaves_nothing(vm, change, why):
    vm.config["linux"] |= change
    if "namespaces" in change:
        vm.config.pop("hostname")
    done = vm.run("true")
    assert done.returncode == 1 and why in done.stderr and done.stderr.count("\n") == 1
    vm.gone()


def test_a_device_of_the_host_is_not_bound(vm):
    vm.config["mounts"].append({"destination": "/disk", "type": "bind", "source": "/dev/kvm", "options": ["bind"]})
    done = vm.run("true")
    assert done.returncode == 1 and "/dev/kvm is a device of the host" in done.stderr
    vm.gone()


def test_a_container_s_runtime_sends_it_here(vm):
    """`pyhv-runtime` with the annotation: a kernel of its own, by all commands."""
    vm.config["annotations"] = {"io.pyhv.vm": "true", "io.pyhv.vm.memory": "256"}
    done = vm.run("sh", "-c", "uname -r", runtime=RUNTIME)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != os.uname().release


# create, start, and what is asked of one that runs ---------------------------------------------------


def test_state_names_the_process_that_is_the_vm(box):
    state = json.loads(box.call("state", box.name).stdout)
    assert (state["status"], state["id"]) == ("running", box.name)
    assert Path(f"/proc/{state['pid']}/maps").exists()
    assert f'"{box.name}"' in box.call("list", "--format", "json").stdout
    assert box.call("start", box.name).returncode == 1


def test_the_file_system_is_the_bundle_s(box):
    folder = box.folder
    out = execute(box, "sh", "-c", "cat /volume/f /locked/f /etc/file /run/secret; echo new >/volume/made; "
                  "mkdir /made; touch /locked/x /etc/file /run/secret; touch /run/own; ls /run; hostname; "
                  "cat /proc/sys/net/ipv4/ip_forward; exit 0")
    assert out == "volumelockedone file\none file\nown\nsecret\nguest-7\n1\n"
    assert (folder / "volume/made").read_text() == "new\n" and (box.rootfs / "made").is_dir()
    assert sorted(path.name for path in (folder / "locked").iterdir()) == ["f"]
    (folder / "volume/made").write_text("by the host")
    assert until(lambda: execute(box, "cat", "/volume/made") == "by the host", 10)


def test_the_guest_s_own_file_systems(box):
    table = {line.split()[1]: line.split()[2] for line in execute(box, "cat", "/proc/mounts").splitlines()}
    assert {place: table.get(place) for place in ("/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/run")} == {
        "/": "virtiofs", "/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs", "/dev/pts": "devpts",
        "/dev/shm": "tmpfs", "/run": "tmpfs"}
    assert "/dev/.share" not in table
    out = execute(box, "sh", "-c", "ls -l /dev/fd /dev/stdout; echo x >/dev/null; head -c 4 /dev/urandom | wc -c")
    assert out.split()[-1] == "4"


def test_exec_passes_streams_codes_environment_and_directory(box):
    done = box.call("exec", "--env", "A=b c", "--cwd", "/tmp", box.name, "sh", "-c",
                    "pwd; echo $A; cat; echo aside >&2; kill -9 $$", stdin=None, input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == ("/tmp\nb c\nin\n", "aside\n", 137)
    done = box.call("exec", box.name, "absent")
    assert done.returncode == 255 and 'exec: "absent": executable file not found in $PATH' in done.stderr
    done = box.call("exec", "--user", "1000:1000", box.name, "id", "-u")
    assert done.stdout == "1000\n"


def test_exec_detached_leaves_a_process_that_stands_for_it(box):
    """Its pid file names it; its death kills the program; it dies with the program."""
    pid_file = box.folder / "pid"
    assert box.call("exec", "--detach", "--pid-file", str(pid_file), box.name, "sleep", "1000",
                    capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    proxy = int(pid_file.read_text())
    assert "sleep 1000" in box.call("ps", box.name).stdout
    assert sorted(os.readlink(f"/proc/{proxy}/fd/{fd}").partition(":")[0]
                  for fd in os.listdir(f"/proc/{proxy}/fd"))[:3] == ["/dev/null"] * 3
    os.kill(proxy, signal.SIGKILL)
    assert until(lambda: "sleep 1000" not in box.call("ps", box.name).stdout, 10)
    assert box.call("exec", "--detach", "--pid-file", str(pid_file), box.name, "sleep", "1", capture_output=False,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    proxy = int(pid_file.read_text())
    assert until(lambda: not alive(proxy), 20)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ps_and_figures(box):
    numbers = json.loads(box.call("ps", "--format", "json", box.name).stdout)
    table = box.call("ps", box.name).stdout
    assert numbers and "trap" in table and str(numbers[0]) in table
    figures = json.loads(box.call("events", "--stats", box.name).stdout)
    assert figures["type"] == "stats" and 0 < figures["data"]["memory"]["usage"]["usage"] < 256 << 20
    assert figures["data"]["cpu"]["usage"]["total"] > 0


def test_pause_and_resume(box):
    assert box.call("pause", box.name).returncode == 0 and box.status() == "paused"
    done = box.call("exec", box.name, "true")
    assert done.returncode == 255 and "is paused" in done.stderr
    assert box.call("pause", box.name).returncode == 1
    assert box.call("resume", box.name).returncode == 0 and box.status() == "running"
    execute(box, "true")


def test_commands_that_a_vm_has_not(box):
    for command in ("update", "checkpoint", "restore"):
        done = box.call(command, box.name)
        assert done.returncode == 1 and command in done.stderr and done.stderr.count("\n") == 1


def test_the_dispatcher_finds_a_vm_by_its_record(box):
    """Commands of `pyhv-runtime` on a VM that is there."""
    done = box.call("exec", box.name, "uname", "-r", runtime=RUNTIME)
    assert done.stdout.strip() != os.uname().release and done.returncode == 0
    assert json.loads(box.call("state", box.name, runtime=RUNTIME).stdout)["status"] == "running"


def test_two_share_the_template_s_pages(box, vm):
    """What neither has written to is in memory once: the template's file, mapped private by both."""
    assert vm.create("sleep", "1000").returncode == 0
    resident = []
    for one in (box, vm):
        rows = Path(f"/proc/{one.pid()}/smaps").read_text().split("\n")
        at = next(at for at, row in enumerate(rows) if "/templates/" in row and row.endswith("/memory"))
        fields = {row.split(":")[0]: int(row.split()[1]) for row in rows[at + 1:at + 20] if row.endswith(" kB")}
        resident.append((fields["Shared_Clean"], fields["Private_Dirty"]))
    assert all(shared > 1024 for shared, _ in resident), resident
    assert box.folder != vm.folder and vm.status() == "created"


def test_kill_and_delete(vm):
    assert vm.create("sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done").returncode == 0
    assert vm.call("delete", vm.name).returncode == 0       # created, never started
    vm.gone()
    assert vm.create("sleep", "1000").returncode == 0
    assert vm.call("start", vm.name).returncode == 0
    assert vm.call("delete", vm.name).returncode == 1, "it runs"
    pid = vm.pid()
    started = time.monotonic()
    assert vm.call("kill", vm.name, "KILL").returncode == 0
    assert until(lambda: not alive(pid), 10) and time.monotonic() - started < 8
    assert vm.status() == "stopped" and vm.call("kill", vm.name).returncode == 1
    assert vm.call("delete", vm.name).returncode == 0
    vm.gone()


def test_a_vm_whose_process_was_killed_leaves_nothing(vm):
    assert vm.create("sleep", "1000").returncode == 0
    pid = vm.pid()
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not alive(pid), 10)
    assert vm.status() == "stopped"
    assert vm.call("delete", vm.name).returncode == 0
    vm.gone()


def test_a_broken_template_is_made_again(vm_home, vm):
    """Cut short, as by a full disk: one line of warning, and it runs."""
    assert vm.run("true").returncode == 0
    folder = next(path for path in (vm_home.folder / "data/templates").iterdir() if (path / "state.json").exists())
    (folder / "state.json").write_bytes((folder / "state.json").read_bytes()[:1000])
    done = vm.run("echo", "again")
    assert done.stdout == "again\n" and "it is made anew" in done.stderr
    assert vm.run("echo", "again").stderr == ""
