"""Networks of real namespaces: names, isolation, the way out, what is refused, what is removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from framework.namespaces import until_gone
from framework.run import ROOT
from framework.sites import Site, a_site  # noqa: F401 (the fixture `site`)

from hv.errors import ConfigError, NetworkError, StateError
from hv.linux.netns import new_netns
from hv.network.dns import LINGER
from hv.network.ports import parse_publish

# who sends to port 99, within two seconds
LISTEN = "import socket,select,time; s=socket.socket(10,2); s.bind(('::',99)); print('up',flush=True)\n" \
         "e=time.time()+2\n" \
         "while time.time()<e:\n if select.select([s],[],[],.2)[0]: print(s.recvfrom(9)[1][0].removeprefix('::ffff:'))"

# a router's advertisement (RFC 4861, 4.2) with a prefix, to all
ADVERTISE = """
import socket, struct
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(("eth0", 0x86dd))
mac = link.getsockname()[4]
source, all_nodes = socket.inet_pton(10, "fe80::bad"), socket.inet_pton(10, "ff02::1")
prefix = struct.pack(">BBBBIII16s", 3, 4, 64, 0xc0, 86400, 86400, 0, socket.inet_pton(10, "2001:db8::"))
def said(total):
    return struct.pack(">BBHBBHII", 134, 0, total, 64, 0, 1800, 0, 0) + prefix
pseudo = source + all_nodes + struct.pack(">II", len(said(0)), 58) + said(0)
total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
total = (total & 0xffff) + (total >> 16)
total = ~((total & 0xffff) + (total >> 16)) & 0xffff
head = struct.pack(">IHBB", 6 << 28, len(said(0)), 58, 255) + source + all_nodes
link.send(bytes.fromhex("333300000001") + mac + b"\\x86\\xdd" + head + said(total))
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def test_members_find_each_other_by_name(site: Site) -> None:
    site.join("web", aliases=["www", "Site.example"])
    site.serve("web", 80)
    site.join("later", hostname="host7", hosts=["extra:192.0.2.9", "way:host-gateway"])
    for name in ("web", "www", "site.example", "WEB", "webwebwebweb"):
        assert site.ask("later", name, 80) == f"web {site.address('later')}"
    hosts = (site.folder / "later.hosts").read_text()
    assert f"{site.address('later')}\thost7 later\n" in hosts and "192.0.2.9\textra\n" in hosts
    assert site.call("web", "ping", "-c1", "-W2", "later").returncode == 0         # who came later, too
    assert site.call("later", "ping", "-c1", "-W1", "way").returncode == 0
    site.networks.rename("web" * 8, "shop")
    assert site.ask("later", "shop", 80).startswith("web ")
    assert "Name or service not known" in site.ask("later", "web", 80)
    site.networks.detach("web" * 8)
    assert "Name or service not known" in site.ask("later", "www", 80)


def test_an_instance_gets_its_address_again_and_a_fixed_one(site: Site) -> None:
    first = site.join("one").interfaces[0]
    site.networks.detach("one" * 8, netns_ends=True)
    again = site.join("one").interfaces[0]      # at once: the pair of before may still be there
    assert (again.address, again.mac) == (first.address, first.mac)
    assert again.mac == "02:70:" + ":".join(f"{int(part):02x}" for part in again.address.split("."))
    site.networks.create("fixed", subnet="10.213.60.0/24", ip_range="10.213.60.128/30")
    assert site.join("two", "fixed", ip="10.213.60.7", mac="52:54:00:00:00:07").interfaces[0].address == "10.213.60.7"
    shown = json.loads(subprocess.run(["nsenter", f"--net={site.held['two'].path}", "ip", "-j", "address", "show",
                                       "eth0"], capture_output=True, check=True, timeout=10).stdout)[0]
    assert shown["address"] == "52:54:00:00:00:07" and [entry["local"] for entry in shown["addr_info"]] == \
        ["10.213.60.7"], "no IPv6 either"
    for ip, text in (("10.213.60.7", "belongs to"), ("10.213.60.1", "gateway"), ("10.213.61.1", "no address of"),
                     ("10.213.60.255", "no address of"), ("nonsense", "no address of")):
        with pytest.raises((ConfigError, NetworkError), match=text):
            site.join("three", "fixed", ip=ip)
    for number in range(4):
        address = site.join(f"range{number}", "fixed").interfaces[0].address
        assert address in {f"10.213.60.{last}" for last in range(128, 132)}
    with pytest.raises(NetworkError, match="no free address"):
        site.join("range4", "fixed")


