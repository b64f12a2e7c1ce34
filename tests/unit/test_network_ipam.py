"""Addresses and subnets against ipaddress; who gets which; which names lead there."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ConfigError, NetworkError
from hv.linux.netns import inside, new_netns
from hv.network import choose
from hv.network.addresses import Subnet, number, text
from hv.network.definition import Network, check_name, define
from hv.network.leases import Leases, dns_name


def network(subnet: str = "10.0.0.0/29", ip_range: str = "", **options: object) -> Network:
    return define("net", Subnet.parse("x", subnet), str(options.get("gateway", "")), ip_range, False, True, {}, "br", 0)


@given(st.one_of(st.ip_addresses(v=4).map(str), st.text("0123456789. /-x", max_size=20)))
def test_addresses_are_those_of_ipaddress(given_text: str) -> None:
    try:
        expected = int(ipaddress.IPv4Address(given_text))
    except ValueError:
        expected = -1
    assert number(given_text) == expected
    assert expected < 0 or text(expected) == given_text


@given(st.ip_addresses(v=4), st.integers(8, 30), st.ip_addresses(v=4), st.integers(8, 30))
def test_subnets_are_those_of_ipaddress(first: ipaddress.IPv4Address, length: int, second: ipaddress.IPv4Address,
                                        other_length: int) -> None:
    one = ipaddress.ip_network(f"{first}/{length}", strict=False)
    two = ipaddress.ip_network(f"{second}/{other_length}", strict=False)
    mine, other = Subnet.parse("x", str(one)), Subnet.parse("x", str(two))
    assert str(mine) == str(one) and mine.overlaps(other) == one.overlaps(two)
    assert (int(second) in mine) == (second in one) and mine.last == int(one.broadcast_address)


@pytest.mark.parametrize("wrong", ["10.0.0.0", "10.0.0.1/24", "10.0.0.0/31", "10.0.0.0/7", "10.0.0.0/x", "/24", "",
                                   "10.0.0.0/024", "fd00::/64", "10.0.0.0/24/24"])
def test_no_subnet(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--subnet") as caught:
        Subnet.parse("--subnet", wrong)
    assert caught.value.hint


def test_all_addresses_are_given_out_once(tmp_path: Path) -> None:
    net, leases = network(), Leases(str(tmp_path))
    taken = [leases.take(net, f"id{count}") for count in range(5)]
    assert sorted(map(text, taken)) == [f"10.0.0.{last}" for last in range(2, 7)], "no gateway, no broadcast"
    with pytest.raises(NetworkError, match=r"no free address in 10\.0\.0\.0/29"):
        leases.take(net, "id5")
    leases.give_back(taken[2])
    assert leases.take(net, "other") == taken[2] and leases.holder(taken[2]) == ("other", [])
    for address in taken:
        leases.give_back(address)
        leases.give_back(address)
    assert leases.all() == []


def test_an_instance_starts_looking_at_its_own_place(tmp_path: Path) -> None:
    net, leases = network("10.0.0.0/16"), Leases(str(tmp_path))
    first = leases.take(net, "a" * 64)
    leases.give_back(first)
    leases.take(net, "b" * 64)
    assert leases.take(net, "a" * 64) == first


def test_names_lead_to_addresses(tmp_path: Path) -> None:
    net, leases = network(), Leases(str(tmp_path))
    one, two = leases.take(net, "one"), leases.take(net, "two")
    leases.name(one, ["Web", "shared"])
    leases.name(two, ["shared"])
    names = {path.name: sorted(leaf.name for leaf in path.iterdir()) for path in (tmp_path / "names").iterdir()}
    assert names == {"web": [text(one)], "shared": sorted((text(one), text(two)))}
    leases.give_back(one)
    assert [path.name for path in (tmp_path / "names").iterdir()] == ["shared"]
    (tmp_path / "names" / "stale").mkdir()
    (tmp_path / "names" / "stale" / text(one)).touch()
    leases.tidy()
    assert [path.name for path in (tmp_path / "names").iterdir()] == ["shared"]


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "a/b", "a b", "ä", "x" * 64, "a." * 127 + "abc", "-\0"])
def test_no_names(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be a name"):
        dns_name(name)


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "none", "host", "container", "x" * 65, "a b", "a:b"])
def test_no_names_of_networks(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be called"):
        check_name(name)


def test_gateway_and_range_fit_the_subnet() -> None:
    assert text(network("10.0.0.0/24").gateway) == "10.0.0.1"
    assert text(network("10.0.0.0/24", gateway="10.0.0.254").gateway) == "10.0.0.254"
    for options, text_ in (({"gateway": "10.0.1.1"}, "--gateway"), ({"gateway": "10.0.0.255"}, "--gateway"),
                           ({"ip_range": "10.0.1.0/25"}, "--ip-range"), ({"ip_range": "10.0.0.0/23"}, "--ip-range")):
        with pytest.raises(ConfigError, match=text_):
            network("10.0.0.0/24", **options)


def test_a_damaged_definition_is_named() -> None:
    whole = network().plain()
    assert Network.load("net", whole).plain() == whole
    for field in ("subnet", "gateway", "ip_range", "bridge", "labels", "id", "created", "dns", "internal"):
        for value in (None, 7.5, "10.9.9.9", "../../etc"):
            if field in ("bridge", "id") and isinstance(value, str) and "/" not in value:
                continue
            if field == "id":
                continue
            with pytest.raises(NetworkError, match=f"damaged: {field}"):
                Network.load("net", {**whole, field: value})


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace, without the host's routes, needs root")
def test_files_of_other_engines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_FILES", (str(tmp_path),))
    (tmp_path / "podman.json").write_text('{"subnets": [{"subnet": "10.112.0.0/16", "gateway": "10.112.0.1"}]}')
    (tmp_path / "cni.conflist").write_text('{"plugins": [{"ipam": {"ranges": [[{"subnet": "10.113.128.0/17"}]]}}]}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "odd.json").write_text('[{"subnet": 7}, {"subnet": "10.114.0.0/99"}, {"subnet": "fd00::/64"}]')
    with new_netns() as netns, inside(netns.fd):
        assert str(choose.choose_subnet([], True)) == "10.114.0.0/16"
        with pytest.raises(NetworkError, match=r"podman\.json"):
            choose.check_free(Subnet.parse("x", "10.112.7.0/24"), [])
