"""A cable between two guests: who listens, who leaves and comes back, what crosses it."""

from __future__ import annotations

import os
import socket
import time

import pytest
from framework.driver import Driver
from framework.packets import check_tcp, tcp_packet

from hv.devices.virtio import ids
from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.net_pair import NetCable, NetPair
from hv.errors import ConfigError
from hv.linux.slots import leave_slot, take_slot

HEADER = bytes(net.HEADER_SIZE)
FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(range(200))
COMMON = ids.F_VERSION_1 | ids.F_EVENT_IDX | net.F_MAC | net.F_STATUS | net.F_MRG_RXBUF
CSUM = net.F_CSUM | net.F_GUEST_CSUM
TSO = CSUM | net.F_HOST_TSO4 | net.F_GUEST_TSO4


class End:
    """A guest at one end, with 32 buffers to receive into."""

    def __init__(self, backend: NetCable, features: int | None = None) -> None:
        self.device = Net(backend)
        self.driver = Driver(self.device).probe(features)
        for _ in range(60):
            self.driver.rings[net.RX].add([], [4096])
        self.driver.notify(net.RX)

    def send(self, frame: bytes, header: bytes = HEADER) -> None:
        self.driver.request(net.TX, [header, frame], [])

    def arrived(self) -> list[bytes]:
        """Header and frame of each, buffers put together."""
        while self.driver.loop.poll():
            pass
        rows = [b"".join(parts)[:written] for _, written, parts in self.driver.rings[net.RX].take()]
        found = []
        while rows:
            count = int.from_bytes(rows[0][net.NUM_BUFFERS:net.HEADER_SIZE], "little")
            found.append(b"".join(rows[:count]))
            del rows[:count]
        return found

    def tick(self) -> None:
        """Let timers run."""
        timers, self.driver.loop.timers = self.driver.loop.timers, []
        for _, function in timers:
            function()
        while self.driver.loop.poll():
            pass


def meet(*ends: End) -> None:
    for _ in range(5):
        for end in ends:
            end.tick()


def test_a_cable_of_one_process():
    one, two = (End(backend) for backend in NetCable.socketpair())
    one.send(FRAME)
    two.send(FRAME[:80])
    assert two.arrived() == [HEADER[:10] + b"\1\0" + FRAME] and one.arrived()[0][12:] == FRAME[:80]
    assert one.device.mac != two.device.mac
    for end in (one, two):
        end.device.close()


@pytest.mark.parametrize("features, pieces, open_sum", [(TSO, 1, True), (CSUM, 3, False), (0, 3, False)])
def test_a_large_segment_arrives_as_the_driver_can_take_it(features, pieces, open_sum):
    one, two = NetCable.socketpair()
    sender, receiver = End(one), End(two, COMMON | features)
    packet = tcp_packet(os.urandom(2500), 4, gso_size=1000)
    sender.send(packet[net.HEADER_SIZE:], packet[:net.HEADER_SIZE])
    got = receiver.arrived()
    assert len(got) == pieces
    if open_sum:
        assert got[0][:10] == packet[:10] and got[0][12:] == packet[12:]
    else:
        assert all(frame[:10] == bytes(10) for frame in got)
        assert b"".join(check_tcp(frame[12:], 4, 14)[2] for frame in got) == packet[-2500:]
    packet = tcp_packet(os.urandom(500), 4)
    sender.send(packet[net.HEADER_SIZE:], packet[:net.HEADER_SIZE])
    (frame,) = receiver.arrived()
    assert frame[0] == (1 if features & net.F_GUEST_CSUM else 0)
    for end in (sender, receiver):
        end.device.close()


def test_a_header_without_sense_does_not_reach_the_other_guest():
    one, two = (End(backend) for backend in NetCable.socketpair())
    for header in (net.HEADER.pack(1, 0, 0, 0, 5000, 0, 0), net.HEADER.pack(1, 1, 0, 0, 34, 16, 0),
                   net.HEADER.pack(0, 7, 0, 0, 0, 0, 0)):
        one.send(FRAME, header)
    one.send(FRAME, net.HEADER.pack(0xFE, 0, 9, 9, 9, 9, 9))     # nothing asked for: the rest is not passed on
    assert two.arrived() == [HEADER[:10] + b"\1\0" + FRAME]
    for end in (one, two):
        end.device.close()


def test_guests_meet_leave_and_come_back(tmp_path):
    path = str(tmp_path / "cable")
    first = End(NetPair(path))
    assert first.device.config()[6] == 0, "no cable yet"
    first.send(FRAME)
    assert first.device.dropped == 1
    for _ in range(2):      # the second one comes, goes, comes back
        second = End(NetPair(path))
        meet(first, second)
        assert first.device.config()[6] == second.device.config()[6] == 1
        first.send(FRAME)
        second.send(FRAME)
        assert len(first.arrived()) == len(second.arrived()) == 1
        macs = first.device.mac, second.device.mac
        second.device.close()
        meet(first)
        assert first.device.config()[6] == 0
    second = End(NetPair(path))
    meet(first, second)
    first.device.close()    # now the one that listens
    meet(second)
    assert second.device.config()[6] == 0
    first = End(NetPair(path))
    meet(first, second)
    first.send(FRAME)
    assert len(second.arrived()) == 1 and (first.device.mac, second.device.mac) == macs
    with pytest.raises(ConfigError, match="two guests are joined"):
        NetConfig(pair=path).create()
    for end in (second, first):
        end.device.close()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_guest_leaves_behind_is_taken_over(tmp_path):
    path = str(tmp_path / "cable")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(path)
    (tmp_path / "cable.lock").touch()
    one, two = End(NetPair(path)), End(NetPair(path))
    meet(one, two)
    one.send(FRAME)
    assert len(two.arrived()) == 1
    for end in (one, two):
        end.device.close()
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        NetConfig(pair=str(file)).create()
    assert file.read_text() == "precious" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(ConfigError, match="at most"):
        NetConfig(pair="/tmp/" + "x" * 120).create()
    with pytest.raises(ConfigError, match="No such file"):
        NetConfig(pair=str(tmp_path / "none/cable")).create()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(tmp_path / "theirs"))
        other.listen(1)
        with pytest.raises(ConfigError, match="another program"):
            NetConfig(pair=str(tmp_path / "theirs")).create()


def test_slots(tmp_path):
    path = str(tmp_path / "lock")
    held = [take_slot(path, 2) for _ in range(3)]
    assert [number for _, number in held] == [0, 1, -1]
    leave_slot(held[0][0], path, 2, 0)
    assert os.path.exists(path)
    again = take_slot(path, 2)
    assert again[1] == 0
    leave_slot(held[1][0], path, 2, 1)
    leave_slot(again[0], path, 2, 0)
    assert not os.path.exists(path)


def test_a_lonely_guest_costs_little(tmp_path):
    first = End(NetPair(str(tmp_path / "cable")))
    second = End(NetPair(str(tmp_path / "cable")))
    first.device.close()
    second.tick()
    began = time.process_time()
    for _ in range(200):        # 100 s of looking for the other one
        second.tick()
    assert time.process_time() - began < 0.25
    second.device.close()
