"""Configurations as plain data and back: equal ones, hostile ones, changed ones, and those of clones."""

from __future__ import annotations

import copy
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio.balloon import BalloonConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.console_config import ConsoleConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_backend import Unplugged
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.net_pair import NetCable
from hv.devices.virtio.rng import RngConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError
from hv.machine import recipe as recipes
from hv.machine.config import MachineConfig
from hv.machine.own_device import OwnConfig
from hv.machine.recipe import KINDS, class_of, config_from, recipe_of, why_not_snapshot
from hv.machine.recipe_change import for_clone, with_changes

DEVICES: dict[str, Any] = {
    "disk": DiskConfig("/d/a.img", overlay="/d/a.cow", layers=("/d/b", "/d/c"), serial="s-1", queues=2, iops="4K",
                       bps=7),
    "net": NetConfig("user", mac="52:54:00:12:34:56", rate="2M", forward="8080:80+0.0.0.0:53:53/udp", mtu=1400),
    "console": ConsoleConfig(guest=False, ports=("agent,socket=/p/a,b=c", "log,file=/p/log")),
    "rng": RngConfig(),
    "balloon": BalloonConfig("64M", "off", "2.5", False),
    "vsock": VsockConfig("/v.sock", cid=77),
    "share": ShareConfig("/srv", tag="data", readonly=True, timeout="0.25"),
    "own": OwnConfig("hv.devices.virtio.rng:RngConfig"),
}
CONFIG = MachineConfig("/boot/vmlinux", initrd="/boot/initrd", cmdline="quiet \udcff", memory=64 << 20, cpus=3,
                       modules=(("/m/a", "words"),), boot_protocol="pvh", huge="thp", timeout=2.5, debug_exit=0xF4,
                       acpi=False, transport="pci", devices=tuple(DEVICES.values()))


def same(one: MachineConfig, other: MachineConfig) -> None:
    for name in MachineConfig.__slots__:
        if name != "devices":
            assert getattr(one, name) == getattr(other, name), name
    for mine, theirs in zip(one.devices, other.devices, strict=True):
        assert type(mine) is type(theirs)
        mine_vars, their_vars = dict(vars(mine)), dict(vars(theirs))
        for values in (mine_vars, their_vars):
            values.pop("_made", None)           # of OwnConfig: an object of its own
        assert mine_vars == their_vars


def again(config: MachineConfig, **options: Any) -> MachineConfig:
    """Through JSON, as in a snapshot."""
    return config_from(json.loads(json.dumps(recipe_of(config))), **options)


def device(config: Any) -> Any:
    return again(MachineConfig(devices=(config,)), allowed=[getattr(config, "place", "")]).devices[0]


def test_everything_goes_there_and_back():
    same(again(CONFIG, allowed=["hv.devices.virtio.rng:RngConfig"]), CONFIG)
    same(again(MachineConfig()), MachineConfig())


def test_no_field_is_forgotten():
    assert {name for name, _ in recipes.FIELDS} == set(MachineConfig.__slots__)
    for kind in KINDS:
        made = class_of(kind)
        takes = [name for name in inspect.signature(made).parameters if name != "option"]
        assert [name for name, _ in made.FIELDS] == takes, kind
        assert list(DEVICES[kind].recipe()) == takes or set(DEVICES[kind].recipe()) == set(takes), kind


@pytest.mark.parametrize("config", [
    DiskConfig("/a", readonly=True, direct=True), DiskConfig("/a", overlay="temp"),
    DiskConfig(vhost_user="/run/disk.sock", queues=4),
    NetConfig("tap"), NetConfig("none"), NetConfig(tap="tap3", address="10.1.2.3/24"), NetConfig(pair="/tmp/cable"),
    NetConfig(vhost_user="/run/net.sock", mac=b"\2\0\0\0\0\1"), NetConfig("user"),
    ConsoleConfig(), BalloonConfig(1 << 20), VsockConfig(None), ShareConfig("/srv"),
    ShareConfig(tag="x", vhost_user="/run/fs.sock"),
], ids=lambda config: f"{type(config).__name__}-{config.recipe()}"[:60])
def test_every_kind_of_device(config):
    assert vars(device(config)) == vars(config)


