"""A real guest whose init is the agent, its root a shared folder: processes from the host, as they are elsewhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.guest_init import Guest, Terminal, boot, make_root
from framework.linux import skip_without_build_tools
from framework.run import needs_kvm

from hv.sandbox.agent import MS_BIND, MS_RDONLY, MS_REMOUNT
from hv.sandbox.process import GuestProcess, StartError
from hv.snapshot.agent import RefusedError
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(600),
              pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")]

MANY = 66
CAPABILITIES = 1 << 0 | 1 << 10             # CAP_CHOWN, CAP_NET_BIND_SERVICE


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    skip_without_build_tools()
    root = tmp_path_factory.mktemp("root") / "root"
    one = boot(make_root(root))
    one.root = root
    try:
        one.agent.wait_ready(60)
        one.agent.mount("virtiofs", "root", "/root")
        one.agent.root("/root", ("dev", "proc", "sys"))
        yield one
        assert not any(device.faults for device in one.machine.devices.values())
    finally:
        one.close()


def test_a_program_its_output_and_its_code(guest: Guest) -> None:
    ran = guest.shell("echo out; echo err >&2; exit 7")
    assert (ran.out, ran.err, ran.status) == (b"out\n", b"err\n", ("exit", 7))
    assert guest.run("true", program="/bin/true").status == ("exit", 0)


def test_arguments_environment_and_folder(guest: Guest) -> None:
    ran = guest.run("sh", "-c", 'printf "%s|" "$@"; env; pwd', "zero", "a b", "", "ä", env=("PATH=/bin", "X=1 2", "Y="),
                    cwd="/home")
    assert ran.out.startswith("a b||ä|".encode()) and ran.out.endswith(b"/home\n")
    assert {b"X=1 2", b"Y="} < set(ran.out.split(b"|")[-1].splitlines())


def test_a_long_argument(guest: Guest) -> None:
    text = os.urandom(50_000).hex()             # more than a frame, with the next one
    ran = guest.run("echo", text, text)
    assert ran.out == f"{text} {text}\n".encode()


def test_what_a_process_starts_with(guest: Guest) -> None:
    """No descriptor of the agent's, its own session, no signal blocked or ignored."""
    assert guest.run("ls", "/proc/self/fd").out.split() == [b"0", b"1", b"2", b"3"], "3 is the folder that ls reads"
    stat, status = guest.run("cat", "/proc/self/stat", "/proc/self/status").out.decode().split("\n", 1)
    assert stat.split()[3:6] == ["1", stat.split()[0], stat.split()[0]], "parent, group, session"
    assert {"SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000"} <= set(status.splitlines()), status


@pytest.mark.parametrize(("argv", "options", "errno", "text"), [
    (("nope",), {}, 2, "exec nope: No such file"), (("/bin/nope",), {}, 2, "exec /bin/nope"),
    (("/etc",), {}, 13, "exec /etc: Permission denied"), (("plain",), {}, 13, "exec plain: Permission denied"),
    (("noise",), {}, 8, "exec noise: Exec format error"), (("true",), {"cwd": "/nope"}, 2, "chdir /nope: No such file"),
    (("true",), {"cwd": "/bin/true"}, 20, "chdir /bin/true: Not a directory"),
    (("true",), {"env": ("PATH=/etc:/home",)}, 2, "exec true"), (("",), {}, 2, "exec: No such file"),
    (("true",), {"rlimits": [(99, 1, 1)]}, 22, "setrlimit: Invalid"),
    (("true",), {"capabilities": [1, 3, 0, 1, 0]}, 1, "capset: Operation not permitted"),
])
def test_what_can_not_be_started(guest: Guest, argv: tuple[str, ...], options: dict, errno: int, text: str) -> None:
    with pytest.raises(StartError, match=text) as caught:
        guest.start(*argv, **options).wait(30)
    assert caught.value.errno == errno


def test_a_mebibyte_out(guest: Guest) -> None:
    data = os.urandom(1 << 20)
    (guest.root / "tmp/big").write_bytes(data)
    ran = guest.shell("md5sum < /tmp/big >&2; cat /tmp/big")
    assert ran.out == data and hashlib.md5(data).hexdigest() == ran.err.split()[0].decode()


def test_binary_input_and_its_end(guest: Guest) -> None:
    data = os.urandom(150_000)
    ran = guest.run("cat", given=data)
    assert ran.out == data and ran.status == ("exit", 0)
    assert guest.run("cat").out == b"", "without input it is at its end"
    ran = guest.run("true", given=data)
    assert ran.status == ("exit", 0), "input that nobody reads"


