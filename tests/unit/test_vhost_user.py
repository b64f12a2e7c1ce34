"""The vhost-user front end, by the mock driver and a back end of ours (tests/framework/vhost_backend.py)."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from framework.driver import MEMORY, Driver
from framework.vhost_backend import ALL_PROTOCOL, RING_FEATURES, BackEnd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.devices.vhost_user import backend, protocol
from hv.devices.vhost_user.blk import CONFIG_SIZE, F_CONFIG_WCE, F_MQ, VhostUserBlk
from hv.devices.vhost_user.fs import VhostUserFs
from hv.devices.vhost_user.net import VhostUserNet
from hv.devices.virtio import ids
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig
from hv.errors import ConfigError
from hv.machine.config import MachineConfig
from hv.memory.guest import GuestMemory

PF = protocol.F_PROTOCOL_FEATURES
BLK_CONFIG = (1 << 14).to_bytes(8, "little").ljust(CONFIG_SIZE, b"\0")


def echo(back_end, index, chain):
    """Writes what it read, with its queue's number before it."""
    return chain.writer().write(bytes([index]) + chain.reader().read(1 << 16))


@contextmanager
def driven(make, path, serve=echo, probe=True, **options):
    """(driver, device, back end), the driver at DRIVER_OK."""
    with BackEnd(path, serve, **options) as back_end:
        device = make(str(path))
        memory = GuestMemory(MEMORY, backing="memfd")
        try:
            driver = Driver(device, memory)
            device.kick_fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in device.queues]
            if probe:
                driver.probe()
            yield driver, device, back_end
        finally:
            device.close()
            for queue in device.queues:
                queue.reset()
            for fd in device.kick_fds:
                os.close(fd)
            memory.close()


def blk(path, queues=1):
    return VhostUserBlk(path, queues)


