"""The packet socket as a network card: a driver in this process behind one end of a veth pair."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import pytest
from framework.driver import Driver
from framework.namespaces import Host

from hv.devices.virtio import ids
from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.net_offload import checksum
from hv.errors import ConfigError
from hv.linux.netns import Netns, inside, new_netns

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

COMMON = ids.F_VERSION_1 | ids.F_EVENT_IDX | ids.F_INDIRECT_DESC
HEADER = bytes(net.HEADER_SIZE)
OURS, THEIRS = "10.213.90.2", "10.213.90.1"
SEEN: WeakKeyDictionary[Driver, list[bytes]] = WeakKeyDictionary()
OFFLOADS = net.F_CSUM | net.F_HOST_TSO4 | net.F_GUEST_CSUM | net.F_GUEST_TSO4 | net.F_GUEST_ECN


@pytest.fixture
def place() -> Iterator[tuple[Host, Netns]]:
    """A host of its own with v0 (10.213.90.1), and a namespace with the other end, eth0 (10.213.90.2)."""
    with Host() as host, new_netns() as netns:
        host.run("ip link add v0 type veth peer name eth0")
        host.run(f"ip link set eth0 netns /proc/{os.getpid()}/fd/{netns.fd}")
        host.run(f"ip address add {THEIRS}/24 dev v0; ip link set v0 up")
        within(netns, f"ip address add {OURS}/24 dev eth0; ip link set eth0 up; ip route add default via {THEIRS}")
        yield host, netns


def within(netns: Netns, command: str) -> str:
    return subprocess.run(["nsenter", f"--net={netns.path}", "sh", "-c", command], text=True, timeout=20, check=True,
                          capture_output=True).stdout


def ready(device: Net, took: int, buffers: int = 32) -> Driver:
    driver = Driver(device).probe(COMMON | net.F_MRG_RXBUF | took)
    for _ in range(buffers):
        driver.rings[net.RX].add([], [2048])
    driver.notify(net.RX)
    return driver


def frames(driver: Driver, wanted: bytes, attempts: int = 50) -> bytes:
    """The bytes of the frame that has `wanted` in it, header first."""
    seen = SEEN.setdefault(driver, [])
    for _ in range(attempts):
        seen += [parts[0][:written] for _, written, parts in driver.rings[net.RX].take()]
        for frame in seen:
            if wanted in frame:
                return frame
        driver.loop.poll(0.1)
    raise AssertionError(f"no frame with {wanted!r}")


def udp(device: Net, to: bytes, port: int, payload: bytes, open_checksum: bool) -> bytes:
    """A frame from the guest to THEIRS."""
    ours, theirs = socket.inet_aton(OURS), socket.inet_aton(THEIRS)
    length = 8 + len(payload)
    pseudo = int.from_bytes(ours + theirs, "big") + 17 + length
    head = (4000).to_bytes(2, "big") + port.to_bytes(2, "big") + length.to_bytes(2, "big")
    body = head + b"\0\0" + payload
    value = 0xFFFF - checksum(b"", pseudo) if open_checksum else checksum(body, pseudo)
    body = head + value.to_bytes(2, "big") + payload
    ip = bytearray(bytes.fromhex("4500") + (20 + length).to_bytes(2, "big") + bytes.fromhex("0001 4000 4011 0000")
                   + ours + theirs)
    ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
    header = net.HEADER.pack(net.HDR_NEEDS_CSUM, 0, 0, 0, 34, 6, 0) if open_checksum else HEADER
    return header + to + device.mac + b"\x08\x00" + bytes(ip) + body


def test_what_the_interface_has_is_the_guests(place):
    _, netns = place
    device = NetConfig(packet="eth0", netns=netns.path).create()
    try:
        backend = device.backend
        assert (backend.address, backend.prefix, backend.gateway, backend.mtu) == (OURS, 24, THEIRS, 1500)
        assert device.mac.hex(":") in within(netns, "ip link show eth0")
        assert device.config()[:6] == backend.mac
        with pytest.raises(ConfigError, match="packet=eth0 has a guest already"):
            NetConfig(packet="eth0", netns=netns.path).create()        # a second guest
    finally:
        device.close()
    NetConfig(packet="eth0", netns=netns.path).create().close()


def test_the_namespaces_own_stack_is_silent_as_long_as_the_guest_lives(place):
    host, netns = place
    ping = ["ping", "-c1", "-W1", OURS]
    assert host.call(*ping).returncode == 0
    device = NetConfig(packet="eth0", netns=netns.path).create()
    try:
        driver = ready(device, OFFLOADS)
        host.run("ip neigh flush all")
        assert host.call(*ping).returncode == 1
        host.run(f"ip neigh replace {OURS} lladdr {device.mac.hex(':')} dev v0")
        with host:
            to_nobody = socket.socket()
            to_nobody.settimeout(0.5)
            with to_nobody, pytest.raises(TimeoutError):        # ConnectionRefusedError: the stack has answered
                to_nobody.connect((OURS, 80))
        assert frames(driver, b"\x08\x06")      # what the guest hears meanwhile: the question who has its address
    finally:
        device.close()
    host.run("ip neigh flush all")
    assert host.call(*ping).returncode == 0


@pytest.mark.parametrize("took", [OFFLOADS, 0])
def test_frames_both_ways(place, took):
    host, netns = place
    device = NetConfig(packet="eth0", netns=netns.path).create()
    try:
        driver = ready(device, took)
        host.run(f"ip neigh replace {OURS} lladdr {device.mac.hex(':')} dev v0")
        with host, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind((THEIRS, 0))
            peer.settimeout(2)
            to = bytes.fromhex(json.loads(host.run("ip -j link show v0"))[0]["address"].replace(":", ""))
            for open_checksum in (True, False):
                payload = bytes((open_checksum,)) * 301
                driver.request(net.TX, [udp(device, to, peer.getsockname()[1], payload, open_checksum)], [])
                assert peer.recv(2000) == payload
            # the host leaves the checksum open, and the driver takes that or gets a whole one
            peer.sendto(b"y" * 500, (OURS, 4000))
            frame = frames(driver, b"y" * 500)
            assert frame[10:12] == b"\1\0"
            assert bool(frame[0] & net.HDR_NEEDS_CSUM) == bool(took)
            if not took:
                segment = frame[12 + 14 + 20:]
                pseudo = int.from_bytes(frame[12 + 14 + 12:12 + 14 + 20], "big") + 17 + len(segment)
                assert checksum(segment, pseudo) == 0
            # a guest never hears its own frames
            driver.request(net.TX, [HEADER + b"\xff" * 6 + device.mac + b"\x88\xb5" + b"mine" * 30], [])
            with pytest.raises(AssertionError, match="no frame"):
                frames(driver, b"minemine", attempts=3)
            # nor what the namespace's own stack says
            port = peer.getsockname()[1]
            with inside(netns.fd), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
                within(netns, f"ip neigh replace {THEIRS} lladdr {to.hex(':')} dev eth0")
                own.sendto(b"theirs" * 30, (THEIRS, port))
            assert peer.recv(2000) == b"theirs" * 30
            with pytest.raises(AssertionError, match="no frame"):
                frames(driver, b"theirstheirs", attempts=3)
        nonsense = net.HEADER.pack(1, 1, 60000, 0, 60000, 60000, 0)
        driver.request(net.TX, [nonsense + b"\xff" * 64], [])
        assert device.dropped == 1
    finally:
        device.close()


def test_datagrams_that_the_host_left_together_are_cut(place):
    host, netns = place
    device = NetConfig(packet="eth0", netns=netns.path).create()
    try:
        driver = ready(device, OFFLOADS)
        host.run(f"ip neigh replace {OURS} lladdr {device.mac.hex(':')} dev v0")
        with host, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.setsockopt(socket.IPPROTO_UDP, 103, 1000)      # UDP_SEGMENT (include/uapi/linux/udp.h)
            peer.sendto(b"".join(bytes((number,)) * 1000 for number in range(4)) + b"end", (OURS, 4000))
        for number in range(4):
            assert len(frames(driver, bytes((number,)) * 1000)) == net.HEADER_SIZE + 42 + 1000
        assert len(frames(driver, b"end")) == net.HEADER_SIZE + 42 + 3
    finally:
        device.close()


def test_an_interface_that_goes_down_comes_back_and_one_that_is_deleted_does_not(place):
    host, netns = place
    device = NetConfig(packet="eth0", netns=netns.path).create()
    try:
        driver = ready(device, OFFLOADS)
        within(netns, "ip link set eth0 down; ip link set eth0 up")
        host.run(f"ip neigh replace {OURS} lladdr {device.mac.hex(':')} dev v0")
        with host, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.sendto(b"again" * 20, (OURS, 4000))
        assert frames(driver, b"againagain") and not device.lost
        host.run("ip link delete v0")
        for _ in range(20):
            driver.loop.poll(0.05)
        assert device.lost and device.config()[6] == 0
        driver.request(net.TX, [HEADER + b"\xff" * 64], [])
        assert device.dropped == 1
    finally:
        device.close()


def test_what_cannot_be_had(place):
    _, netns = place
    for words, text in (({"packet": "eth7", "netns": netns.path}, "no such Ethernet interface"),
                        ({"packet": "lo", "netns": "/proc/self/exe"}, "no network namespace"),
                        ({"packet": "eth0", "netns": "/nowhere"}, "No such file"),
                        ({"packet": "a/b"}, "no name of an interface"),
                        ({"packet": "eth0", "mtu": "1400"}, "the interface's"),
                        ({"tap": "tap7", "netns": "/x"}, "goes with packet")):
        with pytest.raises(ConfigError, match=text) as caught:
            NetConfig(**words).create()
        assert caught.value.hint
    config = NetConfig(packet="eth0", netns=netns.path)
    again = NetConfig(**config.recipe())
    assert (again.kind, again.path, again.netns) == ("packet", "eth0", netns.path)
    with inside(netns.fd):
        NetConfig(packet="eth0").create().close()       # this process's own namespace


def test_killed_it_leaves_nothing(place):
    host, netns = place
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from hv.devices.virtio.net_packet import NetPacket; "
            "made = NetPacket('eth0', sys.argv[2]); print('open', flush=True); sys.stdin.read()")
    child = subprocess.Popen(["python3", "-c", code, str(os.path.dirname(os.path.dirname(os.path.dirname(__file__)))),
                              netns.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"open\n"
    assert "pyhv-eth0" in within(netns, "nft list ruleset")
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert not within(netns, "nft list ruleset")
    assert host.call("ping", "-c1", "-W1", OURS).returncode == 0