def test_a_slow_reader_holds_up_its_process_alone(guest: Guest) -> None:
    out, theirs = os.pipe()
    slow = guest.start("dd", "if=/dev/zero", "bs=65536", "count=16", stdout=theirs)
    slow.wait_started(30)
    os.close(theirs)
    assert guest.run("echo", "others go on").out == b"others go on\n"
    assert slow.status is None
    size = 0
    while part := os.read(out, 1 << 16):
        assert not part.strip(b"\0")
        size += len(part)
    os.close(out)
    assert size == 16 << 16 and slow.wait(30) == ("exit", 0)


def test_signals_pass_input_that_nobody_reads(guest: Guest) -> None:
    mine, theirs = os.pipe()
    one = guest.start("sleep", "100", stdin=mine)
    os.close(mine)
    os.set_blocking(theirs, False)
    one.wait_started(30)
    written = 0
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            written += os.write(theirs, bytes(65536))
        except BlockingIOError:
            time.sleep(0.02)
    assert 100_000 < written < 1 << 20, "the window, and what pipes hold"
    one.signal(signal.SIGTERM)
    assert one.wait(30) == ("signal", signal.SIGTERM)
    os.close(theirs)


def test_who_reads_no_more_ends_the_writer(guest: Guest) -> None:
    out, theirs = os.pipe()
    one = guest.start("sh", "-c", "while echo y; do :; done", stdout=theirs)
    os.close(theirs)
    assert os.read(out, 2) == b"y\n"
    os.close(out)
    assert one.wait(30) in (("signal", signal.SIGPIPE), ("exit", 1), ("exit", 0))


def test_signals_and_how_it_ended(guest: Guest) -> None:
    assert guest.shell("kill -9 $$").status == ("signal", 9)
    terminal = Terminal(guest, "sh", "-c", "trap 'echo got it; exit 3' USR1; echo ready; while :; do read x; done")
    terminal.expect(b"ready")
    terminal.process.signal(signal.SIGUSR1)
    terminal.expect(b"got it")
    assert terminal.process.wait(30) == ("exit", 3)
    terminal.close()
    sleeper = guest.start("sleep", "100")
    guest.agent.kill(sleeper.wait_started(30), signal.SIGKILL)
    assert sleeper.wait(30) == ("signal", signal.SIGKILL)
    for words in (("kill", "1", "9"), ("kill", "0", "9"), ("kill", "99999", "9"), ("kill", "x", "9"),
                  ("kill", "5", "65")):
        with pytest.raises(RefusedError):
            guest.agent.ask(*words)


def test_a_terminal(guest: Guest) -> None:
    terminal = Terminal(guest, "sh", "-c", "tty; stty size; cat; echo -n 'again? '; read x; stty size; exit 5")
    terminal.expect(b"/dev/pts/")
    terminal.expect(b"24 80\r\n")
    time.sleep(0.5)                             # for cat to be there, though nothing depends on it
    terminal.type(b"hello\r")
    terminal.expect(b"hello\r\n")               # the terminal's own echo
    terminal.expect(b"hello\r\n")
    terminal.type(b"\x04")                      # the end of cat's input, by its terminal
    terminal.expect(b"again? ")
    terminal.process.resize(50, 132)
    terminal.type(b"\r")
    terminal.expect(b"50 132")
    assert terminal.process.wait_end(30) == ("exit", 5)
    terminal.close()


def test_a_terminals_keys_and_its_end(guest: Guest) -> None:
    terminal = Terminal(guest, "sh", "-c", "trap 'echo interrupted' INT; echo ready; read x; cat; exit 4")
    terminal.expect(b"ready")
    terminal.type(b"\x03")
    terminal.type(b"\r")
    terminal.expect(b"interrupted")
    os.close(terminal.into)                     # the end of our input is that of cat's
    assert terminal.process.wait_end(30) == ("exit", 4)
    os.close(terminal.out)


def test_users_and_groups(guest: Guest) -> None:
    ran = guest.shell("id; echo by name > /dev/stdout; echo > /home/mine; umask", uid=1000, gid=1001, groups=[7, 9],
                      umask=0o27)
    assert ran.out.startswith(b"uid=1000 gid=1001 groups=7,9"), ran
    assert ran.out.endswith(b"by name\n0027\n") and ran.status == ("exit", 0), ran
    assert guest.shell("echo > /bin/x", uid=1000).status == ("exit", 1)


