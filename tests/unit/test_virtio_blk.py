"""The block device, by the mock driver: what each request does to the file, and what illegal ones do not."""

from __future__ import annotations

import errno
import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from framework.driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import blk, ids
from hv.devices.virtio.blk import DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES, Block
from hv.devices.virtio.blk_config import DiskConfig

SIZE = 1 << 20
WITHOUT_FLUSH = ~(blk.F_FLUSH | blk.F_CONFIG_WCE)


def head(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def ranges(*rows: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *row) for row in rows)


class Disk:
    """A device on a file of random bytes, driven."""

    def __init__(self, folder: Path, features: int = -1, size: int = SIZE, **options: object) -> None:
        self.path = folder / "disk.img"
        self.before = os.urandom(size)
        self.path.write_bytes(self.before)
        self.device: Block = DiskConfig(str(self.path), **options).create()     # type: ignore[arg-type, assignment]
        self.driver = Driver(self.device).probe(self.device.offered & features)

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, queue: int = 0) -> tuple[int, bytes]:
        """(status, what was read)."""
        written, got = self.driver.request(queue, [head(kind, sector), *([data] if data else [])],
                                           [*([room] if room else []), 1])
        status = got[-1][0]
        if status == OK:
            assert written == sum(map(len, got)) or kind == GET_ID
        return status, got[0] if room else b""

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path)
    yield made
    made.device.close()


def test_reads_and_writes(disk):
    assert disk.ask(IN, 3, room=1024) == (OK, disk.before[1536:2560])
    assert disk.ask(OUT, 5, b"w" * 512) == (OK, b"")
    assert disk.content == disk.before[:2560] + b"w" * 512 + disk.before[3072:]
    assert disk.ask(IN, 5, room=512) == (OK, b"w" * 512)
    assert disk.ask(IN, SIZE // 512 - 1, room=512) == (OK, disk.before[-512:])
    assert disk.device.faults == 0


@pytest.mark.parametrize("indirect", [False, True])
def test_many_segments(disk, indirect):
    _, got = disk.driver.request(0, [head(IN, 8)], [512, 4096, 1536, 1], indirect=indirect)
    assert b"".join(got) == disk.before[4096:4096 + 6144] + b"\0"
    parts = [bytes([n]) * 512 for n in range(1, 21)]
    assert disk.driver.request(0, [head(OUT, 100), *parts], [1], indirect=indirect) == (1, [b"\0"])
    assert disk.content[51200:51200 + 10240] == b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 1023), max_size=6), kind=st.sampled_from([IN, OUT]))
def test_headers_and_data_split_in_any_way(tmp_path_factory, cuts, kind):
    """2.7.4.1: no assumption about how a request is laid out over descriptors."""
    disk = Disk(tmp_path_factory.mktemp("disk"))

    def split(data: bytes) -> list[bytes]:
        edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        return [data[a:b] for a, b in pairwise(edges)]

    payload = os.urandom(1008)[:1008].ljust(1024, b"x")
    if kind == OUT:
        written, got = disk.driver.request(0, split(head(OUT, 7) + payload), [1])
        assert (written, got) == (1, [b"\0"])
        assert disk.content[7 * 512:7 * 512 + 1024] == payload
    else:
        written, got = disk.driver.request(0, split(head(IN, 7)), [len(part) for part in split(bytes(1025))])
        assert written == 1025 and b"".join(got) == disk.before[3584:4608] + b"\0"
    assert disk.device.faults == 0
    disk.device.close()


