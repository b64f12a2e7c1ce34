"""Definitions and records on disk; words of --network."""

from __future__ import annotations

from errno import ENOSPC
from pathlib import Path

import pytest

from hv.errors import ConfigError, NetworkError
from hv.network.leases import Leases
from hv.network.modes import check_mode
from hv.network.networks import Networks
from hv.network.ports import parse_publish
from hv.network.store import Store, check_id


@pytest.fixture
def networks(tmp_path: Path) -> Networks:
    return Networks(str(tmp_path / "data"), str(tmp_path / "run"))


def test_networks_are_kept(networks: Networks, tmp_path: Path) -> None:
    made = networks.create("a", subnet="10.213.7.0/24", gateway="10.213.7.9", ip_range="10.213.7.128/25",
                           internal=True, labels={"k": "v"}, dns=False)
    networks.create("b")
    again = Networks(str(tmp_path / "data"), str(tmp_path / "run"))
    assert again.inspect("a") == made and again.inspect(made["id"][:6])["name"] == "a"
    assert [entry["name"] for entry in again.ls()] == ["a", "b"] and again.ls()[0]["members"] == 0
    assert made["gateway"] == "10.213.7.9" and made["internal"] and not made["dns"] and made["labels"] == {"k": "v"}
    with pytest.raises(NetworkError, match="already"):
        again.create("a")
    assert not list((tmp_path / "data").glob("*~"))


@pytest.mark.parametrize("options, words", [
    ({"driver": "macvlan"}, "--driver macvlan"), ({"gateway": "10.0.0.1"}, "go with --subnet"),
    ({"subnet": "10.213.7.0/24", "gateway": "10.0.0.1"}, "--gateway"), ({"subnet": "x"}, "--subnet"),
    ({"subnet": "10.213.7.0/24", "ip_range": "10.0.0.0/24"}, "--ip-range"),
])
def test_what_cannot_be_made(networks: Networks, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        networks.create("x", **options)     # type: ignore[arg-type]
    assert caught.value.hint and networks.ls() == []


@pytest.mark.parametrize("name", ["nowhere", "../x", "", "a/b"])
def test_no_such_network(networks: Networks, name: str) -> None:
    with pytest.raises(NetworkError, match="no network"):
        networks.inspect(name)
    with pytest.raises(NetworkError, match="no network"):
        networks.rm(name)


def test_records(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "n"), str(tmp_path / "r"))
    assert store.record("a") is None and store.records() == []
    store.save({"id": "a", "name": "x", "netns": "", "endpoints": [], "ports": []})
    assert store.record("a") == store.records()[0]
    for damage in ("", "{", "[]", '{"id": 7}'):
        (tmp_path / "r/instances/a.json").write_text(damage)
        record = store.record("a")
        assert record and record["id"] == "a" and record["endpoints"] == [], "so that it can be removed"
    store.drop("a")
    store.drop("a")
    assert store.records() == []


@pytest.mark.parametrize("wrong", ["", ".", "..", "a/b", "x" * 129, "a b", "a\n"])
def test_no_id(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no ID"):
        check_id(wrong)


def test_words_that_name_no_network() -> None:
    ports = parse_publish(["80"])
    assert [check_mode([name], False, (), "") for name in ("none", "host", "container:x", "net")] == \
        ["none", "host", "container", "bridge"]
    assert check_mode(["none"], True, (), "") == "none" and check_mode(["a", "b"], True, ports, "1.2.3.4") == "bridge"
    for name in ("none", "host", "container:x"):
        with pytest.raises(ConfigError, match="-p goes with"):
            check_mode([name], False, ports, "")
    with pytest.raises(ConfigError, match="more than 16"):
        check_mode([f"n{count}" for count in range(17)], False, (), "")


@pytest.mark.parametrize("which", ["data", "run"])
def test_what_the_disk_refuses_is_one_line(networks: Networks, tmp_path: Path, which: str) -> None:
    (tmp_path / which).write_text("no folder")
    with pytest.raises(NetworkError, match=f"networks: .*/{which}.*: "):
        networks.create("a")


def test_a_full_disk_leaves_no_lease(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks.create("a")
    network, leases = Store(str(tmp_path / "data"), "").network("a"), Leases(str(tmp_path / "on"))

    def full(*_: object) -> int:
        raise OSError(ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match="full"):
            leases.take(network, "box")
    assert leases.all() == []
    assert leases.take(network, "box")
