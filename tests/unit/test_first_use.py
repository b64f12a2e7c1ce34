"""Devices say what RAM they are about to touch, where not all of it is KVM's (hv/machine/ramslots.py).

One that wrote where KVM has no memory slot would write what the guest's processor can't fetch.
"""

from __future__ import annotations

import pytest
from framework.driver import MEMORY, Driver

from hv.devices.virtio.device import COMMON_FEATURES, VirtioDevice
from hv.memory.guest import GuestMemory


class Plain(VirtioDevice):
    """Does nothing by itself."""

    QUEUES = (256,)


@pytest.mark.parametrize("indirect", [False, True])
def test_buffers_and_rings_are_announced(indirect: bool) -> None:
    memory = GuestMemory(MEMORY)
    told: list[tuple[int, int]] = []
    memory.first_use = lambda gpa, length: told.append((gpa, length))
    driver = Driver(Plain(), memory).probe(COMMON_FEATURES, {0: 8})
    queue, side = driver.device.queues[0], driver.rings[0]
    for part in side.desc, side.avail, side.used:
        assert part in [gpa for gpa, _ in told]
    side.add([b"one"], [600], indirect=indirect)
    told.clear()
    chain = queue.pop()
    assert chain is not None
    for view in *chain.readable, *chain.writable:
        assert (memory.gpa_of(view), len(view)) in told
