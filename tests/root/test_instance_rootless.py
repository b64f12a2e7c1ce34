"""`pyhv run` and the verbs of instances by a user who is not root: a user namespace, pasta, nothing left behind."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
from framework.engines import groups_under, needs
from framework.images import Built, docker_archive
from framework.instances import until
from framework.linux import kernel
from framework.rootless import User, UsersPyhv
from framework.run import needs_kvm, no_traceback
from framework.terminal import OnTerminal

from hv.container.cgroups.detect import detect

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user"),
              needs("unshare", "nsenter", "setpriv", "newuidmap", "newgidmap", "pasta"), pytest.mark.timeout(240)]
LOOP = "trap 'exit 3' TERM; while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def pyhv():
    user = User(devices=("/dev/net/tun", *(("/dev/kvm",) if os.path.exists("/dev/kvm") else ())))
    try:
        made = UsersPyhv(user)
        archive = docker_archive(user.folder / "busybox.tar", Built())
        archive.chmod(0o644)
        assert "busybox" in made.ok("image", "load", "-i", str(archive))
        yield made
    finally:
        user.close()


@pytest.fixture(autouse=True)
def _empty(pyhv):
    yield
    for id in pyhv.ok("ps", "-aq").split():
        pyhv("rm", "-f", "-v", id)
    assert until(lambda: not pyhv.user.processes()), pyhv.user.processes()
    for folder in (pyhv.run / "instances", pyhv.run / "runtime", pyhv.run / "networks/pasta", pyhv.run /
                   "networks/ports", pyhv.data / "instances/names"):
        assert not folder.exists() or not os.listdir(folder), folder
    assert str(pyhv.user.folder) not in Path("/proc/self/mountinfo").read_text()


def test_output_errors_exit_code_and_ids(pyhv):
    done = pyhv("run", "--rm", "--network", "none", "busybox", "sh", "-c",
                "echo out; echo err >&2; id -u; cat /proc/self/uid_map; chown 5:6 /tmp; stat -c %u:%g /tmp; exit 42")
    assert done.returncode == 42 and done.stderr == b"err\n", done.stderr
    words = done.stdout.decode().split()
    user = pyhv.user
    assert words == ["out", "0", "0", str(user.id), "1", "1", str(user.first), "65536", "5:6"]


@pytest.mark.parametrize("command, code", [(["true"], 0), (["nope"], 127), (["/etc"], 126)])
def test_exit_codes(pyhv, command, code):
    done = pyhv("run", "--rm", "--network", "none", "busybox", *command)
    assert done.returncode == code, done.stderr
    no_traceback(done)


def test_the_life_of_one_in_the_background(pyhv):
    id = pyhv.ok("run", "-d", "--name", "life", "--network", "none", "-v", "kept:/data", "busybox", "sh", "-c",
                 f"echo begun; {LOOP}").strip()
    assert id[:12] in pyhv.ok("ps", "-q") and '"running"' in pyhv.ok("inspect", "life")
    assert pyhv.ok("exec", "-i", "life", "cat", stdin=b"given") == "given"
    assert pyhv("exec", "life", "sh", "-c", "id -u; exit 7").returncode == 7
    assert "sleep 0.1" in pyhv.ok("top", "life") or "trap" in pyhv.ok("top", "life")
    assert pyhv.ok("exec", "-u", "1000:1001", "life", "id", "-u") == "1000\n"
    pyhv.ok("exec", "life", "sh", "-c", "echo kept >/data/file; echo mine >/file; chown 1000 /file")
    assert until(lambda: pyhv.ok("logs", "life") == "begun\n")
    pyhv.ok("cp", "life:/file", "copy")
    copy = pyhv.user.folder / "home/copy"
    assert copy.read_text() == "mine\n" and copy.stat().st_uid == pyhv.user.id
    pyhv.ok("cp", "copy", "life:/again")
    assert pyhv.ok("exec", "life", "cat", "/again") == "mine\n"
    assert pyhv.ok("stop", "life") == "life\n" and pyhv.ok("wait", "life") == "3\n"
    pyhv.ok("start", "life")
    assert pyhv.ok("exec", "life", "cat", "/data/file", "/again") == "kept\nmine\n"
    pyhv.ok("kill", "life")
    assert pyhv.ok("wait", "life") == "137\n"
    assert "Exited (137)" in pyhv.ok("ps", "-a")
    pyhv.ok("rm", "life")
    assert "kept" in pyhv.ok("volume", "ls") and pyhv.ok("volume", "rm", "kept") == "kept\n"


def test_terminal(pyhv):
    with OnTerminal(command=pyhv.command("run", "--rm", "-it", "--network", "none", "busybox", "sh")) as terminal:
        terminal.type(b"tty; echo $((40 + 2)); exit 5\n")
        terminal.wait_for(b"/dev/", 60)
        terminal.wait_for(b"42")
        assert terminal.end() == 5


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _address() -> str:
    """Of this host, on the way to elsewhere; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))
        return str(asked.getsockname()[0])


