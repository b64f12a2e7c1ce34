"""The vhost-user front end, by the mock driver and a back end of ours (tests/framework/vhost_backend.py)."""

from __future__ import annotations

import os
import socket
import struct
import time

import pytest
from framework.driver import MEMORY, Driver
from framework.vhost_backend import ALL_PROTOCOL, RING_FEATURES, BackEnd
from framework.vhost_driver import BLK_CONFIG, PF, blk, driven, echo, request, wait

from hv.devices.vhost_user import protocol
from hv.devices.vhost_user.blk import F_CONFIG_WCE, F_MQ, VhostUserBlk
from hv.devices.vhost_user.fs import VhostUserFs
from hv.devices.vhost_user.net import VhostUserNet
from hv.devices.virtio import ids
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig
from hv.errors import ConfigError
from hv.machine.config import MachineConfig
from hv.memory.guest import GuestMemory


def test_requests_pass_through_the_rings(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        assert request(driver, 0, [b"hello ", b"disk"], [16])[0][:11] == b"\0hello disk"
        assert request(driver, 0, [b"in a table"], [4, 20], indirect=True) == [b"\0in ", b"a table".ljust(20, b"\xaa")]
        for round_ in range(200):       # around the ring a few times
            assert request(driver, 0, [b"%d" % round_], [8])[0].startswith(b"\0%d" % round_)
        assert device.features & PF == 0 and back_end.chosen & PF
        assert not device.faults and not device.warnings


def test_two_queues(tmp_path):
    with driven(lambda path: VhostUserNet(path, b"\x02\0\0\0\0\1"), tmp_path / "s") as (driver, device, _):
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"] and request(driver, 1, [b"y"], [2]) == [b"\1y"]
        assert device.config() == b"\x02\0\0\0\0\1" + b"\1\0"


def test_without_protocol_features(tmp_path):
    with driven(lambda path: VhostUserFs(path, "t"), tmp_path / "s", features=RING_FEATURES) as (driver, device, back):
        assert request(driver, 1, [b"y"], [2]) == [b"\1y"]
        assert protocol.SET_VRING_ENABLE not in back.log and protocol.GET_PROTOCOL_FEATURES not in back.log
        assert device.config() == b"t".ljust(36, b"\0") + b"\1\0\0\0"


@pytest.mark.parametrize("lacking", [protocol.P_MQ, protocol.P_REPLY_ACK, protocol.P_BACKEND_REQ])
def test_without_one_protocol_feature(tmp_path, lacking):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG, protocol=ALL_PROTOCOL & ~lacking) as (driver, _, _):
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]


def test_only_known_features_reach_the_driver(tmp_path):
    everything = (1 << 64) - 1
    with driven(blk, tmp_path / "s", config=BLK_CONFIG, features=everything, probe=False) as (_, device, _):
        assert device.offered & RING_FEATURES == RING_FEATURES
        assert not device.offered & (PF | ids.F_RING_RESET | F_MQ | 1 << 33 | 1 << 34)   # access platform, packed ring
    two = driven(lambda path: blk(path, 2), tmp_path / "t", config=BLK_CONFIG, features=everything)
    with two as (driver, device, _):
        assert device.offered & F_MQ and device.config()[34:36] == b"\2\0"
        assert request(driver, 1, [b"x"], [2]) == [b"\1x"]


def test_reset_stops_the_rings_and_a_new_start_begins_anew(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        request(driver, 0, [b"x"], [2])
        device.set_status(0)
        assert not back_end.rings and back_end.log[-1] == protocol.GET_VRING_BASE
        driver.probe()
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]
        assert back_end.log.count(protocol.SET_MEM_TABLE) == 1


def test_a_ring_taken_back_alone(tmp_path):
    with driven(lambda path: VhostUserNet(path), tmp_path / "s") as (driver, device, back_end):
        device.enable_queue(1, False)
        assert set(back_end.rings) == {0}
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]


