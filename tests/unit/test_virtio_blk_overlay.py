"""The copy-on-write overlay: against a model, across crashes, and with files that are not what they should be."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from framework.run import ROOT
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hv.devices.virtio.blk import Block
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.blk_file import open_disk
from hv.devices.virtio.blk_overlay import CLUSTER, Overlay, open_overlay
from hv.errors import ConfigError

SIZE = 10 * CLUSTER + 1536      # the last cluster is a short one


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def opened(base: Path, path: str, direct: bool = False) -> Overlay:
    return open_overlay(open_disk(str(base), readonly=True, direct=direct), str(base), path)


def everything(disk: Overlay) -> bytes:
    room = view(bytes(disk.size))
    disk.read([room], 0, disk.size)
    return bytes(room)


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


class Model(RuleBasedStateMachine):
    """Every sequence of requests leaves what the same sequence leaves in plain memory."""

    folder: Path
    direct = False
    number = 0

    @initialize(named=st.booleans())
    def start(self, named: bool) -> None:
        Model.number += 1
        self.base = self.folder / f"base{Model.number}"
        self.content = random.Random(Model.number).randbytes(SIZE)
        self.base.write_bytes(self.content)
        self.model = bytearray(self.content)
        self.path = str(self.folder / f"over{Model.number}") if named else "temp"
        self.disk = opened(self.base, self.path, self.direct)

    sectors = st.integers(0, SIZE // 512 - 1)

    @rule(at=sectors, count=st.integers(1, 60), cut=st.integers(1, 511), byte=st.integers(0, 255))
    def write(self, at: int, count: int, cut: int, byte: int) -> None:
        data = bytes([byte]) * min(count * 512, SIZE - at * 512)
        self.disk.write([view(data[:cut]), view(data[cut:])], at * 512, len(data))
        self.model[at * 512:at * 512 + len(data)] = data

    @rule(at=sectors, count=st.integers(1, 84), cut=st.integers(1, 511))
    def read(self, at: int, count: int, cut: int) -> None:
        size = min(count * 512, SIZE - at * 512)
        views = [view(bytes(cut)), view(bytes(size - cut))]
        self.disk.read(views, at * 512, size)
        assert b"".join(views) == self.model[at * 512:at * 512 + size]

    @rule(at=sectors, count=st.integers(1, 60), unmap=st.booleans())
    def zero(self, at: int, count: int, unmap: bool) -> None:
        size = min(count * 512, SIZE - at * 512)
        self.disk.zero(at * 512, size, unmap)
        self.model[at * 512:at * 512 + size] = bytes(size)

    @rule(at=sectors, count=st.integers(1, 60))
    def discard(self, at: int, count: int) -> None:
        size = min(count * 512, SIZE - at * 512)
        before = bytes(self.model)
        self.disk.discard(at * 512, size)
        after = everything(self.disk)
        # What was discarded may read as anything; nothing else has changed.
        assert after[:at * 512] == before[:at * 512] and after[at * 512 + size:] == before[at * 512 + size:]
        self.model[:] = after

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule()
    def reopen(self) -> None:
        if self.path != "temp":
            self.disk.close()
            self.disk = opened(self.base, self.path, self.direct)

    @rule()
    def compare(self) -> None:
        assert everything(self.disk) == self.model

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.compare()
            self.disk.close()
            assert self.base.read_bytes() == self.content


@pytest.mark.parametrize("direct", [False, True])
def test_against_a_model(tmp_path, direct):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Model", (Model,), {"folder": tmp_path, "direct": direct})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=20, deadline=None))


def test_only_what_was_written_takes_room(base, tmp_path):
    over = tmp_path / "over"
    disk = opened(base, str(over))
    disk.write([view(b"x" * CLUSTER)], 3 * CLUSTER, CLUSTER)
    disk.flush()
    assert os.stat(over).st_size > SIZE and os.stat(over).st_blocks * 512 <= 4 * CLUSTER
    disk.discard(3 * CLUSTER, CLUSTER)
    assert os.stat(over).st_blocks * 512 <= 3 * CLUSTER
    assert everything(disk)[3 * CLUSTER:4 * CLUSTER] == bytes(CLUSTER)
    disk.close()


def test_a_temporary_overlay_leaves_nothing(base, tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    disk = opened(base, "temp")
    disk.write([view(b"x" * 512)], 0, 512)
    disk.flush()
    assert everything(disk)[:512] == b"x" * 512 and list(folder.iterdir()) == []
    disk.close()
    monkeypatch.setenv("TMPDIR", str(folder / "missing"))
    with pytest.raises(ConfigError, match=r"overlay=temp: no file in .*missing: No such file"):
        opened(base, "temp")


def test_many_share_a_base_and_none_an_overlay(base, tmp_path):
    path = str(tmp_path / "over")
    disks = [opened(base, "temp"), opened(base, "temp"), opened(base, path)]
    with pytest.raises(ConfigError, match="another machine uses it"):
        opened(base, path)
    with pytest.raises(ConfigError, match="another machine uses it"):
        open_disk(str(base), readonly=False, direct=False)
    for disk in disks:
        disk.close()
    writer = open_disk(str(base), readonly=False, direct=False)
    with pytest.raises(ConfigError, match="somebody writes to it"):
        opened(base, "temp")
    writer.close()


def test_what_was_not_flushed_is_the_base(base, tmp_path):
    """As after a power cut: the bits of clusters reach the file with the flush, never before."""
    path = tmp_path / "over"
    disk = opened(base, str(path))
    disk.write([view(b"a" * CLUSTER)], 0, CLUSTER)
    disk.flush()
    disk.write([view(b"b" * CLUSTER)], CLUSTER, CLUSTER)
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    after = opened(base, str(copy))
    assert everything(after) == b"a" * CLUSTER + base.read_bytes()[CLUSTER:]
    after.close()
    disk.close()
    after = opened(base, str(path))
    assert everything(after)[CLUSTER:2 * CLUSTER] == b"b" * CLUSTER      # an orderly end writes them
    after.close()


def test_clusters_are_synced_before_their_bits(base, tmp_path, monkeypatch):
    order = []
    write, sync = os.pwritev, os.fdatasync

    def pwritev(fd: int, views: list[memoryview], at: int, flags: int = 0) -> int:
        order.append("bits" if at == CLUSTER else "cluster")
        return write(fd, views, at, flags)

    disk = opened(base, str(tmp_path / "over"))
    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append("sync"), sync(fd)))
    disk.write([view(b"b" * CLUSTER)], CLUSTER, CLUSTER, stable=True)
    assert order == ["cluster", "sync", "bits", "sync"]
    order.clear()
    disk.write([view(b"c" * CLUSTER)], CLUSTER, CLUSTER)
    disk.flush()
    assert order == ["cluster", "sync"]       # nothing new
    disk.close()


WRITER = """
import sys
sys.path.insert(0, {root!r})
from hv.devices.virtio.blk_file import open_disk
from hv.devices.virtio.blk_overlay import open_overlay
disk = open_overlay(open_disk({base!r}, readonly=True, direct=False), {base!r}, {over!r})
for number in range(1, 1 << 30):
    at = number * 7919 % (disk.size // 512) * 512
    disk.write([memoryview(bytearray(number.to_bytes(8, "little") * 64))], at, 512)
    disk.flush()
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_flushed(base, tmp_path):
    over = str(tmp_path / "over")
    command = [sys.executable, "-c", WRITER.format(root=str(ROOT), base=str(base), over=over)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        last = [int(line) for line in process.stdout.read().split(b"\n")[:-1]][-1]
    disk = opened(base, over)
    content, expected = everything(disk), {}
    for number in range(1, last + 1):
        expected[number * 7919 % (SIZE // 512) * 512] = number
    maybe = (last + 1) * 7919 % (SIZE // 512) * 512        # in the middle of it
    for at, number in expected.items():
        if at != maybe:
            assert content[at:at + 512] == number.to_bytes(8, "little") * 64, (at, number, last)
    disk.close()


def test_foreign_stale_and_damaged_overlays_are_refused(base, tmp_path):
    path = tmp_path / "over"
    disk = opened(base, str(path))
    disk.close()
    good = path.read_bytes()

    def refused(text: str) -> None:
        with pytest.raises(ConfigError, match=text) as caught:
            opened(base, str(path))
        assert caught.value.hint and "\n" not in str(caught.value)

    path.write_bytes(b"something else entirely" * 100)
    refused("not an overlay of pyhv")
    path.write_bytes(good[:8])
    refused("damaged")
    path.write_bytes(good[:20] + b"\xff" + good[21:])
    refused("damaged")
    path.write_bytes(good)
    status = base.stat()
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refused("has changed since")
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    opened(base, str(path)).close()
    os.truncate(base, SIZE - 512)
    refused(f"for a base of {SIZE} bytes, .* has {SIZE - 512}")
    with pytest.raises(ConfigError, match="an overlay, not a raw disk image"):
        open_disk(str(path), readonly=False, direct=False)
    with pytest.raises(ConfigError, match="Is a directory"):
        opened(base, str(tmp_path))
    with pytest.raises(ConfigError, match="No such file"):
        opened(base, str(tmp_path / "no" / "over"))
    open_disk(str(base), readonly=False, direct=False).close()      # every refusal gave its lock back


def test_an_overlay_cut_short_in_its_making_is_taken(base, tmp_path):
    path = tmp_path / "over"
    disk = opened(base, str(path))
    disk.close()
    os.truncate(path, 4096)
    disk = opened(base, str(path))
    assert everything(disk) == base.read_bytes()
    disk.close()
    os.truncate(path, 0)
    opened(base, str(path)).close()


def test_the_option(base, tmp_path):
    device = DiskConfig(str(base), overlay=str(tmp_path / "over"), serial="a").create()
    assert isinstance(device, Block) and not device.readonly and isinstance(device.disk, Overlay)
    device.close()
    device = DiskConfig(str(base), overlay="temp", readonly=True).create()
    assert isinstance(device, Block) and device.readonly
    device.close()