@pytest.mark.parametrize(("kind", "sector", "data", "room"), [
    (IN, SIZE // 512, b"", 512), (IN, SIZE // 512 - 1, b"", 1024), (IN, 1 << 63, b"", 512),
    (IN, (1 << 64) - 1, b"", 512), (IN, (1 << 55) - 1, b"", 1024), (IN, 0, b"", 511), (IN, 0, b"", 513),
    (OUT, SIZE // 512, b"x" * 512, 0), (OUT, (1 << 64) - 1, b"x" * 1024, 0), (OUT, 0, b"x" * 100, 0),
    (DISCARD, 0, ranges((SIZE // 512, 1, 0)), 0), (DISCARD, 0, ranges((0, SIZE // 512 + 1, 0)), 0),
    (DISCARD, 0, ranges(((1 << 64) - 1, 8, 0)), 0), (DISCARD, 0, b"123", 0), (DISCARD, 0, b"", 0),
    (DISCARD, 0, ranges((0, 8, 0)) * (blk.RANGES + 1), 0), (WRITE_ZEROES, 0, ranges((0, 8, 0), (8, 8, 0)), 0),
    (WRITE_ZEROES, 0, ranges((0, 0xFFFFFFFF, 0)), 0),
])
def test_what_lies_outside_is_an_error(disk, kind, sector, data, room):
    status, got = disk.ask(kind, sector, data, room)
    assert status == IOERR and got == b"\xaa" * room
    assert disk.content == disk.before
    assert disk.device.faults == 1 and disk.driver.interrupts.config == 0
    assert disk.ask(IN, 0, room=512)[0] == OK       # and it goes on


@pytest.mark.parametrize(("kind", "most"), [(DISCARD, blk.DISCARD_SECTORS), (WRITE_ZEROES, blk.ZEROES_SECTORS)])
def test_ranges_have_a_limit(tmp_path, kind, most):
    disk = Disk(tmp_path, size=4096)
    disk.device.close()
    os.truncate(disk.path, 2 << 30)
    disk.device = DiskConfig(str(disk.path)).create()       # type: ignore[assignment]
    disk.driver = Driver(disk.device).probe()
    assert disk.ask(kind, 0, ranges((0, most + 1, 0)))[0] == IOERR and disk.device.faults == 1
    assert disk.ask(kind, 0, ranges((8, most, 0)))[0] == OK
    disk.device.close()


@pytest.mark.parametrize(("kind", "data"), [
    (2, b""), (9, b""), (10, b""), (14, b""), (0x80000000, b""), (0xFFFFFFFF, b"x" * 512),
    (DISCARD, ranges((0, 8, 1))), (DISCARD, ranges((0, 8, 2))), (WRITE_ZEROES, ranges((0, 8, 2)))])
def test_unknown_requests_and_flags_are_unsupported(disk, kind, data):
    assert disk.ask(kind, 0, data)[0] == UNSUPP
    assert disk.content == disk.before


@pytest.mark.parametrize(("readable", "writable"), [
    ([], [1]), ([b"short"], [1]), ([head(IN)[:15]], [512, 1]), ([head(IN)], []), ([head(OUT), b"x" * 512], []),
    ([], [512, 1])])
def test_requests_without_header_or_status_are_given_back(disk, readable, writable):
    written, got = disk.driver.request(0, readable, writable)
    assert written == 0 and disk.device.faults == 1 and disk.content == disk.before
    assert not got or got[-1][-1] == IOERR


def test_an_empty_read_or_write_is_done(disk):
    assert disk.ask(IN) == (OK, b"") and disk.ask(OUT) == (OK, b"") and disk.ask(FLUSH) == (OK, b"")


def test_read_only(tmp_path):
    disk = Disk(tmp_path, readonly=True)
    assert disk.device.offered & blk.F_RO and not disk.device.offered & (blk.F_DISCARD | blk.F_WRITE_ZEROES)
    assert disk.ask(OUT, 0, b"x" * 512)[0] == IOERR
    assert disk.ask(DISCARD, 0, ranges((0, 8, 0)))[0] == UNSUPP
    assert disk.ask(WRITE_ZEROES, 0, ranges((0, 8, 0)))[0] == UNSUPP
    assert disk.ask(FLUSH)[0] == OK
    assert disk.ask(IN, 1, room=512) == (OK, disk.before[512:1024])
    assert disk.content == disk.before
    disk.device.close()


def test_read_only_above_an_overlay(tmp_path):
    disk = Disk(tmp_path, readonly=True, overlay="temp")
    assert disk.ask(OUT, 0, b"x" * 512)[0] == IOERR
    assert disk.ask(IN, 0, room=512) == (OK, disk.before[:512]) and disk.device.faults == 1
    disk.device.close()


def test_the_serial(tmp_path):
    disk = Disk(tmp_path, serial="root-1")
    assert disk.ask(GET_ID, room=20) == (OK, b"root-1".ljust(20, b"\0"))
    assert disk.driver.request(0, [head(GET_ID)], [24, 1])[0] == 20     # only the 20 count as written
    disk.device.close()
    disk = Disk(tmp_path, serial="x" * 20)
    assert disk.driver.request(0, [head(GET_ID)], [20, 1]) == (21, [b"x" * 20, b"\0"])
    disk.device.close()


def allocated(disk: Disk) -> int:
    return os.stat(disk.path).st_blocks * 512


def test_discard_gives_blocks_back(disk):
    full = allocated(disk)
    assert disk.ask(DISCARD, 0, ranges((8, 512, 0), (1024, 512, 0)))[0] == OK
    assert allocated(disk) == full - (512 << 10)
    assert os.stat(disk.path).st_size == SIZE


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeroes(disk, unmap):
    full = allocated(disk)
    assert disk.ask(WRITE_ZEROES, 0, ranges((3, 1000, unmap)))[0] == OK
    assert disk.content == disk.before[:1536] + bytes(512000) + disk.before[1536 + 512000:]
    assert (allocated(disk) < full) == bool(unmap)


def test_zeroes_are_written_where_the_file_system_makes_none(disk, monkeypatch):
    def cannot(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr("hv.devices.virtio.blk_file.fallocate", cannot)
    assert disk.ask(WRITE_ZEROES, 0, ranges((3, 1501, 1)))[0] == OK
    assert disk.content == disk.before[:1536] + bytes(1501 * 512) + disk.before[1536 + 1501 * 512:]
    assert disk.ask(DISCARD, 0, ranges((0, 8, 0)))[0] == OK     # a hint (5.2.6): nothing happens
    assert disk.content[:1536] == disk.before[:1536]


class Recorder:
    """Stands in front of a disk and notes what matters for durability."""

    def __init__(self, disk: object) -> None:
        self.disk = disk
        self.calls: list[object] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.disk, name)

    def write(self, views: object, offset: int, length: int, stable: bool = False) -> None:
        self.calls.append(("write", stable))
        self.disk.write(views, offset, length, stable)      # type: ignore[attr-defined]

    def flush(self) -> None:
        self.calls.append("flush")
        self.disk.flush()       # type: ignore[attr-defined]


@pytest.mark.parametrize(("features", "through"), [
    (-1, False), (~blk.F_CONFIG_WCE, False), (WITHOUT_FLUSH, True), (~blk.F_FLUSH, True)])
def test_when_writes_are_stable(tmp_path, features, through):
    """5.2.6.2: without FLUSH a completed write is on the disk; with CONFIG_WCE the driver chooses."""
    disk = Disk(tmp_path, features)
    disk.device.disk = recorder = Recorder(disk.device.disk)    # type: ignore[assignment]
    assert disk.ask(OUT, 0, b"x" * 512)[0] == OK
    assert recorder.calls == [("write", through)]
    assert disk.ask(FLUSH)[0] == OK and recorder.calls[1:] == ["flush"]
    assert disk.ask(WRITE_ZEROES, 0, ranges((0, 8, 0)))[0] == OK and recorder.calls[2:] == ["flush"] * through
    assert disk.content[:4096] == bytes(4096)
    disk.device.close()


@pytest.mark.parametrize("features", [-1, WITHOUT_FLUSH])
def test_stable_writes_are_so_for_the_kernel(tmp_path, features, monkeypatch):
    write, flags = os.pwritev, []
    monkeypatch.setattr(os, "pwritev", lambda *args: (flags.append(args[3]), write(*args))[1])
    disk = Disk(tmp_path, features)
    disk.ask(OUT, 0, b"x" * 512)
    assert flags == [0 if features == -1 else os.RWF_DSYNC]
    disk.device.close()


def test_the_driver_sets_the_cache_mode(disk):
    assert disk.device.read_config(blk.WRITEBACK, 1) == 1
    disk.device.disk = recorder = Recorder(disk.device.disk)
    disk.device.put_config(blk.WRITEBACK, 1, 0)
    disk.ask(OUT, 0, b"x" * 512)
    disk.device.put_config(blk.WRITEBACK, 1, 1)
    disk.ask(OUT, 0, b"x" * 512)
    assert recorder.calls == ["flush", ("write", True), ("write", False)]
    assert disk.device.faults == 0
    for offset, size, value in ((0, 4, 1), (blk.WRITEBACK, 1, 2), (blk.WRITEBACK - 1, 2, 0), (70, 4, 0)):
        disk.device.put_config(offset, size, value)
    assert disk.device.faults == 4 and disk.device.read_config(blk.WRITEBACK, 1) == 1
    disk.driver.probe()
    assert disk.device.read_config(blk.WRITEBACK, 1) == 1


def test_a_failed_flush_never_succeeds_again(disk, monkeypatch):
    calls = []

    def once(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", once)
    assert [disk.ask(FLUSH)[0] for _ in range(3)] == [IOERR] * 3 and len(calls) == 1
    assert disk.ask(IN, 0, room=512)[0] == OK
    assert disk.device.warnings == ["the host failed 3 requests, first: Input/output error"]


def test_the_hosts_errors_are_the_guests(disk, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwritev", full)
        assert disk.ask(OUT, 0, b"x" * 512)[0] == IOERR
    assert disk.ask(OUT, 0, b"x" * 512)[0] == OK
    assert disk.device.faults == 0 and disk.device.errors == 1
    os.truncate(disk.path, 4096)                # behind our back
    assert disk.ask(IN, 0, room=8192)[0] == IOERR
    assert disk.ask(IN, 0, room=4096)[0] == OK


def test_short_reads_and_writes_go_on(disk, monkeypatch):
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:100]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at, flags: write(fd, [views[0][:100]], at, flags))
    assert disk.driver.request(0, [head(IN, 2)], [512, 512, 1])[1][:2] == [disk.before[1024:1536],
                                                                            disk.before[1536:2048]]
    assert disk.ask(OUT, 2, bytes(range(256)) * 4)[0] == OK
    assert disk.content[1024:2048] == bytes(range(256)) * 4


def test_queues_serve_alike(tmp_path):
    disk = Disk(tmp_path, queues=3)
    assert disk.device.offered & blk.F_MQ and disk.device.read_config(34, 2) == 3
    for queue in range(3):
        assert disk.ask(OUT, queue, bytes([queue]) * 512, queue=queue)[0] == OK
    assert disk.content[:1536] == b"\0" * 512 + b"\1" * 512 + b"\2" * 512
    disk.device.close()


def test_the_configuration_space(disk):
    space = disk.device.config()
    assert len(space) == 72                     # up to secure_erase_sector_alignment (5.2.4)
    assert struct.unpack_from("<QII", space) == (SIZE // 512, 0, blk.SEG_MAX)
    assert struct.unpack_from("<IBBHIBxH", space, 20) == (512, 3, 0, 8, 0, 1, 1)
    assert struct.unpack_from("<IIIIIB", space, 36) == (blk.DISCARD_SECTORS, blk.RANGES, 8, blk.ZEROES_SECTORS, 1, 1)


def test_one_turn_moves_only_so_much(disk, monkeypatch):
    """A guest with a ring full of large requests does not keep the thread from ending."""
    monkeypatch.setattr(blk, "BYTES_A_TURN", 10000)
    for sector in range(10):
        disk.driver.rings[0].add([head(IN, sector)], [4096, 1])
    disk.device.serve(0)
    assert len(disk.driver.rings[0].take()) == 3 and len(disk.driver.loop.calls) == 1
    disk.driver.loop.run()
    assert len(disk.driver.rings[0].take()) == 7


def test_rates(tmp_path):
    disk = Disk(tmp_path, iops=10, bps="1M")
    ring = disk.driver.rings[0]
    for _ in range(4):
        ring.add([head(IN)], [512, 1])
    disk.driver.notify(0)
    assert len(ring.take()) == 2 and len(disk.driver.loop.timers) == 1     # one saved up, one on credit
    disk.driver.notify(0)
    assert ring.take() == [] and len(disk.driver.loop.timers) == 1
    seconds, go_on = disk.driver.loop.timers.pop()
    assert 0.05 < seconds <= 0.1
    disk.device._requests = None
    go_on()
    assert len(ring.take()) == 2
    ring.add([head(IN)], [SIZE, 1])
    disk.driver.notify(0)
    assert len(ring.take()) == 1
    assert 0.8 < disk.driver.loop.timers.pop()[0] <= 1.0
    disk.device.close()


def test_state_and_reset(disk, tmp_path):
    disk.device.put_config(blk.WRITEBACK, 1, 0)
    disk.device.stop()
    state = disk.device.state()
    disk.device.close()
    again = Disk(tmp_path)
    again.device.load(state)
    assert again.device.writeback is False
    state["model"]["size"] = 512        # type: ignore[index]
    with pytest.raises(ValueError, match="disk of 512 bytes"):
        again.device.load(state)
    again.device.set_status(0)
    assert again.device.writeback and not again.device.status & ids.DRIVER_OK
    again.device.close()


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(
    st.lists(st.one_of(st.binary(max_size=40),
                       st.builds(head, st.integers(0, 16), st.integers(0, 2500)),
                       st.builds(lambda *row: ranges(row), st.integers(0, 2100), st.integers(0, 2100),
                                 st.integers(0, 3)),
                       st.sampled_from([b"x" * 512, b"y" * 1024])), max_size=4),
    st.lists(st.sampled_from([1, 20, 511, 512, 1024, 5000]), max_size=4), st.booleans()), max_size=12))
def test_no_request_does_harm(tmp_path_factory, rows):
    """Whatever the driver sends: the file keeps its size, every chain comes back once, nothing is raised."""
    disk = Disk(tmp_path_factory.mktemp("disk"), queues=2)
    for readable, writable, indirect in rows:
        if readable or writable:
            written, got = disk.driver.request(1, readable, writable, indirect=indirect)
            assert written <= sum(map(len, got))
            assert not got or got[-1][-1] in (OK, IOERR, UNSUPP)
    assert len(disk.content) == SIZE and disk.device.status & ids.NEEDS_RESET == 0
    disk.device.close()
