"""The entropy device, by the mock driver."""

from __future__ import annotations

from framework.driver import Driver

from hv.devices.virtio.rng import MOST, Rng


def test_fills_buffers_with_different_bytes():
    driver = Driver(Rng()).probe()
    first = driver.request(0, [], [64, 32])
    second = driver.request(0, [], [64, 32], indirect=True)
    assert first[0] == second[0] == 96
    assert first[1] != second[1] and b"\xaa" * 32 not in first[1] + second[1]
    assert driver.interrupts.used == {0: 2}


def test_a_huge_request_gets_a_part():
    written, (data,) = Driver(Rng()).probe().request(0, [], [1 << 20])
    assert written == MOST and data[MOST:] == b"\xaa" * ((1 << 20) - MOST)


def test_a_readable_buffer_is_left_alone():
    assert Driver(Rng()).probe().request(0, [b"x" * 16], [])[0] == 0
