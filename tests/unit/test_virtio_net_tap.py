"""Taps of the host behind the network device, and what `--net` takes."""

from __future__ import annotations

import os
import socket

import pytest
from framework.driver import Driver

from hv.devices.virtio import ids
from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net_config import NetConfig, derive_mac
from hv.errors import ConfigError

HEADER = bytes(net.HEADER_SIZE)
FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(range(200))
COMMON = ids.F_VERSION_1 | ids.F_EVENT_IDX | ids.F_INDIRECT_DESC

needs_tap = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/net/tun"),
                               reason="making a tap needs root and /dev/net/tun")


@needs_tap
def test_a_tap_is_made_used_and_gone():
    device = NetConfig("tap", address="10.213.79.1/24", mac="02:00:00:00:00:05", mtu=1400).create()
    name = device.backend.name
    try:
        with open(f"/sys/class/net/{name}/mtu") as file:
            assert file.read() == "1400\n"
        driver = Driver(device).probe()
        for _ in range(16):
            driver.rings[net.RX].add([], [2048])
        driver.notify(net.RX)
        question = (b"\xff" * 6 + device.mac + bytes.fromhex("0806 0001 0800 0604 0001") + device.mac
                    + bytes((10, 213, 79, 2)) + bytes(6) + bytes((10, 213, 79, 1)))
        driver.request(net.TX, [HEADER + question], [])
        answers: list[bytes] = []
        for _ in range(50):
            driver.loop.poll(0.1)
            answers += [parts[0][:written] for _, written, parts in driver.rings[net.RX].take()]
            if any(answer[12:18] == device.mac for answer in answers):
                break
        answer = next(answer for answer in answers if answer[12:18] == device.mac)
        assert answer[24:26] == b"\x08\x06" and answer[40:44] == bytes((10, 213, 79, 1)) and answer[10:12] == b"\1\0"
        # the kernel refuses what makes no sense
        nonsense = net.HEADER.pack(1, 1, 60000, 0, 60000, 60000, 0)
        driver.request(net.TX, [nonsense + FRAME], [])
        assert device.dropped == 1
    finally:
        device.close()
    assert not os.path.exists(f"/sys/class/net/{name}")


@needs_tap
def test_a_tap_leaves_to_the_driver_what_it_took():
    device = NetConfig("tap", address="10.213.82.1/24").create()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
            host.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            host.bind(("10.213.82.1", 0))
            for took, flags in ((net.F_CSUM | net.F_GUEST_CSUM, net.HDR_NEEDS_CSUM), (net.F_CSUM, 0)):
                driver = Driver(device).probe(COMMON | net.F_MRG_RXBUF | took)
                for _ in range(32):
                    driver.rings[net.RX].add([], [2048])
                driver.notify(net.RX)
                host.sendto(b"x" * 77, ("10.213.82.255", 9))
                seen: list[bytes] = []
                for _ in range(50):
                    driver.loop.poll(0.1)
                    seen += [parts[0][:written] for _, written, parts in driver.rings[net.RX].take()]
                    if any(frame.endswith(b"x" * 77) for frame in seen):
                        break
                (frame,) = (frame for frame in seen if frame.endswith(b"x" * 77))
                assert frame[0] & net.HDR_NEEDS_CSUM == flags
        carrier = f"/sys/class/net/{device.backend.name}/carrier"
        for up in (False, True):
            device.set_link(up)
            with open(carrier) as file:
                assert file.read() == f"{up:d}\n"
    finally:
        device.close()


@needs_tap
def test_taps_that_cannot_be_had():
    device = NetConfig(tap="pyhvtest0").create()
    try:
        assert device.backend.name == "pyhvtest0"
        with pytest.raises(ConfigError, match="in use"):
            NetConfig(tap="pyhvtest0").create()
        with pytest.raises(ConfigError, match="is there already"):
            NetConfig(tap="pyhvtest0", address="10.213.80.1/24").create()
    finally:
        device.close()
    with pytest.raises(ConfigError, match="lo is no tap"):
        NetConfig(tap="lo").create()


@needs_tap
@pytest.mark.parametrize("kind", [[], ["multi_queue"]])
def test_a_given_tap_is_used_and_stays(kind):
    name = "pyhvtest2"
    assert os.spawnlp(os.P_WAIT, "ip", "ip", "tuntap", "add", name, "mode", "tap", *kind) == 0
    try:
        for _ in range(2):
            device = NetConfig(tap=name).create()
            assert device.backend.name == name
            driver = Driver(device).probe()
            driver.request(net.TX, [HEADER + FRAME], [])
            assert device.dropped == 1, "it is down, and that is the host's business"
            device.close()
            assert os.path.exists(f"/sys/class/net/{name}")
    finally:
        assert os.spawnlp(os.P_WAIT, "ip", "ip", "link", "delete", name) == 0


@needs_tap
def test_a_tap_is_deleted_while_in_use():
    device = NetConfig(tap="pyhvtest1").create()
    try:
        driver = Driver(device).probe()
        driver.rings[net.RX].add([], [2048])
        driver.notify(net.RX)
        assert os.spawnlp(os.P_WAIT, "ip", "ip", "link", "delete", "pyhvtest1") == 0
        driver.loop.poll(1)
        for _ in range(20):
            driver.loop.poll(0)
        assert device.config()[6] == 0 and device.lost and driver.loop.poll(0) == 0
        driver.request(net.TX, [HEADER + FRAME], [])
        assert device.dropped == 1
    finally:
        device.close()


# configuration -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, options, text", [
    (None, {}, "nothing asked for"), ("bridge", {}, "bridge asked for"), ("tap", {"pair": "x"}, "tap and pair"),
    ("tap", {"mac": "01:00:00:00:00:00"}, "no address of a card"), ("tap", {"mac": "2:0:0"}, "no address of a card"),
    (None, {"tap": "much-too-long-name"}, "no name"), (None, {"tap": "a/b"}, "no name"),
    (None, {"tap": ".."}, "no name"),
    ("tap", {"rate": "fast"}, "no number"), ("tap", {"rate": "0"}, "no number"), ("tap", {"mtu": "9"}, "68 to"),
    ("tap", {"address": "10.0.0.1"}, "no IPv4 address"), ("tap", {"address": "10.0.0.256/8"}, "no IPv4 address"),
    ("tap", {"forward": "1:2"}, "goes with user"), ("user", {"address": "10.0.0.1/8"}, "goes with tap"),
    ("user", {"forward": "80"}, "two ports"), ("user", {"forward": "80:80/sctp"}, "two ports"),
    ("user", {"forward": "0:80"}, "two ports"), ("user", {"forward": "80:1+80:2"}, "twice"),
    ("user", {"forward": True}, "needs a value"), (None, {"vhost_user": "s", "rate": "1K"}, "the back end's"),
])
def test_what_cannot_be_asked_for(kind, options, text):
    with pytest.raises(ConfigError, match=text) as caught:
        NetConfig(kind, **options)
    assert caught.value.hint


def test_values():
    config = NetConfig("user", forward="8080:80;0.0.0.0:53:5353/udp", rate="3M", mac="52-54-00-12-34-56")
    assert config.forwards == (("tcp", "127.0.0.1", 8080, 80), ("udp", "0.0.0.0", 53, 5353))
    assert config.rate == 3000000 and config.mac == bytes.fromhex("525400123456")


def test_derived_addresses_are_stable_and_differ():
    macs = {derive_mac(identity, name) for identity in ("tap=a", "tap=b") for name in ("net0", "net1")}
    assert len(macs) == 4 and all(mac[0] == 2 for mac in macs) and derive_mac("tap=a", "net0") in macs
