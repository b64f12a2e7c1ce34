"""/etc/resolv.conf and /etc/hosts of an instance."""

from __future__ import annotations

from pathlib import Path

import pytest

from hv.errors import ConfigError
from hv.network import hosts


def test_the_hosts_resolver_is_read(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# x\nnameserver 10.0.0.1\nnameserver fd00::1\nnameserver\nnameserver 10.0.0.2 extra\n"
                    "domain a.example\nsearch b.example c.example .\noptions ndots:2 rotate\nnonsense\n\xe9\n")
    assert hosts.host_resolver(str(path)) == (["10.0.0.1", "10.0.0.2"], ["b.example", "c.example"],
                                              ["ndots:2", "rotate"])
    assert hosts.host_resolver(str(tmp_path / "none")) == ([], [], [])


def test_what_an_instance_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {hosts._PLACE: (["127.0.0.53"], ["corp.example"], []),
             hosts._BEHIND_STUB: (["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"], [], [])}
    monkeypatch.setattr(hosts, "host_resolver", lambda path=hosts._PLACE: tuple(map(list, found[path])))
    assert hosts.resolv_text("10.1.0.1", [], []) == "search corp.example\nnameserver 10.1.0.1\noptions ndots:0\n"
    assert hosts.resolv_text("10.1.0.1", ["192.0.2.1"], ["x"]) == "search x\nnameserver 10.1.0.1\noptions ndots:0\n"
    assert hosts.resolv_text("", ["192.0.2.1"], []) == "search corp.example\nnameserver 192.0.2.1\n"
    assert hosts.resolv_text("", [], []) == \
        "search corp.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n"


def test_lines_of_hosts() -> None:
    told = hosts.hosts_text("h", [("10.0.0.2", ["web"]), ("10.0.1.2", ["h"])], ["db:10.9.9.9", "six:fd00::1",
                                                                                 "way:host-gateway"], "10.0.0.1")
    assert told.splitlines()[2:] == ["10.0.0.2\th web", "10.0.1.2\th", "10.9.9.9\tdb", "fd00::1\tsix", "10.0.0.1\tway"]
    for wrong in ("db", "db:", ":10.0.0.1", "a b:10.0.0.1", "db:10.0.0.1\n1.2.3.4 x", "db:nowhere", "a\tb:1.2.3.4"):
        with pytest.raises(ConfigError, match="--add-host"):
            hosts.hosts_text("h", [], [wrong], "")
    assert hosts.with_host_lines([]) == "" and hosts.with_host_lines(["db:10.0.0.9"]).endswith("\n10.0.0.9\tdb\n")
