"""Netlink messages: what is written, what is read back, what a hostile or torn one does."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.linux import links
from hv.linux.netlink import (
    CREATE,
    EXCL,
    NETFILTER,
    ROUTE,
    Message,
    Netlink,
    Refused,
    attribute,
    attributes,
    nested,
    text,
    word,
)

PAIRS = st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=300), max_size=20)


@given(PAIRS, st.integers(0, 64))
def test_attributes_are_read_as_they_are_written(pairs: dict[int, bytes], start: int) -> None:
    data = bytes(start) + b"".join(attribute(kind, value) for kind, value in pairs.items())
    assert not len(data[start:]) % 4 and attributes(data, start) == pairs


@given(st.binary(max_size=400), st.integers(0, 40))
def test_no_bytes_make_trouble(data: bytes, start: int) -> None:
    assert all(len(value) <= len(data) for value in attributes(data, start).values())


def test_the_layout() -> None:
    assert word(4, 1500) == struct.pack("=HHI", 8, 4, 1500)
    assert text(3, "eth0") == struct.pack("=HH", 9, 3) + b"eth0\0\0\0\0"
    assert nested(18, text(1, "veth")) == struct.pack("=HH", 16, 18 | 0x8000) + text(1, "veth")
    assert attributes(nested(18, word(1, 7)))[18] == word(1, 7), "the flag is no part of the kind"
    assert attributes(struct.pack("=HH", 3, 1) + bytes(8)) == {} == attributes(struct.pack("=HH", 100, 1) + bytes(8))


def test_messages_of_links() -> None:
    made = links.bridge("pyhv0", bytes.fromhex("02700a700001"), 1400)
    assert (made.kind, made.flags) == (16, CREATE | EXCL) and len(made.body) % 4 == 0
    inside = attributes(made.body, 16)
    assert inside[3] == b"pyhv0\0" and inside[1].hex() == "02700a700001" and inside[4] == struct.pack("=I", 1400)
    peer = attributes(attributes(attributes(links.veth("a", 7, 1500, "eth0", bytes(6), 9).body, 16)[18])[2])[1]
    assert attributes(peer, 16)[28] == struct.pack("=I", 9), "the namespace's descriptor, behind an ifinfomsg"
    address = links.add_address(3, 0x0A700002, 16)
    assert address.body[:8] == struct.pack("=BBBBI", 2, 16, 0, 0, 3)
    assert attributes(address.body, 8)[4] == bytes((10, 112, 255, 255))


def test_the_kernel_takes_them_and_says_what_is_wrong() -> None:
    with Netlink(ROUTE) as socket:
        lo = links.link(socket, "lo")
        assert lo is not None and lo.index == 1 and lo.mtu == 65536
        assert links.link(socket, "nothing-here") is None and links.index_of(socket, "lo") == 1
        assert lo.name in [link.name for link in links.links(socket)]
        assert (1, 0x7F000001, 8) in links.addresses(socket, 1)
        # several in one send: all are answered, the first failure is told, allowed ones are results
        bad = Message(16, CREATE, struct.pack("=BxHiII", 0, 0, 0, 0, 0) + nested(18, text(1, "no-such-kind")))
        with pytest.raises(Refused, match="both: E") as caught:
            socket.send([links.delete(name="nothing-here"), bad, bad], "both", "do this")
        assert caught.value.hint == "do this"
        assert socket.send([links.delete(name="nothing-here")], "x") in ([0], [19], [1])
        assert links.index_of(socket, "lo") == 1, "the socket goes on"
    with Netlink(NETFILTER) as socket:
        socket.dump(10 << 8 | 1, bytes(4), "tables")
