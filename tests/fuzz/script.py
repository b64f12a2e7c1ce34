"""Bytes as what a driver does: any input is a sequence of requests, broken descriptors, resets, pauses, state loads.

    step: kind and queue (1 byte), then
      request     flags (indirect, number of buffers), a length of 2 bytes and content for each readable one, a byte
                  for the size of each writable one
      descriptor  its place, its four fields, and the head to make available
      ...         see `drive`

`chain(...)` and its like write the same form, for seeds.
"""

from __future__ import annotations

import contextlib
import struct

from framework.driver import Driver, FakeLoop

from hv.devices.virtio import ids
from hv.devices.virtio.device import VirtioDevice
from hv.memory.guest import GuestMemory

SIZES = (0, 1, 8, 16, 44, 64, 100, 256, 512, 1024, 4096, 4112, 8192, 65536, 1 << 20, 3)
STEPS = 48          # of one input
REQUEST, DESCRIPTOR, CONFIG, LIFE, OUTSIDE = range(5)


class Script:
    """Reads an input; behind its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        part = self._data[self._at:self._at + size]
        self._at += size
        return part

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def chain(queue: int, readable: list[bytes], writable: list[int], *, indirect: bool = False) -> bytes:
    """A request; `writable` has sizes of SIZES."""
    parts = bytes([REQUEST | queue << 3, len(readable) | len(writable) << 2 | indirect << 4])
    for data in readable:
        parts += struct.pack("<H", len(data)) + data
    return parts + bytes(SIZES.index(size) for size in writable)


def descriptor(queue: int, at: int, address: int, length: int, flags: int, following: int, head: int) -> bytes:
    """A descriptor as the driver should not write it."""
    return struct.pack("<BBQIHHH", DESCRIPTOR | queue << 3, at, address, length, flags, following, head)


def life(what: int, queue: int = 0) -> bytes:
    """0 queue reset, 1 pause and resume, 2 state and load, 3 timers, 4 reset, 5 config interrupt."""
    return bytes([LIFE | queue << 3, what])


def outside(data: bytes) -> bytes:
    """What the other program sends."""
    return struct.pack("<BH", OUTSIDE, len(data)) + data


def drive(driver: Driver, data: bytes, other: object = None) -> None:
    """Do what `data` says. `other(bytes)` gives the device's other side something to say."""
    script, device, loop = Script(data), driver.device, driver.loop
    driver.probe()
    queues = len(driver.rings)
    for _ in range(STEPS):
        if not script.left:
            break
        code = script.number(1)
        kind, queue = code & 7, (code >> 3) % queues
        ring = driver.rings[queue]
        if kind == DESCRIPTOR:
            ring.describe(script.number(1) % ring.size, script.number(8), script.number(4), script.number(2),
                          script.number(2))
            ring.offer(script.number(2))
        elif kind == CONFIG:
            size = (1, 2, 4, 8)[script.number(1) & 3]
            offset = script.number(2) & 0xFFF
            device.read_config(offset, size)
            device.put_config(offset, size, script.number(size))
        elif kind == LIFE:
            live(driver, script.number(1) % 6, queue)
        elif kind == OUTSIDE and other is not None:
            other(script.take(script.number(2)))        # type: ignore[operator]
        else:
            flags = script.number(1)
            readable = [script.take(script.number(2)) for _ in range(flags & 3)]
            writable = [SIZES[script.number(1) % len(SIZES)] for _ in range(flags >> 2 & 3)]
            if readable or writable:
                ring.add(readable, writable, indirect=bool(flags >> 4 & 1))
        if device.queues[queue].ready:
            device.serve(queue)
        settle(loop)
        for each in driver.rings:
            each.take()
        if not device.running:
            driver.probe()
    assert len(device.fault_texts) <= 8
    driver.probe()
    assert device.running


def settle(loop: FakeLoop) -> None:
    """Let the device do what it can do now, a while."""
    for _ in range(4):
        if not loop.poll():
            return


def live(driver: Driver, what: int, queue: int) -> None:
    """What happens to a device around its requests."""
    device = driver.device
    if what == 0:
        device.reset_queue(queue)
        driver.probe()
    elif what == 1:
        device.stop()
        device.resume()
    elif what == 2:
        device.stop()
        state = device.state()
        with contextlib.suppress(ValueError):       # an index that jumped is refused, rightly
            device.load(state)
        device.resume()
    elif what == 3:
        for timer in list(driver.loop.timers):
            driver.loop.cancel(timer)
            timer[1]()
    elif what == 4:
        device.set_status(0)
        driver.loop.run()
        driver.probe()
    else:
        device.config_changed()


def driven(device: VirtioDevice, data: bytes, other: object = None, loop: FakeLoop | None = None) -> None:
    """`drive`, on RAM of its own, and everything closed behind it."""
    memory = GuestMemory(16 << 20)
    try:
        drive(Driver(device, memory, loop), data, other)
    finally:
        device.set_status(0)
        device.close()
        for queue in device.queues:
            queue.reset()
        memory.close()


BROKEN = (
    descriptor(0, 0, 1 << 40, 16, ids.DESC_WRITE, 0, 0), descriptor(0, 0, 0x400000, 16, ids.DESC_NEXT, 0, 0),
    descriptor(0, 0, 0x400000, 64, ids.DESC_INDIRECT, 0, 0), descriptor(0, 1, 0x400000, 16, 0, 0, 0xFFFF),
)
