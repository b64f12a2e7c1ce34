"""Virtio devices stand still, give their state, and take it over, from whoever it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from framework.driver import Driver
from framework.echo import ACK, DRV, FEAT, Echo, negotiated
from hypothesis import given, settings
from hypothesis import strategies as st


def test_pause_drains_and_resume_goes_on():
    driver = Driver(Echo()).probe()
    device, ring = driver.device, driver.rings[1]
    ring.add([b""], [4])
    driver.notify(1)
    device.stop()
    device.stop()
    assert device.told.count("pause") == 1 and [row[2] for row in ring.take()] == [[b"late"]]  # type: ignore[attr-defined]
    driver.rings[0].add([b"wait"], [4])
    driver.notify(0)
    assert driver.rings[0].take() == []
    device.resume()
    driver.loop.run()
    assert device.told.count("wake") == 1 and len(driver.rings[0].take()) == 1  # type: ignore[attr-defined]


def test_state_goes_over_into_another_device():
    driver = Driver(Echo()).probe()
    driver.request(0, [b"one"], [4])
    driver.device.put_config(0, 1, 65)
    driver.device.stop()
    driver.rings[0].add([b"two"], [4])
    other = Echo()
    successor = Driver(other, driver.memory)
    other.load(copy.deepcopy(driver.device.state()))
    assert other.state() == driver.device.state() and other.driven and not other.running
    other.resume()
    successor.loop.run()
    assert other.running and other.config() == b"A123456789"
    assert [row[1] for row in driver.rings[0].take()] == [3] and successor.interrupts.used == {0: 1}


@pytest.mark.parametrize("steps", [[], [ACK], [ACK | DRV], [ACK | DRV | FEAT]])
def test_state_of_every_stage(steps: list[int]) -> None:
    device = negotiated((1 << 64) - 1) if not steps else negotiated()
    for step in steps:
        device.set_status(step)
    other = Echo()
    Driver(other)
    other.load(device.state())
    assert other.state() == device.state()


JUNK = st.one_of(st.none(), st.integers(-(1 << 70), 1 << 70), st.text(max_size=3), st.floats(), st.just([]),
                 st.just({}))


@given(st.lists(st.tuples(st.sampled_from(
    ["version", "device", "status", "features", "generation", "queues", "model", "0.size", "0.ready", "0.desc",
     "1.avail", "1.used", "1.next", "0.used_index"]), st.one_of(st.just("gone"), JUNK)), max_size=3))
@settings(max_examples=150, deadline=None)
def test_hostile_states_leave_a_device_that_can_be_used(changes: list[tuple[str, object]]) -> None:
    state: Any = copy.deepcopy(STATE)
    for name, value in changes:
        index, dot, field = name.rpartition(".")
        queues = state.get("queues")
        place = (queues[int(index)] if isinstance(queues, list) and queues else {}) if dot else state
        if value == "gone":
            place.pop(field, None)
        else:
            place[field] = value
    device = Echo()
    driver = Driver(device, DRIVER.memory)
    try:
        device.load(state)
    except ValueError:
        assert device.status == 0
    device.resume()
    driver.loop.run()
    assert driver.probe().request(0, [b"alive"], [8])[0] == 5


DRIVER = Driver(Echo()).probe()
STATE = DRIVER.device.state()
