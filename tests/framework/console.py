"""A console device with its driver, as hv/machine/attach.py joins it to machine.console."""

from __future__ import annotations

import struct

from framework.driver import Driver

from hv.devices.virtio import console as model
from hv.devices.virtio.console import CONTROL_RX, CONTROL_TX, VirtioConsole
from hv.devices.virtio.console_config import ConsoleConfig
from hv.machine.console import Console

RX1, TX1 = 4, 5         # the first port beside the console


class Rig:
    """`ports` as of --port; `guest`: whether there is the guest's console."""

    def __init__(self, *ports: str, guest: bool = True) -> None:
        self.device: VirtioConsole = ConsoleConfig(guest, ports).create()
        self.console = Console()
        if (port := self.device.guest_console) is not None:
            port.sink = self.console.write
            self.console.connect(port, port.resize)
        self.driver = Driver(self.device)
        self.loop = self.driver.loop

    def up(self, control: int = 32) -> Rig:
        """To DRIVER_OK, and through the control messages as Linux does it, with `control` buffers for them."""
        self.driver.probe()
        if len(self.driver.rings) > 2:
            self.give(CONTROL_RX, 64, control)
            self.control(0xFFFFFFFF, model.DEVICE_READY, 1)
        return self

    def give(self, queue: int, length: int, count: int = 1) -> None:
        """Buffers for the device to fill."""
        for _ in range(count):
            self.driver.rings[queue].add([], [length])
        self.driver.notify(queue)

    def control(self, port: int, event: int, value: int) -> None:
        self.driver.request(CONTROL_TX, [struct.pack("<IHH", port, event, value)], [])

    def heard(self) -> list[tuple[int, int, int, bytes]]:
        """Control messages for the driver, with new buffers in their place."""
        found = self.driver.rings[CONTROL_RX].take()
        messages = [(*struct.unpack("<IHH", data[:8]), data[8:written]) for _, written, (data,) in found]
        self.give(CONTROL_RX, 64, len(found))
        return messages

    def opened(self, port: int = 1) -> Rig:
        """A program of the guest has the port open."""
        self.control(port, model.PORT_READY, 1)
        self.control(port, model.PORT_OPEN, 1)
        self.heard()
        return self

    def read(self, queue: int) -> bytes:
        """What the device filled buffers with."""
        return b"".join(data[:written] for _, written, (data,) in self.driver.rings[queue].take())

    def write(self, queue: int, *data: bytes) -> None:
        for piece in data:
            self.driver.rings[queue].add([piece], [])
        self.driver.notify(queue)

    def poll(self) -> None:
        """Serve the loop until nothing is left to do."""
        for _ in range(100):
            if not self.loop.poll():
                return
        raise AssertionError("the device is busy without end")

    def close(self) -> None:
        self.device.close()
        self.driver.memory.close()
