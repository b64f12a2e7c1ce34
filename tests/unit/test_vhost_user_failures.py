"""vhost-user back ends that are not there, hang, lie, die and come back; the front end by the mock driver."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from framework.vhost_backend import ALL_PROTOCOL, RING_FEATURES, BackEnd
from framework.vhost_driver import BLK_CONFIG, PF, blk, driven, echo, request, wait
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.devices.vhost_user import backend, protocol
from hv.devices.vhost_user.blk import CONFIG_SIZE, F_MQ
from hv.devices.vhost_user.fs import VhostUserFs
from hv.devices.vhost_user.net import VhostUserNet
from hv.devices.virtio import ids
from hv.errors import ConfigError


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
