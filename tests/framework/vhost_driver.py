"""What the tests of vhost-user share: a device between the mock driver and a back end of ours."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

from framework.driver import MEMORY, Driver
from framework.vhost_backend import BackEnd

from hv.devices.vhost_user import protocol
from hv.devices.vhost_user.blk import CONFIG_SIZE, VhostUserBlk
from hv.memory.guest import GuestMemory

PF = protocol.F_PROTOCOL_FEATURES
BLK_CONFIG = (1 << 14).to_bytes(8, "little").ljust(CONFIG_SIZE, b"\0")


def echo(back_end, index, chain):
    """Writes what it read, with its queue's number before it."""
    return chain.writer().write(bytes([index]) + chain.reader().read(1 << 16))


@contextmanager
def driven(make, path, serve=echo, probe=True, **options):
    """(driver, device, back end), the driver at DRIVER_OK."""
    with BackEnd(path, serve, **options) as back_end:
        device = make(str(path))
        memory = GuestMemory(MEMORY, backing="memfd")
        try:
            driver = Driver(device, memory)
            device.kick_fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in device.queues]
            if probe:
                driver.probe()
            yield driver, device, back_end
        finally:
            device.close()
            for queue in device.queues:
                queue.reset()
            for fd in device.kick_fds:
                os.close(fd)
            memory.close()


def blk(path, queues=1):
    return VhostUserBlk(path, queues)


def wait(driver, what, seconds=5.0):
    """Let the I/O loop and its timers run until what() is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        driver.loop.poll(0.005)
        if what():
            break
        timers, driver.loop.timers = driver.loop.timers, []
        for _, function in timers:
            function()
    return True


def request(driver, index, readable, writable, indirect=False):
    """One chain through the back end, to its interrupt."""
    ring = driver.rings[index]
    ring.add(readable, writable, indirect=indirect)
    before = driver.interrupts.used.get(index, 0)
    os.eventfd_write(driver.device.kick_fds[index], 1)
    wait(driver, lambda: driver.interrupts.used.get(index, 0) > before)
    return ring.take()[0][2]
