"""What all virtio devices share: the status machine, negotiation, queues coming and going, broken drivers."""

from __future__ import annotations

import pytest
from framework.driver import Driver
from framework.echo import ACK, DRV, EXTRA, FEAT, OK, READY, Echo, negotiated
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import ids
from hv.devices.virtio.device import BATCH, COMMON_FEATURES
from hv.devices.virtio.queue import Queue, QueueError

# the status machine (2.1, 3.1.1) ------------------------------------------------------------------------


def test_the_way_the_specification_wants():
    device = negotiated(COMMON_FEATURES | EXTRA)
    device.set_status(ACK | DRV | FEAT)
    assert device.status == ACK | DRV | FEAT and not device.driven and not device.running
    device.set_status(READY)
    assert device.status == READY and device.driven and device.running and device.told == ["activate"]
    assert device.faults == 0 and device.has(EXTRA)


def test_all_steps_in_one_write():
    device = negotiated()
    device.set_status(READY)
    assert device.status == READY and device.faults == 0


@pytest.mark.parametrize("features", [
    COMMON_FEATURES & ~ids.F_VERSION_1, 0, COMMON_FEATURES | 1 << 6, COMMON_FEATURES | 1 << 63])
def test_features_that_cannot_be_leave_features_ok_clear(features: int) -> None:
    device = negotiated(features)
    device.set_status(ACK | DRV | FEAT)
    assert device.status == ACK | DRV and device.faults == 1
    device.set_status(READY)                # a driver that does not look
    assert device.status == ACK | DRV and not device.driven and device.told == []
    device.select_features(True, COMMON_FEATURES & 0xFFFFFFFF)      # one that tries with less
    device.select_features(False, COMMON_FEATURES >> 32)
    device.set_status(READY)
    assert device.status == READY


def test_a_device_may_refuse_what_it_offered():
    device = negotiated(COMMON_FEATURES | EXTRA)
    device.refuses = EXTRA
    device.set_status(ACK | DRV | FEAT)
    assert device.status == ACK | DRV


@pytest.mark.parametrize("first", [DRV, OK, FEAT, DRV | FEAT, ACK | FEAT, ACK | OK])
def test_steps_left_out_are_ignored(first: int) -> None:
    device = Echo()
    Driver(device)
    device.set_status(first)
    assert device.status in (0, ACK) and device.faults == 1 and not device.running


def test_driver_ok_before_features_ok_is_ignored():
    device = negotiated()
    device.set_status(ACK | DRV | OK)
    assert device.status == ACK | DRV and device.faults == 1 and device.told == []


def test_bits_are_cleared_by_a_reset_only():
    device = Driver(Echo()).probe().device
    faults = device.faults
    device.set_status(ACK | DRV)
    assert device.status == READY and device.faults == faults + 1
    device.set_status(0)
    assert device.status == 0 and device.features == 0


def test_a_driver_that_gave_up_must_reset():
    driver = Driver(Echo())
    driver.device.set_status(ACK)
    driver.device.set_status(ACK | ids.FAILED)
    driver.device.set_status(READY | ids.FAILED)
    assert driver.device.status == ACK | ids.FAILED
    assert driver.probe().request(0, [b"hi"], [8]) == (2, [b"hi" + b"\xaa" * 6])


def test_needs_reset_is_the_device_s_bit():
    driver = Driver(Echo()).probe()
    driver.device.set_status(READY | ids.NEEDS_RESET)
    assert driver.device.status == READY
    driver.device.broken("a test")
    driver.device.set_status(READY)         # a driver that writes back what it knows clears nothing
    assert driver.device.status == READY | ids.NEEDS_RESET and driver.interrupts.config == 1


def test_features_are_chosen_before_features_ok():
    device = negotiated()
    device.set_status(ACK | DRV | FEAT)
    device.select_features(True, EXTRA)
    assert device.features == COMMON_FEATURES and device.faults == 1


@given(st.lists(st.one_of(
    st.tuples(st.just("status"), st.sampled_from([0, ACK, ACK | DRV, ACK | DRV | FEAT, READY, *range(0, 256, 5)])),
    st.tuples(st.just("low"), st.sampled_from([0, COMMON_FEATURES & 0xFFFFFFFF, EXTRA, 0xFFFFFFFF])),
    st.tuples(st.just("high"), st.sampled_from([0, COMMON_FEATURES >> 32, 0xFFFFFFFF])),
    st.tuples(st.just("enable"), st.integers(0, 1)), st.tuples(st.just("serve"), st.integers(0, 1))), max_size=25))
