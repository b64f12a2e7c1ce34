"""Targets in the core: the ring itself, the registers of both transports, configuration space."""

from __future__ import annotations

import os
import struct

from framework.driver import RINGS, Driver, FakeLoop
from framework.echo import READY, Echo

from fuzz.engine import Target
from fuzz.script import BROKEN, Script, chain, driven, life
from hv.devices.bus import MmioBus
from hv.devices.pci.host import DATA, HostBridge
from hv.devices.virtio import ids, mmio, pci
from hv.devices.virtio.mmio import VirtioMmio
from hv.devices.virtio.pci import BAR_SIZE, VirtioPci
from hv.devices.virtio.queue import Queue, QueueError
from hv.devices.virtio.rng import Rng
from hv.memory.guest import GuestMemory

RAM = GuestMemory(16 << 20)
WINDOW = 0xD8000000
TABLE, AVAIL, USED, AREA = RINGS, RINGS + 0x1000, RINGS + 0x2000, RINGS + 0x3000


def run_queue(data: bytes) -> None:
    """Rings and an indirect table with any content. What is outside them and the buffers must not change."""
    script = Script(data)
    RAM.fill(TABLE, 0x4000)
    queue = Queue(RAM, 0, 64)
    queue.size = 1 << script.number(1) % 7
    queue.event_idx, queue.indirect = bool(script.number(1) & 1), True
    start = script.number(2)
    RAM.write(AVAIL, struct.pack("<HH", script.number(2), start + script.number(1) & 0xFFFF))
    RAM.write(AVAIL + 4, script.take(2 * queue.size + 2))
    RAM.write(TABLE, script.take(16 * queue.size))
    RAM.write(AREA, script.take(0x1000))
    queue.desc, queue.avail, queue.used = TABLE, AVAIL, USED
    queue.enable()
    queue.load({**queue.state(), "next": start, "used_index": start, "signalled": start})
    try:
        for _ in range(200):
            taken = queue.pop()
            if taken is None:
                if not queue.listen():
                    break
                continue
            assert taken.readable_bytes + taken.writable_bytes <= 1 << 32
            assert len(taken.readable) + len(taken.writable) <= queue.size
            taken.reader().read(64)
            queue.push(taken, min(taken.writable_bytes, 64))
            queue.needs_interrupt()
    except QueueError:
        pass


def _queue_seed(rows: list[tuple[int, int, int, int]], table: list[tuple[int, int, int, int]], size: int = 3) -> bytes:
    data = struct.pack("<BBHHB", size, 1, 0xFFFE, 0, 1) + bytes(2 * (1 << size) + 2)
    data += b"".join(struct.pack("<QIHH", *row) for row in rows).ljust(16 << size, b"\0")
    return data + b"".join(struct.pack("<QIHH", *row) for row in table)


def run_mmio(data: bytes) -> None:
    """Any accesses to the registers, and a driver's whole way through them behind that."""
    script, device, loop = Script(data), Echo(), FakeLoop()
    registers = VirtioMmio(device, lambda: None)
    device.attach(RAM, loop, registers)
    for _ in range(200):
        if not script.left:
            break
        size = (1, 2, 4, 4, 4, 4, 4, 8)[script.number(1) & 7]
        offset = min(script.number(2) & 0xFFF, mmio.LENGTH - size)
        assert 0 <= registers.read(offset, size) < 1 << 8 * size
        registers.write(offset, size, script.number(size))
        for index in range(len(device.queues)):
            device.serve(index)
        loop.run()
    registers.write(mmio.STATUS, 4, 0)
    for half in (0, 1):
        registers.write(mmio.DRIVER_FEATURES_SEL, 4, half)
        registers.write(mmio.DRIVER_FEATURES, 4, ids.F_VERSION_1 >> 32 * half & 0xFFFFFFFF)
    registers.write(mmio.STATUS, 4, READY)
    assert registers.read(mmio.STATUS, 4) == READY


