"""What makes clones distinct on the host: addresses, CIDs, sockets; and what the device tells of them."""

from __future__ import annotations

import pytest
from framework.driver import Driver
from framework.vsock import Peer

from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.chain import Chain
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_backend import Unplugged
from hv.devices.virtio.net_config import NetConfig, parse_mac
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError
from hv.machine.config import MachineConfig
from hv.machine.recipe import config_from, recipe_of
from hv.snapshot.clone import check_address, clone_cid, distinct

CONFIG = MachineConfig(devices=(NetConfig("none", mac="02:00:00:00:00:01"), NetConfig("none", mac="02:00:00:00:00:02"),
                                VsockConfig("/v.sock", 7)))
RECIPE = recipe_of(CONFIG)
OLD, NEW = bytes.fromhex("020000000001"), bytes.fromhex("02aabbccddee")


def macs(recipe):
    return [entry["mac"] for entry in recipe["devices"] if entry["device"] == "net"]


def test_no_two_clones_have_an_address_in_common():
    seen = set(macs(RECIPE))
    for of in ("", "one", "other"):
        for index in range(50):
            for mac in macs(distinct(RECIPE, index, of)):
                assert parse_mac(mac)[0] == 2, "locally administered, of one card"
                assert mac not in seen
                seen.add(mac)
    assert len(seen) == 2 + 3 * 50 * 2


def test_a_clone_has_the_same_addresses_again():
    assert distinct(RECIPE, 5, "one") == distinct(RECIPE, 5, "one")


def test_cids_are_all_different_and_none_is_reserved():
    found = {distinct(RECIPE, index)["devices"][2]["cid"] for index in range(100)}
    assert found == set(range(8, 108))
    assert clone_cid(0xFFFFFFFE, 0) == 3 and clone_cid(0xFFFFFFFD, 1) == 3 and clone_cid(0xFFFFFFFC, 1) == 0xFFFFFFFE
    assert 3 <= clone_cid(0, 0) <= 0xFFFFFFFE


def test_sockets_are_their_own_and_the_configuration_can_be_made():
    assert distinct(RECIPE, 4)["devices"][2]["socket"] == "/v.sock.4"
    assert [type(device) for device in config_from(distinct(RECIPE, 4)).devices] == [NetConfig, NetConfig, VsockConfig]


@pytest.mark.parametrize("index", [-1, 1 << 20])
def test_numbers_have_bounds(index):
    with pytest.raises(ConfigError, match="their numbers go from 0"):
        distinct(RECIPE, index)


@pytest.mark.parametrize("recipe", [7, {"devices": 3}, {"devices": [{"device": "vsock", "cid": "x"}]},
                                    {"devices": [{"device": "net", "mac": 5}]}])
def test_a_recipe_is_not_trusted(recipe):
    with pytest.raises(ConfigError):
        distinct(recipe, 0)


def test_addresses_are_checked_before_anything_is_told():
    check_address("10.0.0.1/24", "10.0.0.254")
    for address, gateway in (("10.0.0.1", None), ("10.0.0.1/24", "x"), (None, "10.0.0.1"), ("10.0.0.1/33", None)):
        with pytest.raises(ConfigError):
            check_address(address, gateway)


def card(mac: bytes) -> Driver:
    driver = Driver(Net(Unplugged(), mac))
    driver.probe()
    return driver


def test_a_restored_card_has_the_address_it_was_given():
    """The driver has read the old one: it is asked for the new one only by an agent."""
    first = card(OLD)
    first.device.stop()
    state = first.device.state()
    other = Driver(Net(Unplugged(), NEW))
    other.device.load(state)
    assert (other.device.mac, other.device.guest_mac) == (NEW, OLD)
    assert other.device.read_config(0, 6) == int.from_bytes(NEW, "little")
    again = Driver(Net(Unplugged(), OLD))
    again.device.load(other.device.state())
    assert again.device.guest_mac == OLD, "nobody has told the guest"
    other.device.guest_mac = NEW
    again.device.load(other.device.state())
    assert again.device.guest_mac == NEW


def test_a_packet_of_a_driver_that_does_not_know_its_cid_yet_is_no_fault():
    first = Peer(VsockConfig(None, 3).create())
    first.device.stop()
    other = Peer(VsockConfig(None, 9).create())
    other.send(vp.OP_REQUEST, 9, 5000)          # as CID 3
    assert other.device.faults == 1
    other.device.load(first.device.state())
    assert other.device.read_config(0, 8) == 9
    other.device._packet(Chain(0, [memoryview(vp.HEADER.pack(3, 2, 9, 5000, 0, 1, vp.OP_RST, 0, 0, 0))], []))
    assert other.device.faults == 1
    first.close()
    other.close()


def test_a_card_that_was_given_none_keeps_its_own():
    first = card(OLD)
    first.device.stop()
    other = Driver(Net(Unplugged()))
    other.device.load(first.device.state())
    assert other.device.mac == other.device.guest_mac == OLD


