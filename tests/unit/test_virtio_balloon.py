"""The balloon, by the mock driver: what it discards, what it refuses, its numbers, its options."""

from __future__ import annotations

import struct
import threading

import pytest
from framework.driver import MEMORY, Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import ids
from hv.devices.virtio.balloon import DEFLATE, INFLATE, PAGE, STATS, Balloon, BalloonConfig
from hv.errors import ConfigError
from hv.memory.guest import GuestMemory

PAGES = MEMORY // PAGE
FREE = 0xC00        # page numbers from here up are nobody's in the mock driver's memory (12 MiB of 16)


def pages(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def dirty(driver: Driver) -> None:
    driver.memory.fill(FREE * PAGE, MEMORY - FREE * PAGE, 0x55)


def gone(driver: Driver) -> set[int]:
    """Pages from FREE up that read 0."""
    return {number for number in range(FREE, PAGES) if driver.memory.read(number * PAGE, PAGE) == bytes(PAGE)}


@pytest.fixture
def driver() -> Driver:
    made = Driver(Balloon()).probe()
    dirty(made)
    return made


@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_inflated_pages_are_given_back_and_their_neighbours_kept(backing: str) -> None:
    driver = Driver(Balloon(), GuestMemory(MEMORY, backing=backing)).probe()
    dirty(driver)
    wanted = {FREE + 1, FREE + 2, FREE + 3, FREE + 9, PAGES - 1}
    driver.request(INFLATE, [pages(FREE + 3, FREE + 1, PAGES - 1), pages(FREE + 2, FREE + 9, FREE + 9)], [])
    assert gone(driver) == wanted and driver.device.discarded == len(wanted) * PAGE
    driver.request(DEFLATE, [pages(FREE + 1)], [])
    assert not driver.device.faults and driver.interrupts.used == {INFLATE: 1, DEFLATE: 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(FREE, PAGES + 8), st.integers(PAGES, 0xFFFFFFFF)), max_size=1500))
def test_any_page_numbers(numbers: list[int]) -> None:
    driver = Driver(Balloon()).probe()
    dirty(driver)
    driver.request(INFLATE, [pages(*numbers)] if numbers else [], [16] if not numbers else [])
    assert gone(driver) == {number for number in numbers if number < PAGES}
    assert bool(driver.device.faults) == any(number >= PAGES for number in numbers)
    assert driver.device.status & ids.NEEDS_RESET == 0
    driver.memory.close()


def test_runs_are_discarded_at_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(GuestMemory, "discard", lambda memory, gpa, length: calls.append((gpa, length)) or length)
    driver.request(INFLATE, [pages(*range(FREE + 255, FREE - 1, -1))], [])
    assert calls == [(FREE * PAGE, 256 * PAGE)]


def test_odd_and_huge_buffers(driver: Driver) -> None:
    driver.request(INFLATE, [pages(FREE)[:3]], [])
    driver.request(INFLATE, [], [64])
    assert gone(driver) == set() and not driver.device.faults
    ring = driver.rings[INFLATE]
    for at in range(64):                # the same 8 MiB, 64 times: 128 Mi page numbers
        ring.describe(at, 0, 8 << 20, ids.DESC_NEXT if at < 63 else 0, at + 1)
    ring.offer(0)
    driver.notify(INFLATE)
    assert ring.take() and driver.device.faults >= 1 and "are looked at" in driver.device.fault_texts[0]


@pytest.mark.parametrize("features", [None, ids.F_VERSION_1 | 1 << 5])
@pytest.mark.parametrize("spec", [3, 4])
def test_reported_ranges_are_given_back(features: int | None, spec: int) -> None:
    driver = Driver(Balloon()).probe(features)
    dirty(driver)
    for queue in (spec, *([STATS] if features else [])):       # Linux leaves out queues whose feature is missing
        ring = driver.rings[queue]
        ring.describe(0, (FREE + 4) * PAGE, 4 * PAGE, ids.DESC_WRITE | ids.DESC_NEXT, 1)
        ring.describe(1, (FREE + 16) * PAGE + 8, 3 * PAGE, ids.DESC_WRITE, 0)     # whole pages within it: two
        ring.offer(0)
        driver.notify(queue)
        assert [row[:2] for row in ring.take()] == [(0, 0)]
        assert gone(driver) == {*range(FREE + 4, FREE + 8), FREE + 17, FREE + 18}
        dirty(driver)
    assert not driver.device.faults


def test_reporting_outside_ram_breaks_the_device(driver: Driver) -> None:
    driver.rings[3].describe(0, MEMORY - PAGE, 2 * PAGE, ids.DESC_WRITE, 0)
    driver.rings[3].offer(0)
    driver.notify(3)
    assert driver.device.status & ids.NEEDS_RESET and gone(driver) == set()


def test_nothing_is_reported_that_was_not_offered() -> None:
    driver = Driver(Balloon(free_page_reporting=False)).probe()
    dirty(driver)
    driver.rings[3].describe(0, FREE * PAGE, PAGE, ids.DESC_WRITE, 0)
    driver.rings[3].offer(0)
    driver.notify(3)
    assert gone(driver) == set() and driver.rings[3].take()


