"""Locks on files of a shared folder: between the guest's processes, and with the host's."""

from __future__ import annotations

import fcntl
import os
from errno import EAGAIN, EBADF, EINTR, EINVAL

import pytest
from framework.fuse_client import ROOT, Share

from hv.devices.virtio import fuse
from hv.devices.virtio.fs import LOCK_SECONDS

READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK


@pytest.fixture
def share(tmp_path):
    with Share(tmp_path) as share:
        share.node, share.fh = share.create(ROOT, b"f")
        yield share
        assert not share.device.faults, share.device.fault_texts


def lock(share, owner, kind, start=0, end=(1 << 63) - 1, opcode=fuse.SETLK, flags=0, fh=None):
    share.call(opcode, share.node.nodeid, share.lock_body(fh or share.fh, owner, kind, start, end, flags))


def held(share, owner, kind, start=0, end=(1 << 63) - 1):
    return fuse.LK_OUT.unpack(share.call(fuse.GETLK, share.node.nodeid,
                                         share.lock_body(share.fh, owner, kind, start, end)))


def refused(number, *arguments, **options):
    with pytest.raises(OSError) as caught:
        lock(*arguments, **options)
    assert caught.value.errno == number


def test_record_locks_between_owners(share):
    lock(share, 1, WRITE, 10, 19)
    lock(share, 1, READ, 0, 4)
    refused(EAGAIN, share, 2, READ, 15, 15)
    lock(share, 2, READ, 0, 9)
    assert held(share, 2, WRITE, 10, 100) == (10, 19, WRITE, 100) and held(share, 1, WRITE, 10, 100) == (0, 0, NONE, 0)
    lock(share, 1, NONE, 10, 14)
    lock(share, 2, WRITE, 10, 14)
    refused(EAGAIN, share, 2, WRITE, 14, 15)
    share.flush(share.fh, owner=1)              # closing any descriptor drops all of the process
    lock(share, 2, WRITE)


def test_the_host_honours_them(share, tmp_path):
    with open(tmp_path / "f", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 5, 5)
        refused(EAGAIN, share, 1, WRITE, 5, 5)
        assert held(share, 1, WRITE)[:3] == (5, 9, WRITE)
        lock(share, 1, WRITE, 10, 20)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 15)


def test_flock(share, tmp_path):
    other = share.open(share.node.nodeid, os.O_RDWR)
    lock(share, 1, WRITE, flags=fuse.LK_FLOCK)
    refused(EAGAIN, share, 2, READ, flags=fuse.LK_FLOCK, fh=other)
    with open(tmp_path / "f") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    share.release(share.fh, fuse.RELEASE_FLOCK_UNLOCK)
    lock(share, 2, READ, flags=fuse.LK_FLOCK, fh=other)


def waiting(share, owner, kind=WRITE):
    """Send a SETLKW; its head and number."""
    head = share.send(fuse.SETLKW, share.node.nodeid, share.lock_body(share.fh, owner, kind))
    return head, share.unique


def test_who_waits_is_answered_when_it_is_free(share):
    lock(share, 1, WRITE)
    heads = [waiting(share, owner)[0] for owner in (2, 3)]
    assert share.received() == {}
    assert share.getattr(ROOT) and len(share.driver.loop.timers) == 1       # others are served meanwhile
    unlock = share.send(fuse.SETLK, share.node.nodeid, share.lock_body(share.fh, 1, NONE))
    assert share.received() == {unlock: (0, b""), heads[0]: (0, b"")}
    flush = share.send(fuse.FLUSH, 0, fuse.FLUSH_IN.pack(share.fh, 0, 0, 2))
    assert share.received() == {flush: (0, b""), heads[1]: (0, b"")}


def test_waiting_for_the_host(share, tmp_path):
    with open(tmp_path / "f", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        head, _ = waiting(share, 1)
        (seconds, again), = share.driver.loop.timers
        assert seconds == LOCK_SECONDS
        share.driver.loop.timers.clear()
        again()
        assert share.received() == {} and len(share.driver.loop.timers) == 1
    share.driver.loop.timers.pop()[1]()
    assert share.received() == {head: (0, b"")} and not share.driver.loop.timers


def test_a_wait_is_interrupted(share):
    lock(share, 1, WRITE)
    head, unique = waiting(share, 2)
    share.quietly(fuse.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(unique + 2))
    assert share.received() == {}
    share.quietly(fuse.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(unique))
    assert share.received() == {head: (EINTR, b"")}


def test_a_reset_forgets_who_waits(share):
    lock(share, 1, WRITE)
    waiting(share, 2)
    share.device.set_status(0)
    assert not share.driver.loop.timers and not share.device.server.locks.waiting
    assert not share.device.server.locks.owners


def test_bad_locks(share):
    refused(EINVAL, share, 1, 7)
    refused(EINVAL, share, 1, WRITE, 5, 4)
    refused(EINVAL, share, 1, WRITE, 1 << 63, (1 << 64) - 1)
    refused(EBADF, share, 1, WRITE, fh=999)
    lock(share, 1, NONE)
    assert not share.device.server.locks.owners
    share.device.server.locks.owners = {(share.node, owner): (os.dup(0), 0) for owner in range(1024)}
    refused(37, share, 5000, WRITE)     # ENOLCK


def test_who_waits_is_kept_in_a_snapshot(share):
    lock(share, 1, WRITE)
    head, _ = waiting(share, 2)
    share.device.stop()
    assert not share.driver.loop.timers
    state = share.device.state()
    share.device.load(state)
    share.device.resume()               # the lock of owner 1 was not taken along
    share.driver.loop.run()
    for _, again in share.driver.loop.timers:
        again()
    assert share.received() == {head: (0, b"")}