@given(st.builds(DiskConfig, st.from_regex(r"/[a-zA-Z0-9,+= ]{1,20}", fullmatch=True), readonly=st.booleans(),
                 direct=st.booleans(), overlay=st.sampled_from([None, "temp", "/o"]),
                 serial=st.text("abcXYZ019-_", max_size=20), queues=st.integers(1, 64),
                 iops=st.integers(0, 1 << 40), bps=st.integers(0, 1 << 40)),
       st.builds(BalloonConfig, st.integers(0, 1 << 50), st.booleans(),
                 st.just(0.0) | st.floats(0.1, 999999.0), st.booleans()),
       st.builds(NetConfig, st.just("user"), rate=st.none() | st.integers(1, 1 << 40),
                 mtu=st.none() | st.integers(68, 65520),
                 forward=st.none() | st.builds("{}:{}/udp+127.0.0.2:{}:{}".format, *[st.integers(1, 65535)] * 4)))
@settings(deadline=None)
def test_any_values(disk, balloon, net):
    configs = (disk, balloon, net)
    same(again(MachineConfig(devices=configs)), MachineConfig(devices=configs))


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    config = MachineConfig("vmlinux", initrd="i", modules=(("m", ""),), devices=(
        DiskConfig("a", overlay="o", layers="l"), NetConfig(pair="c"), ConsoleConfig(ports=("p,file=f",)),
        VsockConfig("v"), ShareConfig("s")))
    text = json.dumps(recipe_of(config))
    for name in ("vmlinux", "i", "m", "a", "o", "l", "c", "f", "v", "s"):
        assert f"{here}/{name}\"" in text, name
    monkeypatch.chdir("/")
    assert recipe_of(config_from(json.loads(text)))["kernel"] == f"{here}/vmlinux"
    assert recipe_of(MachineConfig("guest:tiny"))["kernel"] == "guest:tiny"


def test_bytes_are_not_kept():
    recipe = recipe_of(MachineConfig(b"\x7fELF", initrd=b"070701"))
    assert recipe["kernel"]["size"] == 4 and len(recipe["initrd"]["blake2b"]) == 64
    assert again(MachineConfig(b"\x7fELF", initrd=b"x")).kernel is None


def test_a_cable_made_by_the_program_becomes_none():
    ends = NetCable.socketpair()
    try:
        card = device(NetConfig(ends[0])).create()
        assert isinstance(card, Net) and isinstance(card.backend, Unplugged) and not card._up
        assert ends[0].features & ~card.backend.features == 0       # the driver keeps what it took
    finally:
        for end in ends:
            end.close()


# hostile -----------------------------------------------------------------------------------------------

JUNK = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=4),
                 st.sampled_from(["\ud800", "a\0b", "x" * 70000, "own", "disk", "temp", "nan", "-1", "pci"]),
                 st.lists(st.integers() | st.text(max_size=2), max_size=3),
                 st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=2), max_size=2))


TOP = [*(name for name, _ in recipes.FIELDS), "more"]
INSIDE = sorted({"device", "more", *(name for kind in KINDS for name, _ in class_of(kind).FIELDS)})


@given(st.lists(st.tuples(st.sampled_from(TOP), st.integers(-1, 7), st.sampled_from(INSIDE), JUNK | st.just("gone")),
                min_size=1, max_size=3))
@settings(max_examples=400, deadline=None)
def test_hostile_recipes_name_the_field(changes):
    recipe: Any = copy.deepcopy(RECIPE)
    for top, number, field, value in changes:
        devices = recipe.get("devices")
        inside = isinstance(devices, list) and 0 <= number < len(devices) and isinstance(devices[number], dict)
        place, name = (devices[number], field) if inside else (recipe, top)
        if value == "gone":
            place.pop(name, None)
        else:
            place[name] = value
    for attempt in (config_from, with_changes, lambda data: for_clone(data, 2)):
        try:
            attempt(recipe)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 500 and str(error).startswith("recipe")


RECIPE = recipe_of(CONFIG)


