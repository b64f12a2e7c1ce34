"""Instances in networks: names, published ports, what is given back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from framework.instances import until
from framework.instances import world as make_world
from framework.run import PYHV

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(port: int) -> bytes:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
            return bytes(answer.read())
    except OSError:
        return b""


def test_names_and_ports(world):
    port = free_port()
    world.ok("run", "-d", "--name", "web", "-p", f"127.0.0.1:{port}:80", "--network-alias", "www", "busybox", "sh",
             "-c", "while :; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\nhello' | nc -l -p 80; done")
    assert until(lambda: get(port) == b"hello", 10)
    assert world.ok("port", "web") == f"80/tcp -> 127.0.0.1:{port}\n"
    assert f"127.0.0.1:{port}->80/tcp" in world.ok("ps")
    about = world.inspect("web")["NetworkSettings"]
    assert about["Ports"]["80/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": str(port)}] and about["IPAddress"]
    for name in ("web", "www"):
        done = world("run", "--rm", "busybox", "busybox", "ping", "-c", "1", "-w", "5", name)
        assert done.returncode == 0, done.stdout + done.stderr
    done = world("run", "--rm", "--network", "container:web", "busybox", "busybox", "ip", "addr")
    assert about["IPAddress"].encode() in done.stdout
    assert str(port) in world.fails(125, "run", "--rm", "-p", f"127.0.0.1:{port}:80", "busybox", "true")
    world.ok("rm", "-f", "web")
    assert get(port) == b""


def test_nothing_stays(world):
    before = links()
    world.ok("run", "--rm", "busybox", "true")
    world.ok("run", "-d", "--name", "shot", "busybox", "sleep", "1000")
    for pid in (world.kept(world.inspect("shot")["Id"])["pid"], world.inspect("shot")["State"]["Pid"]):
        os.kill(pid, 9)
    assert until(lambda: world.status("shot") == "exited")
    world.ok("rm", "shot")
    assert until(lambda: not {link for link in links() - before if not link.startswith("pyhv")}), links() - before


def test_a_network_that_is_not_there(world):
    assert "nowhere" in world.fails(125, "run", "--rm", "--network", "nowhere", "busybox", "true")
    assert not [leaf for leaf in os.listdir(world.data / "instances") if leaf != "names"]
    assert Path("/proc/self/mounts").read_text().count(str(world.folder)) == 0


def test_what_nobody_gives_back_is_swept(world):
    """All that knew of the instance is gone; a keeper that has nothing to keep gives back its address and port."""
    port = free_port()
    id = world.start("--network", "pyhv", "--name", "lost", "-p", f"127.0.0.1:{port}:80", "busybox", "sleep", "1000")
    assert id in notes(world)
    for pid, _ in world.processes():
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not world.processes(), 10)
    subprocess.run([*PYHV, "oci", "--root", str(world.run_root / "runtime"), "delete", "--force", id], check=True,
                   timeout=30)
    for root in (world.run_root, world.data):
        shutil.rmtree(root / "instances" / id)
    world.run("--rm", "busybox", "true")
    assert until(lambda: id not in notes(world), 10), notes(world)
    for path in (world.data / "images" / "users").glob(f"*/{id}"):      # `image fsck` finds it
        path.unlink()


def notes(world) -> str:
    """What networks have noted of who is in them."""
    found = ""
    for path in (world.run_root / "networks").rglob("*"):
        try:
            found += path.read_text() if path.is_file() else ""
        except OSError:
            pass            # gone meanwhile
    return found


def test_layers_reach_the_disk(world):
    """Or they would be unpacked again after a reboot."""
    world.run("--rm", "busybox", "true")
    folders = world.data / "images" / "layers" / "sha256"
    names = [name for name in folders.iterdir() if len(name.name) == 64]
    assert names and until(lambda: all((name / "settled").exists() for name in names), 30)
