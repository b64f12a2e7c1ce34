"""A real distribution, Debian with Python and nginx, run both ways from one image: exec, published ports, by name."""

from __future__ import annotations

import os
import time
import urllib.request

import pytest
from framework.distribution import debian
from framework.engines import needs
from framework.instances import World
from framework.instances import world as make_world
from framework.run import needs_kvm

pytestmark = [needs_kvm, needs("nft"), pytest.mark.timeout(300),
              pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
IMAGE, NETWORK = "debian:test", "both"
WAYS = ("container", "vm")
PATIENCE = 120      # s: where ring 0 is emulated, nginx takes many to start


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Debian's image, and nginx in a container and in a VM, on a network of their own."""
    archive = debian()
    for made in make_world(tmp_path_factory.mktemp("world"), ""):
        made.ok("image", "import", str(archive), IMAGE, timeout=120)
        made.ok("network", "create", NETWORK)
        for way in WAYS:
            made.ok("run", f"--{way}", "-d", "--name", way, "--network", NETWORK, "-p", "80", IMAGE,
                    "nginx", "-g", "daemon off;", timeout=PATIENCE)
        yield made
        made.empty()
        made.ok("network", "rm", NETWORK)


def page(world: World, way: str) -> str:
    """What nginx answers at the published port."""
    port = world.ok("port", way, "80").strip().rpartition(":")[2]
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                return answer.read().decode()
        except OSError:
            assert time.monotonic() < end and world.status(way) == "running", world("logs", way)
            time.sleep(0.3)


@pytest.mark.parametrize("way", WAYS)
def test_a_published_port_is_fetched(world, way):
    assert "Welcome to nginx" in page(world, way)


@pytest.mark.parametrize("way", WAYS)
def test_exec_sees_the_distribution(world, way):
    text = world.ok("exec", way, "python3", "-c", "import platform, os, sys; print(platform.freedesktop_os_release()"
                    "['ID'], platform.release() == sys.argv[1], os.getuid())", os.uname().release, timeout=PATIENCE)
    assert text.split() == ["debian", str(way == "container"), "0"]


def test_they_reach_each_other_by_name(world):
    page(world, "vm")
    for here, there in (WAYS, WAYS[::-1]):
        text = world.ok("exec", here, "python3", "-c", "import socket, sys; s = socket.create_connection((sys.argv[1],"
                        "80), 60); s.sendall(b'HEAD / HTTP/1.0\\r\\n\\r\\n'); print(s.recv(99).split(b'\\r')[0])",
                        there, timeout=PATIENCE)
        assert "200 OK" in text, (here, there)


@pytest.mark.parametrize("way", WAYS)
def test_its_programs_end_as_they_do_elsewhere(world, way):
    done = world("run", f"--{way}", "--rm", "-i", "--network", "none", IMAGE, "python3", "-c",
                 "import sys; print(sys.stdin.read().upper()); sys.exit(7)", stdin=b"quiet", timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (7, b"QUIET\n"), done.stderr