def test_capabilities_limits_and_the_like(guest: Guest) -> None:
    script = "cat /proc/$$/status; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj"
    sets = [CAPABILITIES, CAPABILITIES, CAPABILITIES, CAPABILITIES, 1 << 10]
    ran = guest.shell(script, uid=1000, gid=1000, capabilities=sets, no_new_privs=True, rlimits=[(7, 100, 200)],
                      oom_score_adj=-17)
    lines = ran.out.decode().splitlines()
    want = {"CapBnd": CAPABILITIES, "CapInh": CAPABILITIES, "CapPrm": 1 << 10, "CapEff": 1 << 10, "CapAmb": 1 << 10}
    assert {f"{name}:\t{bits:016x}" for name, bits in want.items()} <= set(lines), ran
    assert "NoNewPrivs:\t1" in lines and lines[-3:] == ["100", "200", "-17"], ran
    lines = guest.shell(script, capabilities=[CAPABILITIES] * 4 + [0]).out.decode().splitlines()
    assert {f"CapEff:\t{CAPABILITIES:016x}", f"CapBnd:\t{CAPABILITIES:016x}", "NoNewPrivs:\t0"} <= set(lines), lines


def test_output_of_those_it_left_behind(guest: Guest) -> None:
    out, theirs = os.pipe()
    one = guest.start("sh", "-c", "(sleep 2; echo late) & echo early; exit 2", stdout=theirs)
    os.close(theirs)
    assert one.wait(30) == ("exit", 2) and not one.ended
    assert os.read(out, 99) == b"early\n"
    assert one.wait_end(30) == ("exit", 2)
    assert os.read(out, 99) == b"late\n"
    os.close(out)


def test_orphans_are_reaped(guest: Guest) -> None:
    assert guest.shell("(sh -c 'sleep 1 & exit' &); exit").status == ("exit", 0)
    end = time.monotonic() + 20
    while left := [one for one in guest.agent.processes() if one.state == "Z" or one.name == "sleep"]:
        assert time.monotonic() < end, [(one.pid, one.state) for one in left]
        time.sleep(0.2)


def test_many_at_once(guest: Guest) -> None:
    """All at the same time; what is for one reaches that one alone."""
    ends = [os.pipe() for _ in range(MANY)]
    outs = [os.memfd_create("out") for _ in range(MANY)]
    many = [guest.start("patient", f"{n}", stdin=ends[n][0], stdout=outs[n]) for n in range(MANY)]
    pids = [one.wait_started(120) for one in many]
    assert guest.agent.stats(60).processes == MANY
    listed = guest.agent.processes()
    assert [one.pid for one in listed] == sorted(pids)
    assert {one.pid: one.command for one in listed} == {pid: ["patient", f"{n}"] for n, pid in enumerate(pids)}
    assert all(one.name == "patient" and one.ppid == 1 and one.uid == 0 and one.rss for one in listed)
    for n, one in enumerate(many):
        os.write(ends[n][1], b"%d\n" % n)
        if n % 3 == 0:
            one.signal(signal.SIGKILL)
        for fd in ends[n]:
            os.close(fd)
    for n, one in enumerate(many):
        assert one.wait_end(120) == (("exit", n) if n % 3 else ("signal", signal.SIGKILL))
        assert os.pread(outs[n], 99, 0) in ([b"%d\n" % n] if n % 3 else [b"%d\n" % n, b""])
        os.close(outs[n])
    assert guest.agent.stats(60).processes == 0


def test_mounts_and_what_dev_needs(guest: Guest) -> None:
    agent = guest.agent
    agent.mount("tmpfs", "", "/tmp/new/dir", 0, "size=64k,mode=700")
    agent.ask("dir", "/tmp/new/dir/a/b", "1777")
    agent.ask("node", "/tmp/new/dir/null", "c", "666", "1", "3")
    agent.ask("symlink", "/proc/self/fd", "/tmp/new/dir/fd")
    agent.ask("write", "/tmp/new/dir/file", "a%20line%0A")
    agent.mount("", "/tmp/new/dir/file", "/tmp/there/file", MS_BIND)
    agent.mount("", "", "/tmp/there/file", MS_BIND | MS_REMOUNT | MS_RDONLY)
    ran = guest.shell("cat /tmp/there/file; echo x > /tmp/new/dir/null; ls -ld /tmp/new/dir /tmp/new/dir/a/b; "
                      "ls -l /tmp/new/dir; echo > /tmp/there/file")
    assert ran.status == ("exit", 1) and b"Read-only" in ran.err, ran
    text = ran.out.decode()
    assert text.startswith("a line\n") and "drwxrwxrwt" in text and "drwx------" in text and "crw-rw-rw-" in text
    assert "fd -> /proc/self/fd" in text
    agent.ask("unmount", "/tmp/there/file")
    agent.ask("unmount", "/tmp/new/dir", "2")
    for words in (("mount", "nope", "-", "/tmp", "0", "-"), ("mount", "tmpfs", "-", "/tmp", "x", "-"),
                  ("dir", "/x", "9"), ("dir", "%zz", "755"), ("dir", "%00", "755"),
                  ("node", "/tmp/n", "x", "1", "1", "1"), ("unmount", "/tmp"),
                  ("root", "/nope"), ("write", "/proc/sys/kernel/nope", "1")):
        with pytest.raises(RefusedError):
            pytest.fail(f"{words}: ok {agent.ask(*words)}")
    answers = b"".join(agent.request_line("ping") for _ in range(300))
    assert agent._exchange(answers, time.monotonic() + 30, 300).count("ok pyhv-agent 1") == 300