def test_networks_are_apart_and_may_be_joined(site: Site) -> None:
    left, right = site.networks.create("left"), site.networks.create("right", labels={"a": "b"})
    assert left["subnet"] != right["subnet"] and right["labels"] == {"a": "b"}
    site.join("le", "left")
    site.join("ri", "right")
    site.serve("ri", 80)
    assert "timed out" in site.ask("le", site.address("ri"), 80)
    assert "Name or service not known" in site.ask("le", "ri", 80)
    interface = site.networks.connect("right", "le" * 8, aliases=["guest"])
    assert interface.name == "eth1" and not interface.gateway
    assert site.ask("le", "ri", 80) == f"ri {interface.address}"       # its server is the first network's
    assert site.call("ri", "ping", "-c1", "-W2", "guest").returncode == 0
    with pytest.raises(NetworkError, match="in network right already"):
        site.networks.connect("right", "le" * 8)
    site.networks.disconnect("left", "le" * 8)      # the default route is the other network's now
    assert site.call("le", "ip", "route").stdout.split()[:3] == ["default", "via", right["gateway"]]
    assert set(site.networks.inspect("right")["members"]) == {"le" * 8, "ri" * 8}
    with pytest.raises(NetworkError, match="not in network left"):
        site.networks.disconnect("left", "le" * 8)
    site.networks.disconnect("left", "le" * 8, force=True)
    with pytest.raises(NetworkError, match="has 2 members: le, ri"):
        site.networks.rm("right")
    assert site.networks.prune() == ["left"]


def test_the_way_out_is_the_hosts_and_an_internal_network_has_none(site: Site) -> None:
    with new_netns() as outside:
        site.host.run("ip link add out0 type veth peer name far0; ip address add 192.0.2.1/24 dev out0")
        site.host.run(f"ip link set far0 netns /proc/{os.getpid()}/fd/{outside.fd}; ip link set out0 mtu 1400 up")
        site.host.run("ip route add default via 192.0.2.2")
        site.held["far"] = outside
        for kind in ("resolv", "hosts"):
            (site.folder / f"far.{kind}").touch()
        assert site.call("far", "sh", "-ec", "ip address add 192.0.2.2/24 dev far0; ip link set far0 up; "
                         "ip route add default via 192.0.2.1").returncode == 0
        site.networks.create("shut", internal=True)
        site.join("in", "shut")
        site.join("mate", "shut")
        assert site.join("free").interfaces[0].mtu == 1400      # no more than the way out takes
        site.serve("far", 80)
        site.serve("free", 80)
        site.serve("mate", 80)
        site.serve("host", 81)
        assert site.ask("free", "192.0.2.2", 80) == "far 192.0.2.1"        # as the host
        assert "timed out" in site.ask("far", site.address("free"), 80)     # not published, so not from outside
        # nobody goes out under an address that is none of ours, and not by IPv6
        site.host.run("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding; ip -6 address add fd01::1/64 dev out0 nodad; "
                      "ip -6 address add fd02::1/64 dev pyhv1 nodad")
        for words in (("far", "ip -6 address add fd01::2/64 dev far0 nodad; ip -6 route add fd02::/64 via fd01::1; "
                       "ip route add 203.0.113.0/24 via 192.0.2.1"),
                      ("free", "ip -6 address add fd02::2/64 dev eth0 nodad; ip -6 route add fd01::/64 via fd02::1; "
                       "ip address add 203.0.113.9/32 dev eth0")):
            assert site.call(words[0], "sh", "-ec", words[1]).returncode == 0
        heard = subprocess.Popen(site._words("far", ("timeout", "4", sys.executable, "-c", LISTEN)), text=True,
                                 stdout=subprocess.PIPE)
        assert heard.stdout and heard.stdout.readline() == "up\n"
        send = "import socket\nfor f,a,o in ((2,'192.0.2.2',('203.0.113.9',0)),(10,'fd01::2',('::',0))," \
               "(2,'192.0.2.2',('0.0.0.0',0))):\n s=socket.socket(f,2); s.bind(o); s.sendto(b'x',(a,99))"
        assert site.call("free", sys.executable, "-c", send).returncode == 0
        assert heard.communicate(timeout=9)[0] == "192.0.2.1\n", "the last of three"
        gateway = site.networks.inspect("shut")["gateway"]
        assert site.call("in", "ip", "route").stdout.count("default") == 0
        # even if it makes itself a route
        assert site.call("in", "ip", "route", "add", "default", "via", gateway).returncode == 0
        assert "timed out" in site.ask("in", "192.0.2.2", 80)
        assert "timed out" in site.ask("in", site.address("free"), 80)
        assert "timed out" in site.ask("in", gateway, 81) and site.ask("free", "192.0.2.1", 81).startswith("host")
        assert site.ask("in", "mate", 80).startswith("mate ")
        assert site.ask("host", site.address("mate"), 80).startswith("mate ")
        site.host.run("ip link delete out0")