@pytest.mark.parametrize(("change", "text"), [
    (None, "recipe: is of type NoneType"), ([], "recipe: is of type list"),
    ({"cpus": True}, r"recipe\.cpus: True is no number"), ({"cpus": 0}, "0 processors"),
    ({"timeout": "nan"}, r"recipe\.timeout"), ({"timeout": 2.5}, r"recipe\.timeout: 2\.5 is no text"),
    ({"shape": 1}, r"recipe\.shape: no such field"), ({"devices": [3]}, r"devices\[0\]: is of type int"),
    ({"devices": [{"device": "gun"}]}, r"devices\[0\]\.device: 'gun' is no device"),
    ({"devices": [{"device": ["disk"]}]}, r"devices\[0\]\.device"),
    ({"devices": [{"device": "rng", "seed": 1}]}, r"devices\[0\]\.seed: no such field"),
    ({"devices": [{"device": "disk", "path": 5}]}, r"devices\[0\]\.path: 5 is no text"),
    ({"devices": [{"device": "disk", "path": "/a\0b"}]}, r"devices\[0\]\.path"),
    ({"devices": [{"device": "disk", "path": "/a", "queues": 99}]}, r"devices\[0\] \(disk\): --disk: queues=99"),
    ({"devices": [{"device": "vsock"}]}, r"devices\[0\] \(vsock\): .*socket"),
    ({"devices": [{"device": "disk", "path": "/a", "layers": ["/l", 4], "overlay": "temp"}]}, r"devices\[0\]\.layers"),
])
def test_what_is_wrong_is_named(change, text):
    with pytest.raises(ConfigError, match=text):
        config_from({**recipe_of(MachineConfig()), **change} if isinstance(change, dict) else change)


def test_a_program_in_a_recipe_runs_only_where_the_user_named_it(tmp_path, monkeypatch):
    file, mark = tmp_path / "own.py", tmp_path / "ran"
    file.write_text("from hv.devices.virtio.rng import Rng\n"
                    f"open({str(mark)!r}, 'a').close()\n"
                    "class Own(Rng):\n"
                    "    def __init__(self, sides='6', loud=False):\n"
                    "        super().__init__()\n"
                    "        self.sides, self.loud = sides, loud\n")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(MachineConfig(devices=(OwnConfig("own.py:Own", ("9",), {"loud": True}),)))
    mark.unlink()
    for allowed in ((), ["other.py:Own"]):
        with pytest.raises(ConfigError, match=r"devices\[0\] \(own\): .*own.py:Own is a program"):
            config_from(recipe, allowed=allowed)
    assert not mark.exists()
    made = config_from(recipe, allowed=["own.py:Own"]).devices[0].create()
    assert mark.exists() and made.sides == "9" and made.loud is True    # type: ignore[attr-defined]
    for place in ("os:system", "builtins:exec"):
        hostile = {**recipe, "devices": [{"device": "own", "place": place, "words": [f"touch {mark}2"]}]}
        with pytest.raises(ConfigError, match="is a program"):
            config_from(hostile)


def test_why_not():
    assert why_not_snapshot(MachineConfig(devices=tuple(DEVICES.values()))) is None
    for config in (DiskConfig(vhost_user="/s"), NetConfig(vhost_user="/s"), ShareConfig(vhost_user="/s")):
        why = why_not_snapshot(MachineConfig(devices=(RngConfig(), config)))    # type: ignore[arg-type]
        assert why is not None and "device 1" in why and "another program, at /s" in why

    class Mine:
        def create(self) -> Any: ...

    assert "OwnConfig" in (why_not_snapshot(MachineConfig(devices=(Mine(),))) or "")
    with pytest.raises(ConfigError, match=r"device 0 \(Mine\)"):
        recipe_of(MachineConfig(devices=(Mine(),)))


# changes -----------------------------------------------------------------------------------------------

def entries(recipe: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in recipe["devices"] if entry["device"] == kind]


