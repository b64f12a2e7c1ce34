"""KVM's dirty rings instead of its dirty log: the same differences, small rings that fill, machines that move."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from framework.run import needs_kvm, pyhv
from framework.snapshots import Going, Taken

from hv import ConfigError, Machine, MachineConfig
from hv.kvm.const import KVM_CAP_DIRTY_LOG_RING
from hv.kvm.system import Kvm
from hv.machine import dirtyring
from hv.machine.recipe_change import for_clone
from hv.snapshot.diff import whole_memory
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save
from hv.softkvm.detect import is_candidate

pytestmark = [needs_kvm, pytest.mark.timeout(240)]
RAM, PAGE = 16 << 20, 4096
COUNT = bytes.fromhex("66ff060005" "ebf9")          # real mode: inc dword [0x500]; jmp back
MOST = 65536


def has_rings() -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with Kvm() as kvm, kvm.create_vm() as vm:
        return vm.check(KVM_CAP_DIRTY_LOG_RING) >= 16 * 1024


offered = pytest.mark.skipif(not has_rings(), reason="this KVM offers no dirty rings")
real = pytest.mark.skipif(is_candidate(), reason="ring 0 is emulated: KVM runs over the end of a ring that fills")


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings also where they can't be relied on: none fills in the time that these tests take."""
    monkeypatch.setattr(dirtyring, "is_candidate", lambda: False)


def flat(ring: int = MOST, **options: Any) -> MachineConfig:
    return MachineConfig(COUNT, boot_protocol="flat", memory=RAM, dirty_ring=ring, **options)


def whole(folder: str) -> bytes:
    snapshot = Snapshot(folder)
    size = snapshot.number("config", "memory", high=1 << 40)
    path = snapshot.memory_path if snapshot.state["parent"] is None else whole_memory(snapshot, size)
    return Path(path).read_bytes()


def same_moment(machine: Machine, folder: Path, name: str) -> int:
    """A difference and a full snapshot of the same moment are equal; how many bytes the difference has."""
    machine.freeze()
    try:
        saved = save(machine, str(folder / name), diff=True)
        tracker, machine.tracker = machine.tracker, None
        save(machine, str(folder / f"{name}.full"))
        machine.tracker = tracker
        expected, found = whole(str(folder / f"{name}.full")), whole(str(folder / name))
        pages = [at for at in range(0, len(expected), PAGE) if expected[at:at + PAGE] != found[at:at + PAGE]]
        assert not pages, f"{len(pages)} pages differ, the first at {pages[0]:#x}"
        return saved.bytes
    finally:
        machine.thaw()


@offered
def test_differences_by_the_ring(tmp_path, trusted):
    with Machine(flat(cpus=2)) as machine:
        machine.start()
        machine.freeze()        # no ring is to fill while files are synced
        save(machine, str(tmp_path / "0"), track=True)
        machine.thaw()
        for number in range(1, 5):
            time.sleep(0.01)
            machine.memory.write((4 + number) << 20, b"pyhv itself")
            size = same_moment(machine, tmp_path, str(number))
            assert 2 * PAGE <= size < 64 * PAGE         # pyhv's, the counter's, hardly more
        assert type(machine.tracker).__name__ == "RingTracker"
    with restore(str(tmp_path / "4")) as machine:
        assert machine.config.dirty_ring == MOST
        machine.start()
        machine.freeze()
        save(machine, str(tmp_path / "again"), track=True)
        machine.thaw()
        time.sleep(0.01)
        same_moment(machine, tmp_path, "last")


@offered
def test_where_they_can_not_be_relied_on_there_are_none(monkeypatch, tmp_path, trusted):
    with Machine(flat()) as machine:
        machine.start()
        save(machine, str(tmp_path / "s"))
    monkeypatch.setattr(dirtyring, "is_candidate", lambda: True)
    with pytest.raises(ConfigError, match="can be relied on"):
        Machine(flat())
    with restore(str(tmp_path / "s")) as machine:       # the guest does not see the difference
        machine.start()
        save(machine, str(tmp_path / "t"), track=True)
        assert type(machine.tracker).__name__ == "Tracker"


@offered
@real
def test_a_ring_that_is_full_is_emptied(micro: Taken, tmp_path: Path):
    """A program of the guest's writes to more pages than the ring has entries."""
    snapshot = Snapshot(micro.folder)
    recipe = for_clone(snapshot.part("config"), 51) | {"dirty_ring": 1024}
    with Going(restore(snapshot, recipe=recipe)) as shell:
        save(shell.machine, str(tmp_path / "0"), track=True)
        shell.machine.console.send(b"steady touch 8 &\n")
        shell.wait_for(b"touching")
        for number in range(1, 4):
            time.sleep(0.5)
            same_moment(shell.machine, tmp_path, str(number))
        tracker: Any = shell.machine.tracker
        assert tracker.full > 0
    with Going(restore(str(tmp_path / "3"))) as shell:
        time.sleep(0.5)
        shell.machine.console.send(b"killall steady; wait; echo do''ne\n")
        shell.wait_for(b"done")
        said = bytes(shell.machine.console.output).decode(errors="replace")
        assert "bad" not in said and "touched 8 MiB" in said, said


@pytest.mark.parametrize("entries", [1, 512, 1000, 1 << 17, -1024])
def test_impossible_rings_are_refused(entries):
    with pytest.raises(ConfigError, match="dirty ring of"):
        flat(entries)
    done = pyhv("boot", "guest:tiny", "--dirty-ring", str(entries))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_the_option():
    done = pyhv("boot", "guest:tiny", "--memory", "16M", "--dirty-ring", "4096")
    assert done.returncode == (2 if is_candidate() or not has_rings() else 0), done.stderr