def test_a_member_is_no_router_for_this_host(site: Site) -> None:
    """CVE-2020-13401, as docker had it: all of the host's IPv6 would go to a member that says it is a router."""
    site.join("router")
    bridge = site.networks.inspect("pyhv")["bridge"]
    assert site.call("router", sys.executable, "-c", ADVERTISE).returncode == 0
    time.sleep(0.3)
    assert bridge not in site.host.run("ip -6 route; ip -6 address")
    site.host.run(f"echo 1 > /proc/sys/net/ipv6/conf/{bridge}/accept_ra")        # the advertisement is a good one
    assert site.call("router", sys.executable, "-c", ADVERTISE).returncode == 0
    end = time.monotonic() + 3
    while "fe80::bad" not in site.host.run("ip -6 route"):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_networks_without_a_bridge(site: Site) -> None:
    attach = site.networks.attach
    assert not attach(["none"], "n", name="n").interfaces
    own = attach(["host"], "h", name="h")
    assert (own.hosts, own.resolv_conf) == ("", "")
    told = site.join("first")
    other = attach(["container:" + "first" * 8], "second", name="second")
    assert (other.netns, other.hosts, other.resolv_conf) == (told.netns, told.hosts, told.resolv_conf)
    site.join("machine", vm=True)
    for networks, options, text in ((["host"], {"vm": True}, "is for containers"),
                                    (["container:x"], {"vm": True}, "is for containers"),
                                    (["container:" + "machine" * 8], {}, "is a VM"),
                                    (["none", "pyhv"], {}, "goes with no other"),
                                    (["pyhv", "pyhv"], {}, "named twice"), ([], {}, "no network given"),
                                    (["host"], {"ip": "10.0.0.1"}, "--ip goes with")):
        with pytest.raises(ConfigError, match=text) as caught:
            attach(networks, "x", name="x", netns=told.netns, **options)   # type: ignore[arg-type]
        assert caught.value.hint
    with pytest.raises(NetworkError, match="no network 'nowhere'"):
        site.networks.check(["nowhere"])
    with pytest.raises(StateError, match="VM"):
        site.networks.connect("pyhv", "machine" * 8)
    for netns, text in (("/proc/self/ns/net", "host's own"), ("/proc/self/exe", "EINVAL"), ("/nowhere", "No such")):
        with pytest.raises(NetworkError, match=text):
            attach(["pyhv"], "y", name="y", netns=netns)
    assert not site.networks.members("y"), "all or nothing"


