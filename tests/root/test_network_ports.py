"""Published ports: TCP and UDP, from outside, from this host's loopback, from members; clashes; removal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from framework.sites import Site, a_site  # noqa: F401 (the fixture `site`)

from hv.errors import ConfigError, NetworkError
from hv.linux.netns import new_netns
from hv.network.ports import parse_publish

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

ECHO = "import socket,sys; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('0.0.0.0',int(sys.argv[1])))\n" \
       "print('up',flush=True)\nwhile 1:\n d,a=s.recvfrom(99); s.sendto(d+b' '+a[0].encode(),a)"
ASK_UDP = "import socket,sys; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(1)\n" \
          "s.connect((sys.argv[1],int(sys.argv[2]))); s.send(b'hello'); print(s.recv(99).decode())"


def ask_udp(site: Site, name: str, where: str, port: int) -> str:
    done = site.call(name, sys.executable, "-c", ASK_UDP, where, str(port))
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


@pytest.fixture
def far(site: Site):
    """Somebody outside, at 192.0.2.2; this host is 192.0.2.1 to it."""
    with new_netns() as outside:
        site.host.run("ip link add out0 type veth peer name far0; ip address add 192.0.2.1/24 dev out0")
        site.host.run(f"ip link set far0 netns /proc/{os.getpid()}/fd/{outside.fd}; ip link set out0 up")
        site.held["far"] = outside
        for kind in ("resolv", "hosts"):
            (site.folder / f"far.{kind}").touch()
        done = site.call("far", "sh", "-ec", "ip address add 192.0.2.2/24 dev far0; ip link set far0 up; "
                         "ip route add default via 192.0.2.1")
        assert done.returncode == 0
        yield "far"
        site.host.run("ip link delete out0")


def test_ports_from_everywhere(site: Site, far: str) -> None:
    told = site.join("web", ports=parse_publish(["8080:80", "192.0.2.1:8081:80", "127.0.0.1:8082:80", "5353:53/udp",
                                                 "80"]))
    site.serve("web", 80)
    udp = subprocess.Popen(site._words("web", (sys.executable, "-c", ECHO, "53")), text=True, stdout=subprocess.PIPE)
    site.started.append(udp)
    assert udp.stdout and udp.stdout.readline() == "up\n"
    site.join("mate")
    site.networks.create("other")
    site.join("stranger", "other")
    way = site.networks.inspect("pyhv")["gateway"]
    free = told.ports[-1].host
    assert 1024 < free < 65536 and [port.plain() for port in site.networks.published("web" * 8)] == \
        [port.plain() for port in told.ports]
    # from outside, with the address that the server sees
    assert site.ask(far, "192.0.2.1", 8080) == "web 192.0.2.2"
    assert site.ask(far, "192.0.2.1", free) == "web 192.0.2.2"
    assert site.ask(far, "192.0.2.1", 8081) == "web 192.0.2.2"
    assert ask_udp(site, far, "192.0.2.1", 5353) == "hello 192.0.2.2"
    assert "refused" in site.ask(far, "192.0.2.1", 8082)
    # from this host
    assert site.ask("host", "127.0.0.1", 8080) == f"web {way}"
    assert site.ask("host", "127.0.0.1", 8082) == f"web {way}"
    assert site.ask("host", "192.0.2.1", 8081) == "web 192.0.2.1"
    assert "refused" in site.ask("host", "127.0.0.1", 8081)
    assert ask_udp(site, "host", "127.0.0.1", 5353) == f"hello {way}"
    # from a member, another network, and itself
    assert site.ask("mate", "192.0.2.1", 8080) == f"web {way}"
    assert site.ask("stranger", "192.0.2.1", 8080).startswith("web ")
    assert site.ask("web", "192.0.2.1", 8080) == f"web {way}"
    # loopback addresses are routed on bridges, but not for instances
    site.serve("host", 9)
    for name in ("mate", "stranger"):
        assert site.call(name, "ip", "route", "add", "127.0.0.9", "via", way if name == "mate" else
                         site.networks.inspect("other")["gateway"], "table", "main").returncode == 0
        assert site.call(name, "sh", "-ec", "ip link set lo down; ip route add 127.0.0.1 dev eth0; "
                         "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet").returncode in (0, 2)
        assert not site.ask(name, "127.0.0.9", 9).startswith("host")
    # removed exactly
    site.join("more", ports=parse_publish(["8090:80"]))
    site.networks.detach("web" * 8)
    rules = site.host.run("nft list ruleset")
    assert "8080" not in rules and "8090" in rules and "moremore" in rules
    assert "refused" in site.ask("host", "127.0.0.1", 8080)


def test_ports_on_loopback_are_out_of_a_neighbours_reach(site: Site, far: str) -> None:
    """Who shares a wire with this host can send to 127.0.0.1 by its MAC address; ports are led away before routing."""
    site.join("web", ports=parse_publish(["127.0.0.1:8082:80", "8080:80"]))
    site.serve("web", 80)
    assert site.call(far, "sh", "-ec", "ip link set lo down; ip address flush dev lo; "
                     "ip route delete table local 127.0.0.0/8 dev lo 2>/dev/null || true; "
                     "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; "
                     "ip route add 127.0.0.1 via 192.0.2.1 dev far0 src 192.0.2.2").returncode == 0
    for port in (8082, 8080):
        assert "timed out" in site.ask(far, "127.0.0.1", port)
        assert site.ask("host", "127.0.0.1", port).startswith("web ")


def test_a_port_is_had_once(site: Site) -> None:
    site.join("web", ports=parse_publish(["8080:80", "127.0.0.1:8443:443"]))
    with socket.create_server(("0.0.0.0", 7070)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 7071))
        for text, words in (("8080:80", "published by instance webwebweb"), ("127.0.0.1:8080:1", "published by"),
                            ("8443:1", "published by"), ("7070:80", "in use by a program"),
                            ("127.0.0.1:7070:80", "in use by"), ("7071:1/udp", "in use by"),
                            ("192.0.2.77:1234:80", "no address of this host"), ("192.0.2.77::80", "no address of")):
            with pytest.raises((NetworkError, ConfigError), match=words) as caught:
                site.networks.check(["pyhv"], ports=parse_publish([text])) if "::" not in text else \
                    site.join("second", ports=parse_publish([text]))
            assert caught.value.hint
            with pytest.raises((NetworkError, ConfigError), match=words):
                site.join("second", ports=parse_publish(["9999:9", text]))
        site.join("second", ports=parse_publish(["7071:80/tcp", "9999:9", "8080:80/udp"]))
    site.networks.create("shut", internal=True)
    with pytest.raises(ConfigError, match="shut is internal"):
        site.networks.check(["shut"], ports=parse_publish(["80"]))
    with pytest.raises(ConfigError, match="-p goes with networks"):
        site.networks.check(["host"], ports=parse_publish(["80"]))


def test_ports_follow_to_the_network_that_is_left(site: Site) -> None:
    site.networks.create("other")
    site.join("web", "pyhv", "other", ports=parse_publish(["8080:80"]))
    site.serve("web", 80)
    assert site.ask("host", "127.0.0.1", 8080).startswith("web ")
    site.networks.disconnect("pyhv", "web" * 8)
    assert site.ask("host", "127.0.0.1", 8080) == f"web {site.networks.inspect('other')['gateway']}"


def test_flushed_rules_are_written_again_for_all(site: Site) -> None:
    site.join("web", ports=parse_publish(["8080:80"]))
    site.serve("web", 80)
    site.host.run("nft flush ruleset")
    assert "refused" in site.ask("host", "127.0.0.1", 8080)
    site.join("next")
    assert site.ask("host", "127.0.0.1", 8080).startswith("web ")


def test_the_tables_of_others_stay(site: Site) -> None:
    site.host.run("nft add table inet other; nft 'add chain inet other c { type filter hook input priority 0; }'")
    before = site.host.run("nft list table inet other")
    site.join("web", ports=parse_publish(["8080:80"]))
    site.networks.detach("web" * 8)
    site.networks.rm("pyhv")
    assert site.host.run("nft list ruleset") == before
    site.host.run("nft delete table inet other")