def test_configuration_space(tmp_path):
    features = RING_FEATURES | PF | F_CONFIG_WCE
    with driven(blk, tmp_path / "s", config=BLK_CONFIG, features=features) as (driver, device, back_end):
        assert device.read_config(0, 8) == 1 << 14 and device.read_config(34, 2) == 1
        device.put_config(32, 1, 1)
        assert back_end.config[32] == 1 and device.read_config(32, 1) == 1
        device.put_config(0, 8, 5)
        assert device.read_config(0, 8) == 1 << 14 and device.faults == 1
        back_end.config[0:8] = (1 << 15).to_bytes(8, "little")
        back_end.send_on_channel(protocol.BACKEND_CONFIG_CHANGE, flags=protocol.NEED_REPLY)
        wait(driver, lambda: device.read_config(0, 8) == 1 << 15)
        assert driver.interrupts.config == 1 and device.generation == 1
        assert back_end.channel.recv(100) == struct.pack("=IIIQ", 2, 5, 8, 0)
        back_end.send_on_channel(9, b"\0" * 8, protocol.NEED_REPLY)
        wait(driver, lambda: len(back_end.channel.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT)) == 20
             if _readable(back_end.channel) else False)
        assert back_end.channel.recv(100)[12:] == struct.pack("=Q", 1)
        assert not device.warnings


def _readable(end):
    import select

    return bool(select.select([end], [], [], 0)[0])


def test_an_interrupt_descriptor_of_the_transport_is_used(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG, probe=False) as (driver, device, _):
        direct = os.eventfd(0, os.EFD_NONBLOCK)
        driver.interrupts.queue_fd = lambda index: direct
        driver.probe()
        driver.rings[0].add([b"x"], [2])
        os.eventfd_write(device.kick_fds[0], 1)
        wait(driver, driver.rings[0].take)
        end = time.monotonic() + 5
        while not _readable(direct):
            assert time.monotonic() < end
        os.close(direct)
        assert not driver.interrupts.used


def test_a_signal_that_means_nothing_is_no_interrupt(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        before = len(back_end.log)
        back_end.run(lambda: (os.eventfd_write(back_end.calls[0], 1), back_end.log.append(0)))   # as libvhost-user does
        wait(driver, lambda: len(back_end.log) > before)
        driver.loop.poll(0.1)
        assert not driver.interrupts.used
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"] and driver.interrupts.used == {0: 1}
        device.stop()
        driver.memory.put16(driver.rings[0].avail, ids.AVAIL_NO_INTERRUPT)
        device.queues[0].event_idx = False      # a driver that polls, without EVENT_IDX
        device.resume()
        assert driver.interrupts.used == {0: 1}


# state -----------------------------------------------------------------------------------------------


def test_pause_and_wake(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        for _ in range(5):
            request(driver, 0, [b"x"], [2])
        device.stop()
        assert not back_end.rings
        saved = device.state()
        assert saved["queues"][0]["next"] == saved["queues"][0]["used_index"] == 5
        driver.rings[0].add([b"later"], [8])
        os.eventfd_write(device.kick_fds[0], 1)
        device.resume()
        driver.loop.run()
        found = []
        wait(driver, lambda: found.extend(driver.rings[0].take()) or found)
        assert found[0][2][0][:6] == b"\0later"


def test_a_state_goes_to_another_device(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, _):
        for _ in range(3):
            request(driver, 0, [b"x"], [2])
        device.stop()
        saved = device.state()
        with BackEnd(tmp_path / "t", echo, config=BLK_CONFIG) as second:
            other = blk(str(tmp_path / "t"))
            try:
                other.attach(driver.memory, driver.loop, driver.interrupts)
                other.kick_fds = device.kick_fds
                other.load(saved)
                driver.device = other
                other.resume()
                assert request(driver, 0, [b"z"], [2]) == [b"\0z"] and second.rings
            finally:
                other.close()
                for queue in other.queues:
                    queue.reset()


# the machine --------------------------------------------------------------------------------------------


def test_guest_memory_must_be_shared(tmp_path):
    with BackEnd(tmp_path / "s", echo, config=BLK_CONFIG):
        device = blk(str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="can't be shared"):
            Driver(device)
        device.close()


@pytest.mark.parametrize("config", [DiskConfig(vhost_user="s"), NetConfig(vhost_user="s"),
                                    ShareConfig(tag="t", vhost_user="s")])
def test_the_machine_takes_a_memfd_by_itself(config):
    assert MachineConfig(devices=(config,)).backing == "memfd" and MachineConfig().backing == "anon"


def test_shared_memory_keeps_its_size():
    memory = GuestMemory(MEMORY, backing="memfd")
    with pytest.raises(PermissionError):
        os.ftruncate(memory.regions[0].fd, 0)
    memory.close()


def test_bad_words():
    for make in (lambda: VhostUserFs("s", ""), lambda: VhostUserFs("s", "x" * 37), lambda: VhostUserBlk("s", 0),
                 lambda: VhostUserNet("s", b"\1\0\0\0\0\0"), lambda: VhostUserNet("s", b"\2")):
        with pytest.raises(ConfigError):
            make()
