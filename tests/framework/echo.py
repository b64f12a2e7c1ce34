"""A device that exists for tests of what all devices share, and the way to its negotiation."""

from __future__ import annotations

from typing import Any

from framework.driver import Driver

from hv.devices.virtio import ids
from hv.devices.virtio.chain import Chain
from hv.devices.virtio.device import COMMON_FEATURES, VirtioDevice

EXTRA = 1 << 5
ACK, DRV, OK, FEAT = ids.ACKNOWLEDGE, ids.DRIVER, ids.DRIVER_OK, ids.FEATURES_OK
READY = ACK | DRV | FEAT | OK


class Echo(VirtioDevice):
    """Writes what it reads; queue 1 keeps its chains until told. Notes what it is told."""

    ID = 63
    NAME = "virtio-echo"
    QUEUES = (64, 8)
    FEATURES = EXTRA

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []
        self.held: list[Chain] = []
        self.refuses = 0
        self.space = bytearray(b"0123456789")

    def accepts(self, features: int) -> bool:
        return not self.refuses & features

    def config(self) -> bytes:
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        self.space[offset:offset + len(data)] = data

    def activate(self) -> None:
        self.told.append("activate")

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        for chain in self.requests(index):
            if index == 1:
                self.held.append(chain)
                continue
            queue.push(chain, chain.writer().write(chain.reader().read(1 << 16)))
        self.used(index)

    def finish(self) -> None:
        for chain in self.held:
            self.queues[1].push(chain, chain.writer().write(b"late"))
        self.held.clear()
        self.used(1)

    def drop(self) -> None:
        self.told.append("drop")
        self.held.clear()

    def drop_queue(self, index: int) -> None:
        self.told.append(("drop", index))
        if index == 1:
            self.held.clear()

    def pause(self) -> None:
        self.told.append("pause")
        self.finish()

    def wake(self) -> None:
        self.told.append("wake")

    def model_state(self) -> dict[str, object]:
        return {"space": bytes(self.space)}

    def load_model(self, state: dict[str, object]) -> None:
        space: Any = state["space"]
        self.space = bytearray(space)


def negotiated(features: int = COMMON_FEATURES) -> Echo:
    """A device with DRIVER set and features chosen, FEATURES_OK not yet tried."""
    device = Echo()
    Driver(device)
    device.set_status(ACK)
    device.set_status(ACK | DRV)
    device.select_features(True, features & 0xFFFFFFFF)
    device.select_features(False, features >> 32)
    return device
