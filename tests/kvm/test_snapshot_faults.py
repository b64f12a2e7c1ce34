"""Hostile states, full disks, killed savers, files that vanish: what a snapshot's user is spared of.

Every field of a real state is replaced by values that it can't have, or that another could: restoring says what is
wrong, or gives a machine that runs or ends by itself.
"""

from __future__ import annotations

import copy
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.run import ROOT, needs_kvm

from hv import Machine, MachineConfig
from hv.devices.virtio.balloon import BalloonConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.console_config import ConsoleConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.rng import RngConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError, HvError, SnapshotError
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save, sweep

pytestmark = [needs_kvm, pytest.mark.timeout(300)]
RAM = 16 << 20
COUNT = bytes.fromhex("66ff060005" "ebf9")          # real mode: inc dword [0x500]; jmp back
FUZZ_SECONDS = float(os.environ.get("PYHV_FUZZ_SECONDS", "10"))     # for each transport; all fields take 40
SECONDS = 0.004             # that a machine with a changed state may run


@pytest.fixture(scope="module", params=["mmio", "pci"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the echo guest, which has set its processor and PIC up, with a device of each kind."""
    place = tmp_path_factory.mktemp("real")
    (place / "disk.img").write_bytes(bytes(8192))
    (place / "share").mkdir()
    devices = (DiskConfig(str(place / "disk.img"), overlay="temp"), RngConfig(), BalloonConfig(), NetConfig("none"),
               ShareConfig(str(place / "share"), tag="here"), VsockConfig(str(place / "vsock")),
               ConsoleConfig(False, (f"agent,file={place / 'agent'}",)))
    config = MachineConfig("guest:echo", memory=RAM, cmdline="echo", devices=devices, transport=request.param)
    with Machine(config) as machine:
        machine.start()
        machine.console.wait_for(b"ready", 10)
        save(machine, str(place / "s"))
    return place / "s"


def fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all that is in a state; of long lists the ends."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from fields(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({*range(min(3, len(value))), *range(max(0, len(value) - 3), len(value))}):
            yield from fields(value[index], (*path, index))


def change(state: dict[str, Any], path: tuple[str | int, ...], new: Any) -> dict[str, Any]:
    """A copy of the state with another value there; `...` removes it."""
    changed = copy.deepcopy(state)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return changed


def values_for(old: Any, rng: random.Random) -> list[Any]:
    """What else might stand there: other types, ends of ranges, other sizes, other bits."""
    found: list[Any] = [..., None, rng.choice([[], {}, "", "x" * 300, "\0", True, -1, 1.5, [[1]], {"a": None}])]
    if isinstance(old, bool):
        found += [not old]
    elif isinstance(old, int):
        found += [rng.choice([-1, 0, 1, 1 << 16, (1 << 32) - 1]), old ^ 1 << rng.randrange(40),
                  rng.choice([1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200])]
    elif isinstance(old, bytes):
        flipped = bytearray(old)
        for _ in range(3 if old else 0):
            flipped[rng.randrange(len(old))] ^= 1 << rng.randrange(8)
        found += [bytes(flipped), old[:-1], old + b"\0", rng.randbytes(len(old)), bytes(len(old))]
    elif isinstance(old, str):
        found += [old + "x", old[:-1]]
    elif isinstance(old, list):
        found += [old[:-1], old + old[:1], old * 2]
    return found


def belongings() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            pass
    return found


def attempt(folder: Path, state: dict[str, Any], path: tuple[str | int, ...]) -> str:
    """Restore it and let it run a moment; the field that was named, or "" where it ran."""
    try:
        with restore(Snapshot(str(folder), state)) as machine:
            machine.start()
            machine.wait(SECONDS)
            machine.stop()
            assert machine.wait(10) is not None
            outcome = machine.outcome
            assert outcome is not None and outcome.error is None, (path, outcome)
            return ""
    except (SnapshotError, ConfigError) as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and len(text) < 600, (path, text[:700])
        return text


def test_every_field_changed(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)         # where files land whose names became relative
    rng = random.Random(int(os.environ.get("PYHV_FUZZ_SEED", "7")))
    state = Snapshot(str(real)).state
    paths = list(fields(state))
    assert len(paths) > 300
    before = belongings()
    refused = ran = 0
    end = time.monotonic() + FUZZ_SECONDS
    for path in rng.sample(paths, len(paths)):
        old: Any = state
        for step in path:
            old = old[step]
        for new in values_for(old, rng):
            if path == ("config", "memory") and isinstance(new, int) and new > 1 << 30:
                continue        # that much RAM may be asked for, and costs nothing until it is touched
            try:
                said = attempt(real, change(state, path, new), path)
            except Exception as error:
                raise AssertionError(f"{path} = {new!r:.200}: {type(error).__name__}: {error}") from error
            refused, ran = refused + bool(said), ran + (not said)
        if time.monotonic() > end:
            break
    assert refused > 100 and ran > 20, (refused, ran)
    assert belongings() - before == set()
    print(f"\n{refused} refused, {ran} ran")


@pytest.mark.parametrize(("path", "new", "named"), [
    (("vcpus", 0, "REGS"), b"short", r"vcpus\[0\].REGS"), (("vcpus",), [], "vcpus"),
    (("vcpus", 0, "CPUID2"), b"\xff" * 48, r"vcpus\[0\].CPUID2"), (("vcpus", 0, "msrs"), [[1]], r"vcpus\[0\].msrs"),
    (("vcpus", 0, "msrs"), [[0x12345678, 1]], "MSR 0x12345678"), (("irqchips", 1), b"", r"irqchips\[1\]"),
    (("clock", "kvmclock_ns"), -1, "clock.kvmclock_ns"), (("pit",), b"x", "pit"), (("devices",), {}, "devices"),
    (("platform", "uart"), None, "platform.uart"), (("config", "cpus"), 0, "config"),
    (("config", "memory"), 5, "memory"), (("config", "memory"), RAM * 2, "memory"), (("disks",), [], "disks"),
    (("cmdline",), 5, "cmdline"),
    (("disks", 0, "layers"), ["../../../etc/passwd"], "disk 0"), (("memory", "size"), "x", ""),
])
def test_the_field_is_named(real, path, new, named):
    if not named:       # what only says that the file is the same: it is compared to its checksums then
        assert attempt(real, change(Snapshot(str(real)).state, path, new), path) == ""
        return
    with pytest.raises((SnapshotError, ConfigError), match=named):
        restore(Snapshot(str(real), change(Snapshot(str(real)).state, path, new))).close()


def test_bits_of_the_file_flipped(real, tmp_path):
    """A state.json of any other content than the one that was written is not read at all."""
    shutil.copytree(real, tmp_path / "s")
    whole = (real / "state.json").read_bytes()
    rng = random.Random(3)
    for _ in range(300):
        data = bytearray(whole)
        match rng.randrange(4):
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data)):]
            case 2:
                at = rng.randrange(len(data))
                data[at:at + rng.randrange(1, 40)] = b""
            case _:
                data[rng.randrange(len(data)):0] = rng.randbytes(8)
        if bytes(data) == whole:
            continue
        (tmp_path / "s/state.json").write_bytes(data)
        with pytest.raises(SnapshotError, match=r"state\.json"):
            Snapshot(str(tmp_path / "s"))


# killed, full, gone --------------------------------------------------------------------------------------

CHILD = """
import sys
sys.path[:0] = [{root!r}]
from hv import Machine, MachineConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.snapshot.save import save
devices = (DiskConfig({disk!r}, overlay="temp"),)
code = bytes.fromhex("66ff060005ebf9")
with Machine(MachineConfig(code, boot_protocol="flat", memory=16 << 20, devices=devices)) as m:
    m.start()
    save(m, {folder!r})
    print("saved", flush=True)
"""
# Every one is an edge of a step of save().
CALLS = "mkdir,makedirs,ftruncate,pwrite,open,fsync,fchmod,rename,lseek"


def test_killed_at_every_step(tmp_path):
    """Old snapshots stay as they are, a new one is there as a whole or not at all, the next command sweeps the rest."""
    store, disk = tmp_path / "store", tmp_path / "disk.img"
    disk.write_bytes(bytes(8192))

    code = CHILD.format(root=str(ROOT), folder=str(store / "old"), disk=str(disk))
    subprocess.run([sys.executable, "-ISE", "-c", code], capture_output=True, timeout=60, check=True)
    old = {name: (store / "old" / name).read_bytes() for name in ("state.json", "memory", "memory.sums")}
    deaths = leftovers = 0
    for call in CALLS.split(","):
        for number in range(1, 30):
            done = killed(store, call, number)
            left = [name for name in os.listdir(store) if name.startswith(".")]
            leftovers += bool(left)
            if (store / "new").exists():
                restore(str(store / "new"), verify=True).close()
                shutil.rmtree(store / "new")
            sweep(str(store))
            assert os.listdir(store) == ["old"], (call, number)
            if done.returncode == 0:
                break
            deaths += 1
    assert deaths > 8 and leftovers > 3, (deaths, leftovers)
    assert old == {name: (store / "old" / name).read_bytes() for name in old}
    restore(str(store / "old"), verify=True).close()


HOOKED = """
import os, signal, sys
call, number = {call!r}, {number}
real = getattr(os, call)
seen = 0
def step(*arguments, **options):
    global seen
    seen += 1
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
"""


def killed(store: Path, call: str, number: int) -> subprocess.CompletedProcess[bytes]:
    """The child with SIGKILL at the `number`th of one kind of call, counted from when save() begins."""
    code = HOOKED.format(call=call, number=number) + CHILD.format(
        root=str(ROOT), folder=str(store / "new"), disk=str(store.parent / "disk.img")).replace(
            "    save(", "    setattr(os, call, step)\n    save(")
    return subprocess.run([sys.executable, "-ISE", "-c", code], capture_output=True, timeout=60, check=False)


def counts_on(machine: Machine) -> bool:
    held, end = machine.memory.u32(0x500), time.monotonic() + 10
    while machine.memory.u32(0x500) == held and time.monotonic() < end:
        time.sleep(0.002)
    return machine.memory.u32(0x500) != held


def test_a_file_that_may_not_grow_so_large(tmp_path):
    """RLIMIT_FSIZE, as a full disk without root: EFBIG in the middle of guest RAM."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Machine(MachineConfig(COUNT, boot_protocol="flat", memory=RAM)) as machine:
        machine.memory.write(8 << 20, os.urandom(1 << 20))
        machine.start()
        for limit in (1000, 9 << 20):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(HvError, match=r"writing .*: File too large") as caught:
                    save(machine, str(tmp_path / "s"))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert "the guest goes on" in caught.value.hint
            assert os.listdir(tmp_path) == [] and counts_on(machine)
            with pytest.raises(HvError):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                try:
                    save(machine, str(tmp_path / "s"), stop=True, track=True)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert machine.running() and machine.tracker is None and counts_on(machine)
        save(machine, str(tmp_path / "s"))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_full(tmp_path):
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "none", tmp_path], check=True, timeout=20)
        with Machine(MachineConfig(COUNT, boot_protocol="flat", memory=RAM)) as machine:
            machine.start()
            save(machine, str(tmp_path / "small"), track=True)
            machine.memory.write(8 << 20, os.urandom(4 << 20))
            for diff in (False, True):
                with pytest.raises(HvError, match="No space left on device"):
                    save(machine, str(tmp_path / "s"), diff=diff)
                assert os.listdir(tmp_path) == ["small"] and counts_on(machine)
            machine.memory.fill(8 << 20, 4 << 20)
            save(machine, str(tmp_path / "s"))
            restore(str(tmp_path / "s"), verify=True).close()
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=20)


def test_files_that_vanish_under_a_clone(tmp_path):
    """It has them open: they are gone for others only."""
    with Machine(MachineConfig(COUNT, boot_protocol="flat", memory=RAM)) as machine:
        machine.memory.write(8 << 20, b"far away" * 1000)
        machine.start()
        save(machine, str(tmp_path / "s"))
    with restore(str(tmp_path / "s")) as clone:
        clone.start()
        shutil.rmtree(tmp_path / "s")
        assert counts_on(clone)
        assert clone.memory.read(8 << 20, 8000) == b"far away" * 1000
        save(clone, str(tmp_path / "again"))
        with pytest.raises(ConfigError, match="can't be opened"):
            save(clone, str(tmp_path / "diff"), diff=True)
    with restore(str(tmp_path / "again"), verify=True) as clone:
        assert clone.memory.read(8 << 20, 8000) == b"far away" * 1000
        clone.start()
        assert counts_on(clone)