def wait(driver, what, seconds=5.0):
    """Let the I/O loop and its timers run until what() is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        driver.loop.poll(0.005)
        if what():
            break
        timers, driver.loop.timers = driver.loop.timers, []
        for _, function in timers:
            function()
    return True


def request(driver, index, readable, writable, indirect=False):
    """One chain through the back end, to its end."""
    ring = driver.rings[index]
    ring.add(readable, writable, indirect=indirect)
    before = driver.interrupts.used.get(index, 0)
    os.eventfd_write(driver.device.kick_fds[index], 1)
    found = []
    wait(driver, lambda: found.extend(ring.take()) or found)
    wait(driver, lambda: driver.interrupts.used.get(index, 0) > before)
    return found[0][2]


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


# a back end that fails ---------------------------------------------------------------------------------


def test_nobody_there(tmp_path):
    for path in (str(tmp_path / "nobody"), str(tmp_path), "x" * 200, "nul\0"):
        with pytest.raises(ConfigError, match="no connection to a back end"):
            VhostUserFs(path, "tag")


def test_a_back_end_that_starts_a_little_later(tmp_path):
    made = []
    timer = threading.Timer(0.3, lambda: made.append(BackEnd(tmp_path / "s", echo)))
    timer.start()
    device = VhostUserFs(str(tmp_path / "s"), "tag")
    device.close()
    timer.join()
    made[0].close()


def test_back_ends_that_do_not_fit(tmp_path):
    for make, options, text in (
            (blk, {"features": PF, "config": BLK_CONFIG}, "before virtio 1.0"),
            (blk, {"protocol": 0}, "no configuration space"),
            (blk, {"config": b"short"}, "bytes instead of"),
            (lambda path: blk(path, 2), {"config": BLK_CONFIG}, "one queue only"),
            (lambda path: blk(path, 3), {"features": RING_FEATURES | PF | F_MQ, "config": BLK_CONFIG}, "has 2 queues"),
            (VhostUserNet, {"queues": 1}, "has 1 queues, 2 are needed")):
        with BackEnd(tmp_path / "s", echo, **options), pytest.raises(ConfigError, match=text):
            make(str(tmp_path / "s"))


@pytest.mark.parametrize("number", [protocol.GET_FEATURES, protocol.SET_OWNER, protocol.GET_CONFIG])
def test_a_back_end_that_hangs_costs_a_bounded_time(tmp_path, monkeypatch, number):
    monkeypatch.setattr(protocol.Connection.__init__, "__defaults__", (0.0, 0.3))
    with BackEnd(tmp_path / "s", echo, config=BLK_CONFIG) as back_end:
        back_end.mute = {number}
        start = time.monotonic()
        with pytest.raises(protocol.VhostUserError, match="does not answer"):
            backend.BackEnd(str(tmp_path / "s"), CONFIG_SIZE, budget=0.3)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("number", [protocol.SET_MEM_TABLE, protocol.SET_VRING_KICK, protocol.SET_VRING_ENABLE])
def test_a_refusal_cuts_the_connection_and_it_is_tried_again(tmp_path, number):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG, probe=False) as (driver, device, back_end):
        back_end.refused = {number}
        driver.probe()
        assert not device.connected and "refused request" in device.warnings[0]
        back_end.refused = set()
        wait(driver, lambda: device.connected)
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]
        assert device.status & ids.DRIVER_OK and not device.status & ids.NEEDS_RESET and not device.faults


def test_the_back_end_dies_and_comes_back(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        for round_ in range(3):
            request(driver, 0, [b"x"], [2])
            back_end.hang_up()
            wait(driver, lambda: not device.connected)
            driver.rings[0].add([b"meanwhile %d" % round_], [16])
            os.eventfd_write(device.kick_fds[0], 1)
            found = []
            wait(driver, lambda: found.extend(driver.rings[0].take()) or found)     # noqa: B023
            assert found[0][2][0].startswith(b"\0meanwhile %d" % round_)
        assert not device.faults and not device.status & ids.NEEDS_RESET
        assert device.warnings[:2] == ["the back end closed the connection", "the back end is back"]


def test_an_interrupt_that_died_with_the_back_end_is_made_up_for(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        back_end.signal = lambda index: None
        driver.rings[0].add([b"x"], [8])
        os.eventfd_write(device.kick_fds[0], 1)
        wait(driver, driver.rings[0].take)
        assert not driver.interrupts.used
        back_end.hang_up()
        wait(driver, lambda: not device.connected)
        wait(driver, lambda: device.connected)
        assert driver.interrupts.used == {0: 1}


def test_requests_in_flight_in_order_are_done_again(tmp_path):
    kept = []

    def keep(back_end, index, chain):
        if chain.reader().read(4) == b"keep" and len(kept) < 2:
            kept.append(chain)
            return None
        return echo(back_end, index, chain)

    with driven(blk, tmp_path / "s", keep, config=BLK_CONFIG) as (driver, device, back_end):
        request(driver, 0, [b"x"], [2])
        for _ in range(2):
            driver.rings[0].add([b"keep"], [8])
        os.eventfd_write(device.kick_fds[0], 1)
        wait(driver, lambda: len(kept) == 2)
        kept[:] = [None, None]
        back_end.hang_up()
        found = []
        wait(driver, lambda: found.extend(driver.rings[0].take()) or len(found) == 2)
        assert not device.status & ids.NEEDS_RESET


def test_requests_in_flight_out_of_order_end_in_a_reset(tmp_path):
    kept = []

    def keep_first(back_end, index, chain):
        if chain.reader().read(4) == b"keep":
            kept.append(chain.head)
            return None
        return echo(back_end, index, chain)

    with driven(blk, tmp_path / "s", keep_first, config=BLK_CONFIG) as (driver, device, back_end):
        driver.rings[0].add([b"keep"], [8])
        driver.rings[0].add([b"go"], [8])
        os.eventfd_write(device.kick_fds[0], 1)
        wait(driver, lambda: driver.rings[0].take())
        back_end.hang_up()
        wait(driver, lambda: device.status & ids.NEEDS_RESET)
        assert driver.interrupts.config == 1 and "out of order" in device.warnings[1]
        wait(driver, lambda: device.connected)
        assert not back_end.rings       # nothing runs before the reset
        driver.probe()
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]


def test_requests_that_outlast_the_reset_cost_the_connection(tmp_path):
    with driven(blk, tmp_path / "s", lambda *_: None, config=BLK_CONFIG) as (driver, device, back_end):
        driver.rings[0].add([b"x"], [8])
        os.eventfd_write(device.kick_fds[0], 1)
        wait(driver, lambda: back_end.rings[0].state()["next"] == 1)
        start = time.monotonic()
        device.set_status(0)
        assert time.monotonic() - start < 4 and not device.connected and "in flight" in device.warnings[0]


def test_another_back_end_that_can_less_is_not_taken(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        back_end.features &= ~ids.F_EVENT_IDX
        back_end.hang_up()
        wait(driver, lambda: any("lacks features" in text for text in device.warnings))
        assert not device.connected
        back_end.features |= ids.F_EVENT_IDX
        wait(driver, lambda: device.connected)
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]


def test_the_link_follows_the_back_end(tmp_path):
    with driven(VhostUserNet, tmp_path / "s") as (driver, device, back_end):
        back_end.hang_up()
        wait(driver, lambda: not device.connected)
        assert device.read_config(6, 2) == 0 and driver.interrupts.config == 1
        wait(driver, lambda: device.connected)
        assert device.read_config(6, 2) == 1 and driver.interrupts.config == 2


def test_unasked_words_and_a_wild_channel_cost_the_connection(tmp_path):
    with driven(blk, tmp_path / "s", config=BLK_CONFIG) as (driver, device, back_end):
        back_end.run(lambda: back_end.line.sendall(b"surprise"))
        wait(driver, lambda: device.warnings == ["the back end sent something nobody asked for"])
        wait(driver, lambda: device.connected)
        back_end.run(lambda: back_end.channel.sendall(struct.pack("=III", 2, 1, 1 << 31)))
        wait(driver, lambda: len(device.warnings) == 3)
        wait(driver, lambda: device.connected)
        assert request(driver, 0, [b"x"], [2]) == [b"\0x"]


class Liar:
    """Answers every message by the next of `answers`, (message, whether a descriptor goes along), then hangs up."""

    def __init__(self, path: Path, answers) -> None:
        self.answers = answers
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self.main)
        self.thread.start()

    def main(self) -> None:
        line, _ = self.listener.accept()
        with line:
            for data, descriptor in self.answers:
                try:
                    if not line.recv(4096):
                        return
                    socket.send_fds(line, [data], [0] if descriptor else [])
                except OSError:
                    return

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def message(number, flags, payload, size=None):
    return struct.pack("=III", number, flags, len(payload) if size is None else size) + payload


GOOD = [message(1, 5, struct.pack("=Q", RING_FEATURES | PF)), message(15, 5, struct.pack("=Q", ALL_PROTOCOL))]
lies = st.lists(st.tuples(st.one_of(
    st.binary(min_size=1, max_size=40),
    st.builds(message, st.sampled_from([1, 3, 15, 16, 17, 21, 24]), st.sampled_from([5, 1, 4, 0, 0xFFFFFFFF]),
              st.sampled_from([bytes(8), b"\xff" * 8, bytes(72), b"", bytes(4)]),
              st.sampled_from([None, None, 0, 8, 0xFFFFFFFF]))), st.booleans()), max_size=8)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lies, st.integers(0, 2))
def test_lies_are_told_apart_and_cost_nothing(tmp_path, answers, honest):
    path = tmp_path / "liar"
    path.unlink(missing_ok=True)
    descriptors = set(os.listdir("/proc/self/fd"))
    with Liar(path, [(data, False) for data in GOOD[:honest]] + answers):
        try:
            backend.BackEnd(str(path), CONFIG_SIZE, budget=0.1).close()
        except protocol.VhostUserError:
            pass
    assert set(os.listdir("/proc/self/fd")) == descriptors


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.binary(min_size=1, max_size=60), max_size=4))
def test_the_channel_takes_anything(tmp_path, data):
    path = tmp_path / "channel"
    path.unlink(missing_ok=True)
    with BackEnd(path, echo) as other:
        made = backend.BackEnd(str(path))
        try:
            for part in data:
                other.channel.sendall(part)
                assert all(isinstance(number, int) for number in made.channel_requests())
        except protocol.VhostUserError:
            pass
        finally:
            made.close()


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
