"""Disks in snapshots: contents against a model over chains of restores, what is shared, what is written to."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from framework.disks import SIZE, guest, listing, restored
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.blk_overlay import CLUSTER, LAYERS_MOST, Overlay
from hv.errors import ConfigError


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


# against a model ---------------------------------------------------------------------------------------

class Chain(RuleBasedStateMachine):
    """Writes, snapshots of snapshots, restores of any of them: contents are those of plain bytes."""

    folder: Path
    runs = 0

    @initialize(kind=st.sampled_from(["temp", "named", "copied", "direct"]))
    def start(self, kind: str) -> None:
        Chain.runs += 1
        self.here = self.folder / f"run{Chain.runs}"
        self.here.mkdir()
        self.base = self.here / "base.img"
        self.model = bytearray(random.Random(Chain.runs).randbytes(SIZE))
        self.base.write_bytes(self.model)
        self.copy = kind in ("copied", "direct")
        overlay = {"temp": "temp", "named": str(self.here / "over")}.get(kind)
        self.guest = guest(DiskConfig(str(self.base), overlay=overlay, direct=kind == "direct"))
        if kind == "direct":
            self.model = self.model[:self.guest.blocks[0].disk.size]
        self.snapshots: list[tuple[Any, bytes, dict[str, bytes]]] = []

    @rule(at=st.integers(0, SIZE // 512 - 1), count=st.integers(1, 40), byte=st.integers(0, 255))
    def write(self, at: int, count: int, byte: int) -> None:
        data = bytes([byte]) * min(count * 512, len(self.model) - at * 512)
        if data:
            self.guest.write(at * 512, data)
            self.model[at * 512:at * 512 + len(data)] = data

    @rule(at=st.integers(0, 39), count=st.integers(1, 8), unmap=st.booleans())
    def zero(self, at: int, count: int, unmap: bool) -> None:
        size = min(count * CLUSTER, len(self.model) - at * CLUSTER)
        if size > 0:
            self.guest.blocks[0].disk.zero(at * CLUSTER, size, unmap)
            self.model[at * CLUSTER:at * CLUSTER + size] = bytes(size)

    @rule()
    def snapshot(self) -> None:
        taken = self.guest.save(self.here / f"snapshot{len(self.snapshots)}", self.copy)
        self.snapshots.append((taken, bytes(self.model), listing(taken[2])))

    @precondition(lambda self: getattr(self, "snapshots", None))
    @rule(choose=st.integers(0, 1000), private=st.booleans())
    def restore(self, choose: int, private: bool) -> None:
        self.compare()
        self.guest.close()
        taken, content, _ = self.snapshots[choose % len(self.snapshots)]
        self.guest = restored(taken, private=private)
        self.model = bytearray(content)
        self.compare()

    @rule()
    def compare(self) -> None:
        assert self.guest.read() == self.model

    def teardown(self) -> None:
        if hasattr(self, "guest"):
            self.compare()
            self.guest.close()
            for taken, content, files in self.snapshots:
                assert listing(taken[2]) == files       # nothing of a snapshot was ever written to
                again = restored(taken)
                assert again.read() == content
                again.close()
            shutil.rmtree(self.here)


def test_chains_against_a_model(tmp_path):
    machine = type("Chain", (Chain,), {"folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(
        max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]))


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """With and without link(2), as between file systems: overlays on a copy must go on fitting."""
    def link(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if request.param == "no links":
        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("links")
def test_a_long_chain_becomes_one_overlay_and_needs_no_earlier_snapshot(tmp_path, image):
    one, content = guest(DiskConfig(str(image), overlay="temp")), bytearray(image.read_bytes())
    most, before = 0, None
    for generation in range(2 * LAYERS_MOST + 3):
        data = bytes([generation + 1]) * 700
        at = generation * 2 * CLUSTER + 512
        one.write(at, data + bytes(324))
        content[at:at + 1024] = data + bytes(324)
        taken = one.save(tmp_path / f"s{generation}")
        one.close()
        if before is not None:
            shutil.rmtree(before)
        before = taken[2]
        most = max(most, len(taken[1][0]["layers"]))
        one = restored(taken)
        assert one.read() == content
    assert most == LAYERS_MOST
    one.close()


def test_a_snapshot_of_a_clone_links_to_what_is_there(tmp_path, image):
    first = guest(DiskConfig(str(image), overlay="temp"))
    first.write(0, b"a" * (16 * CLUSTER))
    taken = first.save(tmp_path / "one")
    clone = restored(taken)
    clone.write(20 * CLUSTER, b"b" * CLUSTER)
    second = clone.save(tmp_path / "two")
    assert second[1][0]["layers"] == ["0.0.overlay", "0.1.overlay"]
    assert os.path.samefile(f"{taken[2]}/disks/0.0.overlay", f"{second[2]}/disks/0.0.overlay")
    assert os.stat(f"{second[2]}/disks/0.1.overlay").st_blocks * 512 <= 6 * CLUSTER
    for made in (first, clone):
        made.close()


@pytest.mark.usefixtures("links")
def test_a_copied_disk_stays_the_base_of_what_follows(tmp_path, image):
    first = guest(DiskConfig(str(image)))
    first.write(0, b"a" * 512)
    taken = first.save(tmp_path / "one", copy=True)
    first.write(0, b"b" * 512)
    clone = restored(taken)
    assert clone.read()[:512] == b"a" * 512 and clone.read()[512:] == image.read_bytes()[512:]
    clone.write(512, b"c" * 512)
    second = clone.save(tmp_path / "two")
    first.close()
    clone.close()
    shutil.rmtree(taken[2])
    image.unlink()
    third = restored(second, private=False)
    assert third.read()[:1024] == b"a" * 512 + b"c" * 512
    third.close()


def test_many_clones_share_and_none_sees_another(tmp_path, image):
    first = guest(DiskConfig(str(image), overlay="temp"), DiskConfig(str(image), readonly=True))
    first.write(CLUSTER, b"first" * 100 + bytes(12))
    taken = first.save(tmp_path / "one")
    clones = [restored(taken) for _ in range(5)]
    for number, clone in enumerate(clones):
        clone.write(CLUSTER, bytes([number]) * 512)
    for number, clone in enumerate(clones):
        assert clone.read()[CLUSTER:CLUSTER + 512] == bytes([number]) * 512
        assert clone.read()[:CLUSTER] == image.read_bytes()[:CLUSTER] == clone.read(1)[:CLUSTER]
        assert clone.blocks[1].readonly and not isinstance(clone.blocks[1].disk, Overlay)
    assert first.read()[CLUSTER:CLUSTER + 5] == b"first"
    for made in (first, *clones):
        made.close()


def test_what_a_plain_disk_of_a_restored_machine_is_written_to(tmp_path, image):
    first = guest(DiskConfig(str(image), serial="keep", iops=99999))
    first.write(0, b"1" * 512)
    taken = first.save(tmp_path / "one")
    first.close()
    assert listing(taken[2]) == {}
    clone = restored(taken)
    clone.write(0, b"2" * 512)
    assert clone.blocks[0].serial == b"keep"
    clone.close()
    assert image.read_bytes()[:512] == b"1" * 512
    through = restored(taken, private=False)
    through.write(0, b"3" * 512)
    through.close()
    assert image.read_bytes()[:512] == b"3" * 512
    with pytest.raises(ConfigError, match=r"disk 0: .*base.img has changed since the snapshot"):
        restored(taken)
