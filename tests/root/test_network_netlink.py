"""Netlink against iproute2: what we made is what `ip -j` shows, what `ip` made is what we see."""

from __future__ import annotations

import errno
import json
import os

import pytest
from framework.namespaces import Host

from hv.errors import KernelError
from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink, Refused
from hv.linux.netns import Netns, inside, new_netns
from hv.linux.nftables import Hush, table_exists

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def ip(netns: Netns, *words: str) -> list[dict]:
    done = os.popen(f"nsenter --net={netns.path} ip -j {' '.join(words)}")
    with done:
        return json.loads(done.read() or "[]")


def test_what_we_make_is_what_ip_shows() -> None:
    with Host() as host, new_netns() as other, Netlink(ROUTE) as socket:
        mac = bytes.fromhex("020000000009")
        socket.send([links.bridge("br9", mac, 1400), links.quieten(name="br9", alias="pyhv x")], "bridge")
        index = links.index_of(socket, "br9")
        socket.send([links.add_address(index, 0x0AD50101, 24), links.set_flags(links.UP, index),
                     links.veth("pv1", index, 1400, "eth0", bytes.fromhex("020000000001"), other.fd),
                     links.quieten(name="pv1", alias="note"), links.set_flags(links.UP, name="pv1"),
                     links.hairpin("pv1")], "veth")
        with inside(other.fd):
            within = Netlink(ROUTE)
        with within:
            eth0 = links.index_of(within, "eth0")
            within.send([links.quieten(eth0), links.set_flags(links.UP | links.NOARP, eth0),
                         links.add_address(eth0, 0x0AD50102, 24), links.add_default(0x0AD50101, eth0)], "eth0")
            assert within.send([links.add_address(eth0, 0x0AD50102, 24), links.add_default(0x0AD50101, eth0)],
                               "again") == [errno.EEXIST, errno.EEXIST]
            assert links.addresses(within, eth0) == [(eth0, 0x0AD50102, 24)]
            assert links.gateways(within, eth0) == [0x0AD50101] and links.default_mtus(within) == [1400]
            assert links.routes(within).count((0x0AD50100, 24)) == 1
            within.send([links.set_flags(0, eth0, clear=links.NOARP)], "flags")
        shown = {entry["ifname"]: entry for entry in ip(host.netns, "-d", "address")}
        bridge, pair = shown["br9"], shown["pv1"]
        assert (bridge["address"], bridge["mtu"], bridge["ifalias"], bridge["linkinfo"]["info_kind"]) == \
            ("02:00:00:00:00:09", 1400, "pyhv x", "bridge") and "UP" in bridge["flags"]
        assert [(entry["local"], entry["prefixlen"], entry["broadcast"]) for entry in bridge["addr_info"]] == \
            [("10.213.1.1", 24, "10.213.1.255")], "and no IPv6"
        assert (pair["master"], pair["ifalias"], pair["linkinfo"]["info_slave_data"]["hairpin"]) == \
            ("br9", "note", True)
        (eth,) = ip(other, "-d", "address", "show", "eth0")
        assert (eth["address"], eth["mtu"]) == ("02:00:00:00:00:01", 1400)
        assert [entry["local"] for entry in eth["addr_info"]] == ["10.213.1.2"] and "NOARP" not in eth["flags"]
        assert {"dst": "default", "gateway": "10.213.1.1", "dev": "eth0", "flags": []} in ip(other, "route")
        # and what ip makes is what we see
        host.run("ip link add dummy9 type veth peer name dummy8; ip link set dummy9 alias 'a b' mtu 1300; "
                 "ip address add 192.0.2.1/30 dev dummy9; ip link set dummy9 up; "
                 "ip route add 198.51.100.0/25 dev dummy9")
        seen = links.link(socket, "dummy9")
        (told,) = ip(host.netns, "link", "show", "dummy9")
        assert seen and (seen.name, seen.alias, seen.mtu, seen.mac, seen.kind, seen.index) == \
            ("dummy9", "a b", 1300, told["address"], "veth", told["ifindex"])
        assert {link.name for link in links.links(socket)} == {entry["ifname"] for entry in ip(host.netns, "link")}
        assert (0xC6336400, 25) in links.routes(socket)
        socket.send([links.delete(name="br9"), links.delete(name="pv1"), links.delete(seen.index)], "all")
        assert [entry["ifname"] for entry in ip(host.netns, "link")] == ["lo"]


def test_many_go_in_one_send() -> None:
    with Host() as host, Netlink(ROUTE) as socket:
        made = [links.bridge(f"b{number}", bytes((2, 0, 0, 0, 0, number))) for number in range(150)]
        assert socket.send(made, "bridges") == [0] * 150
        socket.send(links.delete_all([f"b{number}" for number in range(149)] + ["gone"]), "all but one")
        assert [link.name for link in links.links(socket)] == ["lo", "b149"]
        socket.send(links.delete_all(["b149"]) + links.delete_all(["gone"]) + links.delete_all([]), "one")
        assert host.run("ip -br link").split()[0] == "lo" and len(links.links(socket)) == 1


def test_refusals_are_advice() -> None:
    with Host(), new_netns() as other, Netlink(ROUTE) as socket:
        made = links.veth("pv1", 0, 1500, "eth0", bytes.fromhex("020000000001"), other.fd)
        socket.send([made], "veth")
        for message, number in ((made, errno.EEXIST), (links.set_flags(1, 999), errno.ENODEV),
                                (links.bridge("x" * 40, bytes(6)), errno.ERANGE),
                                (links.add_default(0x01020304, 1), errno.ENETUNREACH)):
            with pytest.raises(Refused, match="this: E") as caught:
                socket.send([message], "this", "do that")
            assert caught.value.errno in (number, errno.ENETDOWN, errno.EINVAL) and caught.value.hint == "do that"
        with pytest.raises(Refused) as caught:
            socket.send([links.bridge("x" * 40, bytes(6))], "this")
        assert caught.value.words, "the kernel's own words"


def test_a_thread_comes_back_from_a_namespace() -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with new_netns() as other:
        assert os.stat(other.path).st_ino != before == os.stat("/proc/thread-self/ns/net").st_ino
        with pytest.raises(ZeroDivisionError), inside(other.fd):
            assert os.stat("/proc/thread-self/ns/net").st_ino == os.stat(other.path).st_ino
            raise ZeroDivisionError
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
        (lo,) = ip(other, "link")
        assert "UP" in lo["flags"]
        with open("/proc/self/exe") as wrong, pytest.raises(KernelError, match="EINVAL"), inside(wrong.fileno()):
            pass
    other.close()


def test_a_hushed_interface_and_tables() -> None:
    with Host() as host:
        host.run("ip link add v0 type veth peer name v1")
        hush = Hush("v0")
        assert "drop" in host.run("nft list ruleset")
        with pytest.raises(KernelError):
            Hush("v0")
        hush.close()
        hush.close()
        assert not host.run("nft list ruleset")
        host.run("nft add table ip pyhv")
        assert not table_exists("pyhv"), "of another family"