@settings(max_examples=300, deadline=None)
def test_any_order_of_writes_keeps_the_rules(actions: list[tuple[str, int]]) -> None:
    device = Echo()
    driver = Driver(device)
    for what, value in actions:
        before = device.status
        if what == "status":
            device.set_status(value)
        elif what == "enable":
            device.enable_queue(value, True)
        elif what == "serve":
            driver.notify(value)
        else:
            device.select_features(what == "low", value)
        status = device.status
        assert status & ~(READY | ids.FAILED | ids.NEEDS_RESET) == 0
        assert status == 0 or before & ~status == 0                         # only a reset clears
        for step, needed in ((DRV, ACK), (FEAT, DRV), (OK, FEAT)):
            assert not status & step or status & needed
        if status & FEAT:
            assert device.features & ids.F_VERSION_1 and not device.features & ~device.offered
        assert not any(queue.ready for queue in device.queues) or status & FEAT
        assert device.running == (status == READY)


# queues --------------------------------------------------------------------------------------------


def test_queues_are_enabled_between_features_ok_and_driver_ok():
    device = negotiated()
    device.enable_queue(0, True)
    assert not device.queues[0].ready and device.faults == 1
    device.set_status(ACK | DRV | FEAT)
    device.queues[0].desc, device.queues[0].avail, device.queues[0].used = 0x1000, 0x2000, 0x3000
    device.enable_queue(0, True)
    assert device.queues[0].ready and device.faults == 1


def test_rings_that_cannot_be_break_the_device():
    device = negotiated()
    device.set_status(ACK | DRV | FEAT)
    device.queues[0].size = 3
    device.enable_queue(0, True)
    assert device.status == ACK | DRV | FEAT | ids.NEEDS_RESET and not device.queues[0].ready
    assert device.interrupts.config == 0    # type: ignore[attr-defined]
    device.set_status(READY)                # from here on there is a driver to be told (2.1.2)
    assert device.interrupts.config == 1 and device.told == []  # type: ignore[attr-defined]


def test_nothing_is_served_before_driver_ok_and_all_after():
    device = Echo()
    driver = Driver(device).probe()
    ring = driver.rings[0]
    device.status = ACK | DRV | FEAT        # as if DRIVER_OK came later than the first notification
    ring.add([b"early"], [8])
    driver.notify(0)
    assert ring.take() == []
    device.set_status(READY)
    assert ring.take() == []                # not in the vCPU's thread
    driver.loop.run()
    assert [row[1] for row in ring.take()] == [5]


def test_a_device_without_its_queues_does_nothing():
    device = negotiated()
    device.set_status(READY)
    device.serve(0)
    assert device.faults == 0


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH])
def test_a_batch_ends_and_the_rest_follows(count: int) -> None:
    class Big(Echo):
        QUEUES = (1024, 8)

    driver = Driver(Big()).probe(sizes={0: 1024})
    for _ in range(count):
        driver.rings[0].add([b""], [])
    driver.device.serve(0)
    assert driver.memory.u16(driver.rings[0].used + 2) == min(count, BATCH)
    driver.loop.run()
    assert len(driver.rings[0].take()) == count


def test_the_loop_gets_its_turn_between_batches():
    """A driver that adds as fast as it is served can't keep the thread."""
    driver = Driver(Echo()).probe()
    ring = driver.rings[0]
    served = 0

    def endless(index: int) -> None:
        nonlocal served
        for chain in driver.device.requests(index):
            served += 1
            driver.device.queues[index].push(chain)
            ring.add([b""], [])

    driver.device.notified = endless        # type: ignore[method-assign]
    ring.add([b""], [])
    driver.device.serve(0)
    assert served <= BATCH and len(driver.loop.calls) == 1


def test_a_request_that_comes_while_the_device_goes_to_sleep():
    driver = Driver(Echo()).probe()
    ring, queue = driver.rings[0], driver.device.queues[0]
    late = [b"late", b"later"]

    class Racing(Queue):
        def listen(self) -> bool:
            if late:
                ring.add([late.pop()], [8])
            return super().listen()

    racing = Racing(driver.memory, 0, queue.max_size)
    racing.event_idx = racing.indirect = True
    racing.load(queue.state())
    driver.device.queues[0] = racing
    ring.add([b"early"], [8])
    driver.device.serve(0)
    assert [row[1] for row in ring.take()] == [5, 5, 4]


