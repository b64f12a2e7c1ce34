"""What is said to nft, and that nft understands it."""

from __future__ import annotations

import os
import signal

import pytest

from hv.errors import NetworkError
from hv.linux.netns import inside, new_netns
from hv.linux.nftables import table_exists
from hv.network import nft
from hv.network.addresses import Subnet
from hv.network.definition import define
from hv.network.ports import parse_publish

OPEN = define("open", Subnet.parse("x", "10.0.0.0/24"), "", "", False, True, {}, "pyhv0", 0)
SHUT = define("shut", Subnet.parse("x", "10.0.1.0/24"), "", "", True, True, {}, "pyhv1", 0)


def test_what_is_said() -> None:
    assert nft.network_elements("t", OPEN) == ['add element inet t bridges { "pyhv0" }',
                                               'add element inet t same { "pyhv0" . "pyhv0" }',
                                               "add element inet t subnets { 10.0.0.0/24 }"]
    assert nft.network_elements("t", SHUT, "delete")[2] == 'delete element inet t internal { "pyhv1" }'
    ports = parse_publish(["8080:80", "127.0.0.1:53:5353/udp"])
    assert nft.port_elements("t", ports, 0x0A000002, "id") == [
        'add element inet t ports { tcp . 8080 comment "id" : 10.0.0.2 . 80 }',
        'add element inet t ports_at { 127.0.0.1 . udp . 53 comment "id" : 10.0.0.2 . 5353 }']


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_nft_understands_it() -> None:
    ports = parse_publish(["8080:80", "127.0.0.1:53:5353/udp"])
    with new_netns() as netns, inside(netns.fd):
        assert not table_exists("pyhv")
        whole = nft.rules("pyhv") + nft.network_elements("pyhv", OPEN) + nft.network_elements("pyhv", SHUT)
        for _ in range(2):
            assert nft.apply(whole) == ""       # the second time: anew, not twice
        assert table_exists("pyhv") and not table_exists("pyh")
        assert nft.apply(nft.port_elements("pyhv", ports, 1, "id")) == ""
        assert nft.apply(nft.port_elements("pyhv", ports, 1, "id", "delete")) == ""
        assert "No such file" in nft.apply(nft.port_elements("pyhv", ports, 1, "id", "delete"))
        for network in (OPEN, SHUT):
            assert nft.apply(nft.network_elements("pyhv", network, "delete")) == ""
        for _ in range(2):
            assert nft.apply(nft.remove("pyhv")) == "" and not table_exists("pyhv")
        assert "syntax error" in nft.apply(["nonsense"])


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_a_process_whose_children_are_waited_for_elsewhere() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with new_netns() as netns, inside(netns.fd):
            assert nft.apply(nft.rules("pyhv")) == "" and table_exists("pyhv")
            assert "syntax error" in nft.apply(["nonsense"])
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "_PLACES", ("/nowhere/nft",))
    with pytest.raises(NetworkError, match="no program nft") as caught:
        nft.apply([])
    assert "nftables" in caught.value.hint