def _both_ways(pyhv, tmp_path: Path, size: int, *way: str) -> None:
    """Out to this host's server, and in by a published port, `size` bytes each."""
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    server = serve(tmp_path)
    address = _address() if "--vm" in way else "127.0.0.1"
    try:
        pyhv.ok("run", "-d", *way, "--name", "web", "-p", f"{address}::80", "busybox", "sh", "-c",
                f"mkdir /www && wget -q -O /www/file http://10.0.2.2:{server.server_port}/file && "
                "httpd -f -p 80 -h /www", timeout=200)
        place = pyhv.ok("port", "web", "80").strip().rpartition("> ")[2]

        def fetched() -> bool:
            try:
                with urllib.request.urlopen(f"http://{place}/file", timeout=10) as answer:
                    return bool(answer.read() == data)
            except OSError:
                return False

        assert until(fetched, 60), pyhv.ok("logs", "web")
    finally:
        server.shutdown()
        server.server_close()


def test_network_by_pasta(pyhv, tmp_path):
    _both_ways(pyhv, tmp_path, 2 << 20)
    pyhv.ok("kill", "web")
    pyhv.ok("wait", "web")
    assert not [pid for pid in pyhv.user.processes() if "pasta" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_ports_in_use_and_names_of_networks(pyhv):
    server = serve(pyhv.user.folder)
    try:
        assert "in use" in pyhv.fails(125, "run", "--rm", "-p", f"127.0.0.1:{server.server_port}:80", "busybox", "true")
    finally:
        server.shutdown()
        server.server_close()
    assert "need root" in pyhv.fails(125, "run", "--rm", "--network", "pyhv", "busybox", "true")
    assert "need root" in pyhv.fails(1, "network", "create", "shop")
    assert "1024" in pyhv.fails(125, "run", "--rm", "-p", "127.0.0.1:81:80", "busybox", "true")
    assert "limits need root" in pyhv.fails(125, "run", "--rm", "--network", "none", "-m", "64m", "busybox", "true")


def test_the_hosts_network(pyhv):
    own = subprocess.run(["readlink", "/proc/self/ns/net"], capture_output=True, text=True, check=True).stdout
    assert pyhv.ok("run", "--rm", "--network", "host", "busybox", "readlink", "/proc/self/ns/net") == own


def test_many_at_once_share_one_namespace(pyhv):
    running = [subprocess.Popen(pyhv.command("run", "--rm", "--network", "none", "busybox", "readlink",
                                             "/proc/self/ns/user"), stdout=subprocess.PIPE) for _ in range(6)]
    said = [process.communicate(timeout=100)[0] for process in running]
    assert len(set(said)) == 1 and said[0].startswith(b"user:")


def test_all_that_watches_is_killed(pyhv):
    """The holder, the keeper, the namespace's keeper: the next command finds the namespace, and the end is written."""
    pyhv.ok("run", "-d", "--name", "left", "busybox", "sh", "-c", LOOP)
    user = pyhv.user
    program = int(next(word for word in pyhv.ok("inspect", "-f", "{{.State.Pid}}", "left").split()))
    namespace = os.readlink(f"/proc/{program}/ns/user")
    anchor = int((pyhv.run / "namespace").read_text().split()[0])
    os.kill(anchor, signal.SIGKILL)
    assert "left" in pyhv.ok("ps")
    other = int((pyhv.run / "namespace").read_text().split()[0])
    assert other != anchor and os.readlink(f"/proc/{other}/ns/user") == namespace
    assert pyhv.ok("exec", "left", "readlink", "/proc/self/ns/user").strip() == namespace
    for pid in user.processes():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert until(lambda: not user.processes())
    assert "left" not in pyhv.ok("ps") and "Exited" in pyhv.ok("ps", "-a")
    assert until(lambda: not os.listdir(pyhv.run / "networks/pasta"))
    pyhv.ok("start", "left")
    pyhv.ok("rm", "-f", "left")


@pytest.mark.parametrize("hidden, words, said", [
    (("newuidmap",), (), "newuidmap"), (("pasta",), (), "pasta"), ((), ("no ids",), "subuid"),
    ((), ("no tun",), "tun")])
def test_bad_hosts(hidden, words, said):
    user = User(hidden=hidden, devices=() if words == ("no tun",) else ("/dev/net/tun",))
    try:
        pyhv = UsersPyhv(user)
        if words == ("no ids",):
            (user.folder / "subuid").write_text("")
        archive = docker_archive(user.folder / "busybox.tar", Built())
        archive.chmod(0o644)
        if said in ("pasta", "tun"):
            pyhv.ok("image", "load", "-i", str(archive))
            assert pyhv.ok("run", "--rm", "--network", "none", "busybox", "echo", "yes") == "yes\n"
        assert said in pyhv.fails(125, "run", "--rm", "busybox", "true")
    finally:
        user.close()


@pytest.mark.skipif(not detect().v2, reason="this host has no cgroup version 2 to delegate")
def test_limits_in_a_delegated_cgroup():
    user = User(delegated=True)
    try:
        pyhv = UsersPyhv(user)
        archive = docker_archive(user.folder / "busybox.tar", Built())
        archive.chmod(0o644)
        pyhv.ok("image", "load", "-i", str(archive))
        pyhv.ok("run", "-d", "--name", "held", "--network", "none", "busybox", "sh", "-c", LOOP)
        group = [path for path in groups_under(user.group) if len(path.name) == 32]
        assert len(group) == 1 and "frozen 0" in (group[0] / "cgroup.events").read_text()
        pyhv.ok("pause", "held")
        assert "frozen 1" in (group[0] / "cgroup.events").read_text() and "Paused" in pyhv.ok("ps")
        pyhv.ok("rm", "-f", "held")
        assert until(lambda: not group[0].exists())
    finally:
        user.close()


@needs_kvm
def test_a_vm(pyhv, tmp_path):
    file = pyhv.user.folder / "vmlinux"
    shutil.copy(kernel("micro") / "vmlinux", file)
    file.chmod(0o644)
    way = ("--vm", "--kernel", str(file))
    done = pyhv("run", "--rm", *way, "--network", "none", "busybox", "sh", "-c", "echo $$; uname -r; exit 9",
                timeout=200)
    assert done.returncode == 9 and done.stdout.split()[1].decode() != os.uname().release, done.stderr
    assert "127.0.0.1" in pyhv.fails(125, "run", "--rm", *way, "-p", "127.0.0.1:18080:80", "busybox", "true")
    _both_ways(pyhv, tmp_path, 100_000, *way)
    assert pyhv.ok("exec", "web", "id", "-u") == "0\n"