def test_target_and_actual(driver: Driver) -> None:
    device: Balloon = driver.device    # type: ignore[assignment]
    device.set_target(3 * PAGE + 5)
    assert device.read_config(0, 4) == 3 and driver.interrupts.config == 1 and device.target == 3 * PAGE
    device.put_config(4, 4, 2)
    assert device.actual == 2 * PAGE
    device.put_config(4, 4, 0xFFFFFFFF)
    assert device.actual == MEMORY      # what the driver says is not believed beyond reason
    device.put_config(0, 4, 1)
    device.put_config(4, 2, 1)
    assert device.faults == 2 and device.read_config(0, 4) == 3
    for wrong in (-1, MEMORY):
        with pytest.raises(ConfigError):
            device.set_target(wrong)
    driver.probe()
    assert device.actual == 0 and device.target == 3 * PAGE


def stats(**values: int) -> bytes:
    tags = {"free": 4, "total": 5, "available": 6, "odd": 999}
    return b"".join(struct.pack("<HQ", tags[name], value) for name, value in values.items())


def test_statistics_are_read_kept_and_asked_for(driver: Driver) -> None:
    device: Balloon = driver.device    # type: ignore[assignment]
    ring = driver.rings[STATS]
    ring.add([stats(free=1 << 40, total=2, odd=3) + b"xx"], [])
    driver.notify(STATS)
    assert ring.take() == []            # it waits here
    driver.notify(STATS)
    assert device.statistics() == {"free": 1 << 40, "total": 2}
    driver.loop.run()
    assert len(ring.take()) == 1        # given back: fill it anew
    driver.loop.run()
    ring.add([stats(available=7)], [])
    waiting = threading.Timer(0.05, lambda: driver.notify(STATS))
    waiting.start()
    assert device.statistics(wait=10) == {"available": 7}
    waiting.join()
    driver.loop.run()
    ring.take()
    assert device.statistics(wait=0.02) == {"available": 7}     # a guest that does not answer
    assert not device.faults


def test_statistics_by_the_clock() -> None:
    driver = Driver(Balloon(stats_interval=5.0)).probe()
    ring, loop = driver.rings[STATS], driver.loop
    ring.add([stats(free=1)], [])
    driver.notify(STATS)
    for value in (2, 3):
        (seconds, tick), = loop.timers
        loop.timers.clear()
        tick()
        assert seconds == 5.0 and len(ring.take()) == 1
        ring.add([stats(free=value)], [])
        driver.notify(STATS)
        assert driver.device.statistics() == {"free": value}    # type: ignore[attr-defined]
    assert ring.take() == []            # asking for it does not make the guest work
    driver.device.stop()
    loop.timers.pop()[1]()
    assert loop.timers == []            # no clock while it stands still
    driver.device.resume()
    loop.run()
    assert len(loop.timers) == 1


def test_a_stats_queue_that_lies(driver: Driver) -> None:
    ring = driver.rings[STATS]
    ring.add([stats(free=1)], [])
    driver.notify(STATS)
    ring.describe(0, MEMORY, 64, 0, 0)              # changed under the device
    driver.device.statistics()                      # type: ignore[attr-defined]
    driver.loop.run()
    assert driver.device.status & ids.NEEDS_RESET
    driver.probe()
    driver.rings[STATS].add([b"\0" * 4096], [])
    driver.notify(STATS)
    assert driver.device.statistics() == {"swapped_in": 0}      # type: ignore[attr-defined]


def test_state_goes_to_another_process(driver: Driver) -> None:
    device: Balloon = driver.device    # type: ignore[assignment]
    ring = driver.rings[STATS]
    device.set_target(64 * PAGE)
    device.put_config(4, 4, 60)
    ring.add([stats(free=1)], [])
    driver.notify(STATS)
    device.stop()
    other = Driver(Balloon(), driver.memory)
    other.device.load(device.state())
    other.device.resume()
    other.loop.run()
    assert other.device.target == 64 * PAGE and other.device.actual == 60 * PAGE     # type: ignore[attr-defined]
    other.device.statistics()           # type: ignore[attr-defined]
    other.loop.run()
    assert len(ring.take()) == 1
    state = device.state()
    state["model"] = {"target": 1 << 60, "actual": -1, "has_buffer": 0}
    other.device.load(state)
    assert other.device.target < MEMORY     # type: ignore[attr-defined]


def test_options() -> None:
    made = BalloonConfig("64M", deflate_on_oom="off", stats_interval="2.5", free_page_reporting=True).create()
    assert made.target == 64 << 20 and made.FEATURES == 1 << 1 | 1 << 5
    assert BalloonConfig().create().FEATURES == 1 << 1 | 1 << 2 | 1 << 5
    assert BalloonConfig("8").size == 8 << 20 and BalloonConfig(8 * PAGE).size == 8 * PAGE
    for wrong in ({"size": "lots"}, {"deflate_on_oom": "maybe"}, {"stats_interval": "x"}, {"stats_interval": "0.01"},
                  {"stats_interval": "nan"}, {"size": ""}):
        with pytest.raises(ConfigError):
            BalloonConfig(**wrong)      # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="16 MiB of 16 MiB"):
        Driver(Balloon(MEMORY))