def test_the_network(guest: Guest) -> None:
    guest.agent.network("eth0", "02:00:00:00:00:09", "10.4.0.2/16", "10.4.0.1", 1400)
    guest.agent.ask("route", "eth0", "10.9.0.0/16", "10.4.0.7")
    ran = guest.run("sh", "-c", "busybox ifconfig; busybox route -n", env=("PATH=/bin",))
    text = ran.out.decode()
    assert "02:00:00:00:00:09" in text and "addr:10.4.0.2 " in text and "MTU:1400" in text and "127.0.0.1" in text, ran
    assert "10.9.0.0" in text and "10.4.0.7" in text and "0.0.0.0         10.4.0.1" in text, ran
    for words in (("mtu", "eth0", "5"), ("mtu", "eth9", "1500"), ("link", "eth0", "x"), ("route", "eth0", "10.0.0.0"),
                  ("route", "eth9", "10.0.0.0/8")):
        with pytest.raises(RefusedError):
            guest.agent.ask(*words)


def test_it_sleeps_where_nothing_is_to_be_done(guest: Guest) -> None:
    before = guest.agent.stats()
    time.sleep(2)
    after = guest.agent.stats()
    assert after.cpu_user + after.cpu_system - before.cpu_user - before.cpu_system < 1
    assert after.uptime > before.uptime + 1.5 and after.memory_total > after.memory_available > 0


def test_shutdown(guest: Guest) -> None:
    """The last one, for the guest is gone behind it: processes get a chance, what they say then is heard."""
    one = Terminal(guest, "sh", "-c", "trap 'echo ending; exit 6' TERM; echo ready; read x; read x")
    stubborn = Terminal(guest, "sh", "-c", "trap '' TERM; echo ready; read x")
    one.expect(b"ready")
    stubborn.expect(b"ready")
    guest.agent.shutdown(grace=4)
    one.expect(b"ending")
    assert one.process.wait(30) == ("exit", 6) and stubborn.process.wait(30) == ("signal", signal.SIGKILL)
    one.close()
    stubborn.close()
    guest.server.join(30)
    assert guest.machine.outcome is not None and guest.machine.outcome.reason in ("poweroff", "reset")


def test_a_restored_guest(tmp_path: Path) -> None:
    """Streams break, the agent answers at once, processes live on and are attached to."""
    skip_without_build_tools()
    root = make_root(tmp_path / "root")
    one = boot(root, str(tmp_path / "v"))
    try:
        one.agent.wait_ready(60)
        one.agent.mount("virtiofs", "root", "/root")
        one.agent.root("/root", ("dev", "proc", "sys"))
        old = Terminal(one, "sh", "-c", "echo begun; while read x; do echo got $x; done; exit 8", terminal=None)
        old.expect(b"begun\n")
        pid = old.process.pid
        save(one.machine, str(tmp_path / "base"), stop=True)
        old.close()
    finally:
        one.close()
    two = Guest(restore(Snapshot(str(tmp_path / "base"))))
    try:
        began = time.monotonic()
        assert two.agent.wait_ready(30)
        assert time.monotonic() - began < 10, "it need not be waited for"
        assert two.run("echo", "new").out == b"new\n"
        with pytest.raises(StartError, match="attach: No such process"):
            GuestProcess.attach(two.device, pid + 1000, loop=two.machine.loop).wait(30)
        mine, theirs = os.pipe()
        out = os.memfd_create("out")
        again = GuestProcess.attach(two.device, pid, stdin=mine, stdout=out, loop=two.machine.loop)
        two.made.append(again)
        os.close(mine)
        assert again.wait_started(30) == pid
        os.write(theirs, b"it\n")
        os.close(theirs)
        assert again.wait_end(30) == ("exit", 8)
        assert os.pread(out, 99, 0) == b"got it\n"
        os.close(out)
        two.agent.shutdown()
        two.server.join(30)
        assert two.machine.outcome is not None
    finally:
        two.close()