def _mmio_seed(*writes: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<BHI", 2, *write) for write in writes)


class _Line:
    """An MSI-X vector's line."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def connect(self, address: int, data: int) -> bool:
        return True

    def disconnect(self) -> None:
        pass

    def pending(self) -> bool:
        return False


def run_pci(data: bytes) -> None:
    """Any accesses through configuration mechanism #1 and to the window where BARs are."""
    script, device, bus = Script(data), Echo(), MmioBus()
    driver = Driver(device, RAM)
    lines = [_Line() for _ in range(len(device.queues) + 1)]
    try:
        card = VirtioPci(device, lines, lambda level: None, lambda base: None)
        device.interrupts = card
        device.kick_fds = [line.fd for line in lines[1:]]
        bridge = HostBridge(bus, WINDOW, WINDOW + (1 << 20))
        bridge.plug(card, BAR_SIZE)
        bridge.write(0, 4, 0x80000804)
        bridge.write(DATA, 2, 6)                # memory decoding, bus mastering
        for _ in range(200):
            if not script.left:
                break
            code = script.number(1)
            size = (1, 2, 4, 8)[code & 3]
            offset, value = script.number(2), script.number(size)
            if code & 4:
                bus.read(WINDOW + offset, size)
                bus.write(WINDOW + offset, size, value)
            elif code & 8:
                bridge.read(offset & 7, min(size, 4))
                bridge.write(offset & 7, min(size, 4), value & 0xFFFFFFFF)
            else:
                size = min(size, 4)
                bridge.write(0, 4, 0x80000000 | (offset >> 8 & 3) << 11 | offset & 0xFC)
                within = DATA + (offset & (4 - size))
                assert 0 <= bridge.read(within, size) < 1 << 8 * size
                bridge.write(within, size, value & ((1 << 8 * size) - 1))
            for index in range(len(device.queues)):
                device.serve(index)
            driver.loop.run()
        state = card.state()
        card.load(state)
    finally:
        for line in lines:
            os.close(line.fd)


def _pci_seed(*accesses: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<BHI", 2 | window << 2, offset, value) for window, offset, value in accesses)


TARGETS = {
    "queue": Target(run_queue, (
        _queue_seed([(AREA, 64, ids.DESC_NEXT, 1), (AREA + 64, 64, ids.DESC_WRITE, 0)], []),
        _queue_seed([(AREA, 32, ids.DESC_INDIRECT, 0)], [(AREA, 16, ids.DESC_NEXT, 1), (AREA, 9, ids.DESC_WRITE, 0)]),
        _queue_seed([(AREA, 4096, ids.DESC_NEXT, n + 1) for n in range(64)], [], 6))),
    "mmio": Target(run_mmio, (
        _mmio_seed((mmio.STATUS, 1), (mmio.STATUS, 3), (mmio.DRIVER_FEATURES_SEL, 1), (mmio.DRIVER_FEATURES, 1),
                   (mmio.STATUS, 11), (mmio.QUEUE_SEL, 0), (mmio.QUEUE_NUM, 8), (mmio.QUEUE_DESC_LOW, TABLE),
                   (mmio.QUEUE_DRIVER_LOW, AVAIL), (mmio.QUEUE_DEVICE_LOW, USED), (mmio.QUEUE_READY, 1),
                   (mmio.STATUS, 15), (mmio.QUEUE_READY, 0), (mmio.QUEUE_RESET, 1), (mmio.STATUS, 0)),
        _mmio_seed((mmio.CONFIG, 5), (mmio.INTERRUPT_ACK, 3), (mmio.SHM_SEL, 1)))),
    "pci": Target(run_pci, (
        _pci_seed(*((0, 0x100 | register, 0xFFFFFFFF) for register in range(0, 0x80, 4))),
        _pci_seed((1, pci.DEVICE_STATUS, 0), (1, pci.DEVICE_STATUS, 1), (1, pci.DEVICE_STATUS, 3),
                  (1, pci.DRIVER_FEATURE_SELECT, 1), (1, pci.DRIVER_FEATURE, 1), (1, pci.DEVICE_STATUS, 11),
                  (1, 0x18, 8), (1, 0x20, TABLE), (1, 0x28, AVAIL), (1, 0x30, USED), (1, 0x1C, 1)),
        _pci_seed(*((1, offset, 1) for offset in range(0, 0x8000, 0x400))))),
    "entropy": Target(lambda data: driven(Rng(), data), (
        chain(0, [], [64, 16]) + chain(0, [b"x" * 9], [], indirect=True) + life(1) + life(2) + life(0), *BROKEN)),
}
