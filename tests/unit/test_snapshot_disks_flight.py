"""A disk that is stopped in the middle of a stream of requests, saved, and goes on as another: each is done once."""

from __future__ import annotations

import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from framework.disks import Guest
from framework.driver import MEMORY, Driver, FakeLoop

from hv.devices.virtio import blk
from hv.devices.virtio.blk import IN, OK, OUT, Block
from hv.devices.virtio.blk_config import DiskConfig
from hv.machine.config import MachineConfig
from hv.machine.recipe import config_from
from hv.memory.guest import GuestMemory
from hv.snapshot.disks import disks_for_restore

REQUESTS, BATCH = 400, 20       # three descriptors for each in a ring of 64
ROOM = 64 << 10                 # bytes of disk for each request


class Recorder:
    """A disk that notes what reaches it."""

    def __init__(self, disk: Any, log: list[int]) -> None:
        self._disk, self._log = disk, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def write(self, views: list[memoryview], offset: int, length: int, stable: bool = False) -> None:
        self._log.append(offset // ROOM)
        self._disk.write(views, offset, length, stable)


class Timers(FakeLoop):
    """Timers run on the clock, as in the machine's loop."""

    def serve(self, until: threading.Event) -> None:
        """As an I/O thread."""
        pending: list[tuple[float, Any]] = []
        while not until.is_set():
            while self.timers:
                seconds, function = self.timers.pop(0)
                pending.append((time.monotonic() + seconds, function))
            for entry in [entry for entry in pending if entry[0] <= time.monotonic()]:
                pending.remove(entry)
                entry[1]()
            while self.calls:
                self.calls.pop(0)()
            time.sleep(0.0001)


class Stream:
    """The driver: keeps `BATCH` requests in the ring, takes what was used, knows what it gave."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: dict[int, int] = {}         # head -> number, in flight
        self.done: list[int] = []
        self.numbers = iter(range(REQUESTS))

    def content(self, number: int) -> bytes:
        return struct.pack("<Q", number + 1) * (self.size // 8)

    def turn(self, ring: Any) -> None:
        for head, _, buffers in ring.take():
            assert buffers[-1] == bytes([OK])
            self.done.append(self.given.pop(head))      # KeyError: used twice
        while len(self.given) < BATCH and (number := next(self.numbers, None)) is not None:
            header = struct.pack("<IIQ", OUT, 0, number * ROOM // 512)
            self.given[ring.add([header, self.content(number)], [1])] = number


@pytest.mark.parametrize(("options", "size"), [({"overlay": "temp"}, 4096), ({}, 512), ({"overlay": "temp"}, ROOM),
                                               ({"overlay": "temp", "iops": 3000}, 512)],
                         ids=["overlay", "plain", "large", "limited"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_done_twice(tmp_path, monkeypatch, options, size, seed):
    monkeypatch.setattr(blk, "BYTES_A_TURN", 5 * size)      # so that it also puts off the rest of what it finds
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(REQUESTS * ROOM)
    log: list[int] = []
    stream = Stream(size)
    first = Guest(MachineConfig(devices=(DiskConfig(str(path), **options),)))
    memory, ring, snapshot = interrupted(first, stream, log, random.Random(seed), tmp_path)
    assert 0 < len(stream.done) < REQUESTS and len(log) < REQUESTS
    recipe, saved, folder, state = snapshot
    second = Guest(config_from(disks_for_restore(recipe, saved, folder, private=True)))
    try:
        finish(second, memory, ring, state, stream, log)
        assert sorted(stream.done) == list(range(REQUESTS)) and not stream.given
        assert sorted(log) == list(range(REQUESTS))         # each reached the one disk or the other, once
        content = second.read()
        for number in range(REQUESTS):
            at = number * ROOM
            assert content[at:at + size] == stream.content(number), number
    finally:
        second.close()


def interrupted(guest: Guest, stream: Stream, log: list[int], chance: random.Random, folder: Path) -> Any:
    """Run the stream on `guest` for a moment, save state, disks and memory: (memory, ring, snapshot)."""
    device = guest.blocks[0]
    device.disk = Recorder(device.disk, log)        # type: ignore[assignment]
    loop, over = Timers(), threading.Event()
    driver = Driver(device, loop=loop).probe()
    thread = threading.Thread(target=loop.serve, args=(over,))
    thread.start()
    try:
        stop_at, end = chance.randrange(REQUESTS // 8, REQUESTS // 2), time.monotonic() + 30
        while len(stream.done) < stop_at:
            assert time.monotonic() < end
            stream.turn(driver.rings[0])
            loop.call(lambda: device.serve(0))
        stopper = threading.Timer(chance.random() * 0.003, device.stop)
        stopper.start()             # at some point of what the device does
        stream.turn(driver.rings[0])
        loop.call(lambda: device.serve(0))
        stopper.join()
        before = list(log)
        time.sleep(0.002)
        loop.call(lambda: device.serve(0))
        time.sleep(0.002)
        assert log == before        # it stands still
        device.disk = device.disk._disk     # type: ignore[assignment, union-attr]
        snapshot = guest.save(folder / "snapshot")
        state = device.state()
        memory = GuestMemory(MEMORY)
        memory.write(0, driver.memory.read(0, MEMORY))
    finally:
        over.set()
        thread.join()
        guest.close()
    return memory, driver.rings[0], (*snapshot, state)


def finish(guest: Guest, memory: GuestMemory, ring: Any, state: dict[str, object], stream: Stream,
           log: list[int]) -> None:
    """Load the state into another device and let the driver, which knows of nothing, end its stream."""
    device: Block = guest.blocks[0]
    device.disk = Recorder(device.disk, log)        # type: ignore[assignment]
    loop, over = Timers(), threading.Event()
    driver = Driver(device, memory, loop)
    driver._free = ring.driver._free        # what is in flight must not be written over
    ring.memory, ring.driver = memory, driver
    device.load(state)
    thread = threading.Thread(target=loop.serve, args=(over,))
    thread.start()
    try:
        device.resume()
        end = time.monotonic() + 30
        while len(stream.done) < REQUESTS:
            assert time.monotonic() < end, (len(stream.done), device.fault_texts)
            stream.turn(ring)
            loop.call(lambda: device.serve(0))
            time.sleep(0.0005)
    finally:
        over.set()
        thread.join()
        device.disk = device.disk._disk     # type: ignore[assignment, union-attr]
    assert not device.faults, device.fault_texts


def test_reads_that_were_waiting_see_what_was_written_before(tmp_path):
    """Requests that nobody served before the stop are served after it, on the content that was saved."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    first = Guest(MachineConfig(devices=(DiskConfig(str(path), overlay="temp"),)))
    driver = Driver(first.blocks[0]).probe()
    driver.request(0, [struct.pack("<IIQ", OUT, 0, 8), b"before" + bytes(506)], [1])
    first.blocks[0].stop()
    driver.rings[0].add([struct.pack("<IIQ", IN, 0, 8)], [512, 1])
    driver.notify(0)
    assert driver.rings[0].take() == []
    recipe, saved, folder = first.save(tmp_path / "snapshot")
    state = first.blocks[0].state()
    first.close()
    second = Guest(config_from(disks_for_restore(recipe, saved, folder, private=True)))
    device = second.blocks[0]
    after = Driver(device, driver.memory)
    device.load(state)
    device.resume()
    after.loop.run()
    (_, written, (data, status)), = driver.rings[0].take()
    assert written == 513 and status == bytes([OK]) and data[:6] == b"before" and after.interrupts.used == {0: 1}
    second.close()