def test_what_is_taken_is_not_chosen(site: Site) -> None:
    site.host.run("ip link add other type bridge; ip address add 10.112.5.1/24 dev other")
    site.host.run("ip link set other up; ip link add pyhv0 type bridge")
    made = site.networks.inspect("pyhv")
    assert made["subnet"] == "10.113.0.0/16" and made["bridge"] == "pyhv1"
    with pytest.raises(NetworkError, match=r"overlaps 10\.112\.5\.0/24"):
        site.networks.create("x", subnet="10.112.0.0/16")
    with pytest.raises(NetworkError, match=r"overlaps 10\.113\.0\.0/16 of network pyhv"):
        site.networks.create("x", subnet="10.113.7.0/24")
    site.host.run("ip link add pyhv1 type bridge")      # taken by somebody else while we were down
    site.join("one")
    assert site.networks.inspect("pyhv")["bridge"] == "pyhv2"
    site.networks.detach("one" * 8)
    site.networks.rm("pyhv")
    assert "pyhv1" in site.host.run("ip link") and "pyhv2" not in site.host.run("ip link")
    site.host.run("ip link delete other; ip link delete pyhv0; ip link delete pyhv1")


def test_a_network_goes_down_with_the_last_member(site: Site) -> None:
    site.networks.create("plain", dns=False)
    site.join("one")
    site.join("other", "plain")
    (server,) = site.servers()
    site.join("two")
    site.networks.detach("one" * 8)
    time.sleep(LINGER + 0.5)
    assert site.servers() == [server]
    site.networks.detach("two" * 8, netns_ends=True)
    site.join("three")
    time.sleep(LINGER + 0.5)
    assert site.servers() == [server], "another one came in time"
    site.networks.detach("three" * 8, netns_ends=True)
    assert until_gone(f"/proc/{server}")
    rules = site.host.run("ip -br link; nft list ruleset")
    assert "pyhv1" not in rules and "pyhv0" in rules, "plain has no server, and a member"
    site.networks.detach("other" * 8)
    site.networks.rm("plain")
    assert "pyhv" not in site.host.run("ip -br link; nft list ruleset")
    site.join("four", ports=parse_publish(["8080:80"]))
    site.serve("four", 80)
    assert len(site.servers()) == 1 and site.ask("host", "127.0.0.1", 8080).startswith("four ")


def test_folders_deleted_under_a_network_leave_no_bridge(site: Site) -> None:
    site.join("one")
    (server,) = site.servers()
    for name in ("run", "networks"):
        shutil.rmtree(site.folder / name)
    assert until_gone(f"/proc/{server}")
    assert "pyhv" not in site.host.run("ip -br link; nft list ruleset")
    site.held.pop("one").close()
    for _ in range(100):
        if "pv" not in site.host.run("ip -br link"):
            break
        time.sleep(0.05)


JOIN = """
import sys
sys.path.insert(0, sys.argv[1])
from hv.linux.netns import new_netns
from hv.network.networks import Networks
networks = Networks(sys.argv[2] + "/networks", sys.argv[2] + "/run")
held = [new_netns() for _ in range(8)]
for count, netns in enumerate(held):
    told = networks.attach(["pyhv"], f"{sys.argv[3]}-{count}", name=f"{sys.argv[3]}-{count}", netns=netns.path)
    print(told.interfaces[0].address, flush=True)
sys.stdin.read()
"""


def test_many_processes_at_once(site: Site) -> None:
    children = [subprocess.Popen([sys.executable, "-c", JOIN, str(ROOT), str(site.folder), f"p{number}"], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE) for number in range(5)]
    addresses = [child.stdout.readline().strip() for child in children for _ in range(8)]     # type: ignore[union-attr]
    assert len(set(addresses)) == 40 and "" not in addresses
    assert len(site.servers()) == 1 and len(site.networks.inspect("pyhv")["members"]) == 40
    site.join("one")
    for number in range(5):
        assert site.call("one", "ping", "-c1", "-W2", f"p{number}-7").returncode == 0
    for child in children:
        child.communicate(timeout=20)
    assert len(site.networks.sweep(["one" * 8])) == 40
