"""`-p`, as docker reads it; free ports and those in use."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ConfigError, HvError, NetworkError
from hv.network.ports import MOST, parse_publish
from hv.network.publish import check_ports, give_back_ports, reserve_ports
from hv.network.shape import Port
from hv.network.store import Store


@pytest.mark.parametrize("given_text, expected", [
    ("80", ["0.0.0.0:0:80/tcp"]), ("8080:80", ["0.0.0.0:8080:80/tcp"]), ("0:80/udp", ["0.0.0.0:0:80/udp"]),
    ("127.0.0.1:8080:80/TCP", ["127.0.0.1:8080:80/tcp"]), ("1.2.3.4::53/udp", ["1.2.3.4:0:53/udp"]),
    ("8000-8002:80-82", ["0.0.0.0:8000:80/tcp", "0.0.0.0:8001:81/tcp", "0.0.0.0:8002:82/tcp"]),
    ("80-81", ["0.0.0.0:0:80/tcp", "0.0.0.0:0:81/tcp"]), (":80", ["0.0.0.0:0:80/tcp"]),
])
def test_what_is_published(given_text: str, expected: list[str]) -> None:
    assert [str(port) for port in parse_publish([given_text])] == expected
    assert [Port(**port.plain()).plain() for port in parse_publish([given_text])] == \
        [port.plain() for port in parse_publish([given_text])]


@pytest.mark.parametrize("wrong", ["", "x", "80:", "0", "65536", "8080:0", "-1", "80/sctp", "[::1]:80:80", "1:2:3:4",
                                   "8000-8002:80", "8002-8000:82-80", "1.2.3:80:80", "80-", "0-5:1-6", "\uff18\uff10"])
def test_what_is_no_port(wrong: str) -> None:
    with pytest.raises(ConfigError, match="-p") as caught:
        parse_publish([wrong])
    assert caught.value.hint


@given(st.text("0123456789:-./udptc[] x", max_size=25))
def test_any_text_is_ports_or_an_error(given_text: str) -> None:
    try:
        assert all(0 < port.inner < 65536 and 0 <= port.host < 65536 for port in parse_publish([given_text]))
    except HvError:
        pass


def test_ports_given_twice_and_too_many() -> None:
    for twice in (["80:1", "80:2"], ["127.0.0.1:80:1", "80:2"], ["80-90:1-11", "85:9"]):
        with pytest.raises(ConfigError, match="twice"):
            parse_publish(twice)
    assert len(parse_publish(["80:1", "80:1/udp", "127.0.0.1:81:1", "127.0.0.2:81:1", "1", "1"])) == 6
    with pytest.raises(ConfigError, match=f"more than {MOST}"):
        parse_publish(["1-40000"])


def test_reserved_ports_are_taken_until_given_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "n"), str(tmp_path / "r"))
    with socket.create_server(("127.0.0.1", 0)) as used:
        number = used.getsockname()[1]
        with pytest.raises(NetworkError, match="in use by a program"):
            check_ports(store, parse_publish([f"{number}:80"]))
        mine = reserve_ports(store, parse_publish(["127.0.0.1::80", "127.0.0.1::80", "127.0.0.1::80/udp"]), "me")
        assert len({(port.protocol, port.host) for port in mine}) == 3 and all(port.host for port in mine)
        again = [Port("tcp", "127.0.0.1", mine[0].host, 80)]
        with pytest.raises(NetworkError, match="published by instance me"):
            check_ports(store, again)
        check_ports(store, again, "me")
        with pytest.raises(NetworkError, match="in use"):
            reserve_ports(store, [Port("tcp", "127.0.0.1", 0, 1), Port("tcp", "127.0.0.1", number, 1)], "you")
        assert len(list((tmp_path / "r/ports").iterdir())) == 3, "all or nothing"
        give_back_ports(store, mine)
        give_back_ports(store, mine)
        check_ports(store, again)
