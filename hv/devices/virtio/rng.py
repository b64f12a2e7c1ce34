"""Entropy device: fills the driver's buffers with random bytes (virtio 1.2, 5.4).

One queue, no configuration space, no features of its own. The host's getrandom(2) never runs dry, so a buffer is
filled at once. Driven by tests/unit/test_virtio_rng.py and tests/kvm/test_virtio_rng.py.
"""

from __future__ import annotations

__all__ = ["Rng", "RngConfig"]

import os

from hv.devices.virtio import ids
from hv.devices.virtio.device import VirtioDevice

REQUEST_QUEUE = 0
MOST = 64 << 10         # bytes for one request: a driver that asks for gigabytes gets a part, and may ask again


class RngConfig:
    """`--rng`: nothing to choose."""

    FIELDS = ()

    def create(self) -> Rng:
        """The device."""
        return Rng()

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        return {}


class Rng(VirtioDevice):
    """virtio-rng."""

    ID = ids.ENTROPY
    NAME = "virtio-rng"
    KIND = "rng"
    QUEUES = (64,)
    DRIVER = "CONFIG_HW_RANDOM_VIRTIO (module virtio-rng)"

    def notified(self, index: int) -> None:
        """Fill every buffer (5.4.6)."""
        queue = self.queues[index]
        for chain in self.requests(index):
            writer = chain.writer()
            # 5.4.6.1: the device MUST place one or more random bytes into the buffer
            for view in writer.room(MOST):
                view[:] = os.getrandom(len(view))
            queue.push(chain, writer.written)
        self.used(index)