def test_one_queue_reset():
    driver = Driver(Echo()).probe()
    device, ring = driver.device, driver.rings[1]
    ring.add([b""], [8])
    driver.notify(1)
    device.reset_queue(1)
    assert device.told[-1] == ("drop", 1)   # type: ignore[attr-defined]
    device.finish()                         # type: ignore[attr-defined]
    queue = device.queues[1]
    assert not queue.ready and queue.size == queue.max_size and queue.desc == 0 and ring.take() == []
    assert device.queues[0].ready and driver.request(0, [b"x"], [1]) == (1, [b"x"])
    driver.memory.fill(ring.desc, 0x1000)
    ring.avail_index = ring.seen = ring.free = 0
    queue.size, queue.desc, queue.avail, queue.used = ring.size, ring.desc, ring.avail, ring.used
    device.enable_queue(1, True)
    ring.add([b""], [8])
    driver.notify(1)
    device.finish()                         # type: ignore[attr-defined]
    assert [row[1] for row in ring.take()] == [4]


def test_queue_reset_needs_its_feature():
    device = Driver(Echo()).probe(COMMON_FEATURES & ~ids.F_RING_RESET).device
    device.reset_queue(0)
    assert device.faults == 1 and device.queues[0].ready


def test_a_reset_with_requests_in_flight():
    driver = Driver(Echo()).probe()
    device, ring = driver.device, driver.rings[1]
    ring.add([b""], [8])
    driver.notify(1)
    device.set_status(0)
    device.finish()                         # type: ignore[attr-defined]
    assert driver.memory.u16(ring.used + 2) == 0 and not any(queue.ready for queue in device.queues)
    assert driver.probe().request(0, [b"again"], [9])[0] == 5


# broken drivers ------------------------------------------------------------------------------------


def test_a_broken_ring_stops_the_device_until_its_reset():
    driver = Driver(Echo()).probe()
    device = driver.device
    driver.rings[0].offer(999)
    driver.notify(0)
    assert device.status == READY | ids.NEEDS_RESET and device.faults == 1
    assert driver.interrupts.config == 1 and "999" in device.fault_texts[0]
    driver.rings[1].add([b""], [8])         # the other queue rests too
    driver.notify(1)
    assert driver.rings[1].take() == [] and device.faults == 1
    assert driver.probe().request(0, [b"well"], [4]) == (4, [b"well"])


def test_what_came_before_the_broken_chain_is_served():
    driver = Driver(Echo()).probe()
    driver.rings[0].add([b"good"], [4])
    driver.rings[0].offer(64)
    driver.notify(0)
    assert driver.device.status & ids.NEEDS_RESET
    assert [row[1] for row in driver.rings[0].take()] == [4]


def test_faults_are_counted_and_the_first_ones_told():
    device = Driver(Echo()).probe().device
    for n in range(1000):
        device.fault(f"number {n}")
    assert device.faults == 1000 and len(device.fault_texts) == 8 and device.fault_texts[0] == "number 0"


def test_an_activation_that_fails_breaks_the_device():
    class Picky(Echo):
        def activate(self) -> None:
            raise QueueError("not like this")

    device = Driver(Picky()).probe().device
    assert device.status & ids.NEEDS_RESET and device.fault_texts == ["not like this"]


# configuration space (2.5) ---------------------------------------------------------------------------


def test_the_configuration_space_and_its_end():
    device = Driver(Echo()).probe().device
    assert device.read_config(0, 4) == int.from_bytes(b"0123", "little")
    assert device.read_config(8, 4) == int.from_bytes(b"89\0\0", "little") and device.read_config(4000, 8) == 0
    device.put_config(2, 2, 0x4142)
    assert device.config() == b"01BA456789"
    device.put_config(8, 4, 0xFFFFFFFF)
    assert device.config() == b"01BA456789" and device.faults == 1


def test_a_change_is_a_new_generation_and_an_interrupt_for_who_drives():
    driver = Driver(Echo())
    driver.device.config_changed()
    assert driver.device.generation == 1 and driver.interrupts.config == 0
    driver.probe()
    for _ in range(256):
        driver.device.config_changed()
    assert driver.device.generation == 1 and driver.interrupts.config == 256
