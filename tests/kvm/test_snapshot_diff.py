"""Differential snapshots: what a chain of them lays out is what a full one taken in the same moment holds."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from framework.run import needs_kvm
from framework.snapshots import Going, Taken

from hv import ConfigError, Machine, MachineConfig
from hv.errors import HvError, SnapshotError
from hv.machine.recipe_change import for_clone
from hv.snapshot.diff import chain_of, merge, whole_memory
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(600)]
RAM, PAGE = 16 << 20, 4096
# real mode: what counts at 0x500 also says so in a new place each time: inc dword [0x500]; mov eax, [0x500];
# shl eax, 6; and eax, 0x7ffc0; mov edi, eax; shr edi, 4; mov ds, di; mov [0x8000], eax; xor di, di; mov ds, di; jmp
SPREAD = bytes.fromhex("66ff060005" "66a10005" "66c1e006" "6625c0ff0700" "6689c7" "66c1ef04" "8edf" "66a30080"
                       "31ff" "8edf" "ebda")


def flat(**options: Any) -> MachineConfig:
    return MachineConfig(SPREAD, boot_protocol="flat", memory=RAM, **options)


def whole(folder: str) -> bytes:
    """All memory of a snapshot, laid out where it is a difference."""
    snapshot = Snapshot(folder)
    size = snapshot.number("config", "memory", high=1 << 40)
    path = snapshot.memory_path if snapshot.state["parent"] is None else whole_memory(snapshot, size)
    return Path(path).read_bytes()


def same_moment(machine: Machine, folder: Path, name: str) -> None:
    """A difference and a full snapshot of a machine that stands still: they hold the same."""
    machine.freeze()
    try:
        saved = save(machine, str(folder / name), diff=True)
        assert saved.bytes < machine.config.memory // 2
        # The full one is not to count as what the next difference is from.
        tracker, machine.tracker = machine.tracker, None
        try:
            save(machine, str(folder / f"{name}.full"))
        finally:
            machine.tracker = tracker
        expected = (folder / f"{name}.full/memory").read_bytes()
        found = whole(str(folder / name))
        pages = [at for at in range(0, len(expected), PAGE) if expected[at:at + PAGE] != found[at:at + PAGE]]
        assert not pages, f"{len(pages)} pages differ, the first at {pages[0]:#x}"
        shutil.rmtree(folder / f"{name}.full")
    finally:
        machine.thaw()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_a_chain_of_five(tmp_path, restored, backing):
    machine = Machine(flat(cpus=2, backing=backing))
    try:
        machine.start()
        save(machine, str(tmp_path / "0"), track=True)
        if restored:        # the first difference then is what it has copied, all others by the log
            machine.close()
            machine = restore(str(tmp_path / "0"))
            machine.start()
            time.sleep(0.02)
            machine.freeze()
            save(machine, str(tmp_path / "1"), diff=True, track=True)
            machine.memory.write(5 << 20, b"pyhv itself")
            machine.thaw()
        for number in range(2 if restored else 1, 6):
            time.sleep(0.02)
            same_moment(machine, tmp_path, str(number))
    finally:
        machine.close()
    chain = chain_of(Snapshot(str(tmp_path / "5")))
    assert [os.path.basename(member.folder) for member in chain] == list("012345")
    if restored:
        assert whole(str(tmp_path / "5"))[5 << 20:][:11] == b"pyhv itself"
    merge(Snapshot(str(tmp_path / "5")), str(tmp_path / "m"))
    assert (tmp_path / "m/memory").read_bytes() == whole(str(tmp_path / "5"))
    with restore(str(tmp_path / "5")) as one, restore(str(tmp_path / "m"), verify=True) as other:
        assert one.memory.u32(0x500) == other.memory.u32(0x500) > 0
        one.start()
        held = one.memory.u32(0x500)
        end = time.monotonic() + 10
        while one.memory.u32(0x500) == held and time.monotonic() < end:
            time.sleep(0.002)
        assert one.memory.u32(0x500) > held


def test_pages_that_became_zeros_are_zeros(tmp_path):
    with Machine(flat()) as machine:
        machine.memory.write(8 << 20, b"x" * (1 << 20))
        machine.start()
        save(machine, str(tmp_path / "0"), track=True)
        machine.memory.fill(8 << 20, 1 << 19)
        machine.memory.discard((8 << 20) + (3 << 18), 1 << 18)
        same_moment(machine, tmp_path, "1")
    data = whole(str(tmp_path / "1"))[8 << 20:9 << 20]
    assert data == bytes(1 << 19) + b"x" * (1 << 18) + bytes(1 << 18)


def test_a_difference_is_small_and_its_pause_short(tmp_path):
    """20 MiB that changed: what the guest stands still for (the figure is printed with -s)."""
    with Machine(MachineConfig(SPREAD, boot_protocol="flat", memory=256 << 20)) as machine:
        machine.start()
        machine.memory.write(64 << 20, os.urandom(64 << 20))
        save(machine, str(tmp_path / "0"), track=True)
        pauses = []
        for number in range(1, 6):
            machine.memory.write(64 << 20, os.urandom(20 << 20))
            saved = save(machine, str(tmp_path / str(number)), diff=True)
            assert 20 << 20 <= saved.bytes < 22 << 20
            assert os.stat(tmp_path / str(number) / "memory").st_blocks * 512 < 23 << 20
            pauses.append(saved.paused_ms)
        print(f"\npause with 20 MiB changed, ms: {sorted(round(pause, 1) for pause in pauses)}")
        assert sorted(pauses)[2] < 500      # the median, on a busy machine; quiet ones take 15 ms


def test_nothing_changed_is_a_difference_too(tmp_path):
    with Machine(flat()) as machine:
        machine.start()
        machine.freeze()
        save(machine, str(tmp_path / "0"), track=True)
        save(machine, str(tmp_path / "1"), diff=True)
        saved = save(machine, str(tmp_path / "2"), diff=True)
        assert saved.bytes == 0
    assert whole(str(tmp_path / "2")) == whole(str(tmp_path / "0"))


def test_a_base_that_is_gone_or_another_is_refused(tmp_path):
    with Machine(flat()) as machine:
        machine.start()
        save(machine, str(tmp_path / "0"), track=True)
        os.rename(tmp_path / "0", tmp_path / "away")
        with pytest.raises(ConfigError, match="can't be opened"):
            save(machine, str(tmp_path / "1"), diff=True)
        with Machine(flat()) as other:
            other.start()
            save(other, str(tmp_path / "0"))
        with pytest.raises(ConfigError, match="another snapshot by now"):
            save(machine, str(tmp_path / "1"), diff=True)
        shutil.rmtree(tmp_path / "0")
        os.rename(tmp_path / "away", tmp_path / "0")
        same_moment(machine, tmp_path, "1")
    shutil.copytree(tmp_path, moved := tmp_path.with_name(tmp_path.name + "-moved"))
    shutil.rmtree(tmp_path / "0")
    with pytest.raises(SnapshotError, match="is a difference from"):
        restore(str(tmp_path / "1"))
    restore(str(moved / "1")).close()       # a store may be moved as a whole
    with Machine(flat()) as other:
        other.start()
        save(other, str(tmp_path / "0"))
    with pytest.raises(SnapshotError, match="is another snapshot"):
        restore(str(tmp_path / "1"))
    state = Snapshot(str(moved / "1")).state
    looped = Snapshot(str(moved / "1"), state | {"parent": {"folder": str(moved / "1"), "id": state["id"]}})
    with pytest.raises(SnapshotError, match="rests on itself"):
        chain_of(looped)


def test_a_failed_one_loses_nothing(tmp_path):
    with Machine(flat()) as machine:
        machine.start()
        save(machine, str(tmp_path / "0"), track=True)
        machine.memory.write(8 << 20, b"between")
        for where in ("/proc/none/1", str(tmp_path / "0")):
            with pytest.raises(HvError):
                save(machine, where, diff=True)
        same_moment(machine, tmp_path, "1")
    assert whole(str(tmp_path / "1"))[8 << 20:][:7] == b"between"


def test_damage_below_is_found_at_the_top(tmp_path):
    with Machine(flat()) as machine:
        machine.start()
        save(machine, str(tmp_path / "0"), track=True)
        save(machine, str(tmp_path / "1"), diff=True)
    path = tmp_path / "0/memory"
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(0x500)
        file.write(b"\xff" * 4)
    with pytest.raises(SnapshotError, match="is not what was saved"):
        restore(str(tmp_path / "1"))


# Linux: what devices and the help for a software KVM write themselves --------------------------------------


def test_what_devices_write_is_in_it(micro: Taken, tmp_path: Path):
    snapshot = Snapshot(micro.folder)
    with Going(restore(snapshot, recipe=for_clone(snapshot.part("config"), 7))) as shell:
        save(shell.machine, str(tmp_path / "0"), track=True)
        steps = ["dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; cp /dev/vda /tmp/disk",
                 "dd if=/dev/hwrng of=/tmp/random bs=512 count=4 2>/dev/null; cat /here/note > /tmp/note",
                 "X=$((X + 1)); for i in 1 2 3 4 5 6 7 8; do /bin/true; done",
                 "echo to the host > /dev/vport6p1; rm /tmp/disk; sync"]
        for number, step in enumerate(steps, 1):
            shell.run(step)
            same_moment(shell.machine, tmp_path, str(number))
        counters = shell.machine.softkvm.counters if shell.machine.softkvm else {}
        # right behind a read of the disk, in the middle of things
        shell.machine.console.send(b"while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; done\n")
        for number in range(5, 9):
            time.sleep(0.3)
            same_moment(shell.machine, tmp_path, str(number))
    assert not shell.machine.softkvm or counters["syscall"] > 0
    with Going(restore(str(tmp_path / "4"))) as shell:
        assert "8 shared 2048\n" in shell.run("echo $X $(cat /tmp/note) $(wc -c < /tmp/random)")


def test_what_a_network_brings_is_in_it(micro: Taken, tmp_path: Path):
    """Frames from the other end of the cable, straight into buffers that the driver left there long ago."""
    with micro.go_on() as shell:
        shell.run("ip link set eth0 up; ip addr add 10.9.9.1/24 dev eth0")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as cable:
            cable.settimeout(10)
            cable.connect(str(micro.place / "cable"))
            save(shell.machine, str(tmp_path / "0"), track=True)
            for number in range(1, 4):
                device: Any = shell.machine.devices["net0"]
                before, end = device.received, time.monotonic() + 20
                for _ in range(20):
                    cable.send(bytes(10) + b"\1\0" + b"\xff" * 6 + os.urandom(6) + b"\x88\xb5" + os.urandom(400))
                while device.received < before + 5 and time.monotonic() < end:
                    time.sleep(0.002)
                assert device.received > before
                same_moment(shell.machine, tmp_path, str(number))


def test_a_view_that_was_written_counts(tmp_path):
    """Devices write by views; what they tell of it is all that is known."""
    with Machine(flat()) as machine:
        machine.start()
        save(machine, str(tmp_path / "0"), track=True)
        machine.pause()
        view = machine.memory.view(9 << 20, 4096)
        view[:5] = b"views"
        machine.memory.written([view])
        view.release()
        machine.resume()
        same_moment(machine, tmp_path, "1")
    assert whole(str(tmp_path / "1"))[9 << 20:][:5] == b"views"