def test_with_changes(tmp_path):
    before = copy.deepcopy(RECIPE)
    changed = with_changes(RECIPE, disks={0: {"path": "/other", "iops": "1K"}}, nets={0: {"tap": "tap9", "rate": "1M"}},
                           vsock={"socket": "/else"}, shares={0: {"directory": "/mnt"}},
                           ports={"agent": "file=/dev/null"})
    assert before == RECIPE
    disk, net = entries(changed, "disk")[0], entries(changed, "net")[0]
    assert (disk["path"], disk["iops"], disk["serial"], disk["layers"]) == ("/other", 1024, "s-1", ["/d/b", "/d/c"])
    assert (net["kind"], net["tap"], net["rate"], net["forward"]) == ("tap", "tap9", 1000000, None)
    assert net["mac"] == "52:54:00:12:34:56" and net["mtu"] == 1400
    assert entries(changed, "vsock")[0] == {"device": "vsock", "socket": "/else", "cid": 77}
    assert entries(changed, "share")[0]["directory"] == "/mnt" and entries(changed, "share")[0]["tag"] == "data"
    assert entries(changed, "console")[0]["ports"] == ["agent,file=/dev/null", "log,file=/p/log"]
    config_from(changed, allowed=["hv.devices.virtio.rng:RngConfig"])


@pytest.mark.parametrize(("changes", "text"), [
    ({"disks": {1: {"path": "/x"}}}, "no disk 1"), ({"disks": {-1: {"path": "/x"}}}, "no disk -1"),
    ({"disks": {0: {"serial": "x"}}}, "serial can't be another"), ({"disks": {0: {"queues": 1}}}, "queues can't"),
    ({"disks": {0: {"iops": "fast"}}}, "iops=fast"), ({"nets": {0: {"tap": "a/b"}}}, "no name of an interface"),
    ({"nets": {0: {"tap": "t", "pair": "/p"}}}, "asked for"), ({"nets": {0: {"mac": "x"}}}, "mac can't"),
    ({"vsock": {"socket": ""}}, "no socket named"), ({"ports": {"nobody": "file=/x"}}, "no port nobody"),
    ({"ports": {"agent": "pipe=/x"}}, "not of the form"), ({"shares": {0: {"directory": ""}}}, "needs a directory"),
])
def test_changes_that_cannot_be(changes, text):
    with pytest.raises(ConfigError, match=text):
        with_changes(RECIPE, **changes)


def test_a_clone_takes_nothing_away_from_the_first():
    nets: list[Any] = [NetConfig("tap"), NetConfig(tap="tap1"), NetConfig("tap", address="10.0.0.1/24"),
                       NetConfig(pair="/c"), NetConfig("user", forward="80:80")]
    recipe = recipe_of(MachineConfig(devices=(*CONFIG.devices, *nets)))
    clone = for_clone(recipe, 3)
    assert [(e["kind"], e["tap"], e["pair"], e["address"], e["forward"]) for e in entries(clone, "net")[1:]] == [
        ("tap", None, None, None, None), *[("none", None, None, None, None)] * 3, ("user", None, None, None, None)]
    assert entries(clone, "vsock")[0]["socket"] == "/v.sock.3"
    assert entries(clone, "console")[0]["ports"] == ["agent,socket=/p/a,b=c.3", "log,file=/p/log.3"]
    for kind in ("disk", "share", "balloon", "rng", "own"):
        assert entries(clone, kind) == entries(recipe, kind)
    config_from(clone, allowed=["hv.devices.virtio.rng:RngConfig"])
    long = "/" + "x" * 94
    clone = for_clone(recipe_of(MachineConfig(devices=(VsockConfig(long), ConsoleConfig(ports=(f"p,socket={long}",))))),
                      12)
    assert entries(clone, "vsock")[0]["socket"] is None
    assert entries(clone, "console")[0]["ports"] == ["p,file=/dev/null"]


def test_two_clones_have_their_sockets_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(MachineConfig(devices=(VsockConfig(str(tmp_path / "v")),
                                              ConsoleConfig(ports=(f"p,socket={tmp_path / 'p'}",)))))
    made = []
    try:
        for number in range(3):
            values = for_clone(recipe, number) if number else recipe
            made += [config.create() for config in config_from(values).devices]
        assert sorted(os.listdir(tmp_path)) == ["p", "p.1", "p.2", "v", "v.1", "v.2"]
    finally:
        for one in made:
            one.close()
    assert os.listdir(tmp_path) == []
