"""RAM that has no memory slot until it is touched: each way to touch it first finds zeros, and keeps what it writes.

Where KVM needs no help with ring 0 there are no such slots, and the same must come out.
"""

from __future__ import annotations

import hashlib
import queue
import shutil
import subprocess
from pathlib import Path

import pytest
from framework.run import ROOT, needs_kvm
from framework.snapshots import Going, Taken

from hv import Machine, MachineConfig
from hv.errors import SnapshotError
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save
from hv.softkvm.helper import LINUX_CMDLINE

pytestmark = needs_kvm
HERE = Path(__file__).parent / "untouched"
MIB = 1 << 20
MEMORY = 256 * MIB


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Waits to be told how to touch RAM."""
    folder = tmp_path_factory.mktemp("untouched")
    tree = folder / "guests"
    shutil.copytree(ROOT / "guests", tree)
    shutil.copytree(HERE, tree / "untouched")
    script = tree / "build.py"
    script.write_text(script.read_text().replace('    "demo": LONG,', '    "demo": LONG,\n    "untouched": LONG,'))
    subprocess.run(["python3", str(script), "--out", str(folder), "untouched"], check=True, timeout=60)
    return folder / "untouched.elf"


@pytest.fixture(scope="module")
def untouched(guest: Path) -> str:
    """A snapshot of it, which passes for a Linux."""
    return taken(guest, LINUX_CMDLINE.decode())


def taken(guest: Path, words: str) -> str:
    """A snapshot of the guest, which has such words on its command line."""
    folder = guest.with_name(f"taken-{words[:1]}")
    with Machine(MachineConfig(str(guest), memory=MEMORY, cmdline=words, timeout=60)) as machine:
        heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        machine.console.add_sink(heard.put)
        machine.start()
        seen = b""
        while b"ready" not in seen:
            seen += heard.get(timeout=30)
        save(machine, str(folder))
    return str(folder)


def ask(folder: str, how: bytes) -> tuple[int, Machine]:
    """What the guest says of that first touch; the machine has ended."""
    with restore(folder) as machine:
        machine.console.send(how)
        machine.start()
        outcome = machine.wait(20)
        said = machine.console.output.split(b"untouched: ")[-1]
        assert outcome is not None and outcome.reason == "poweroff", (outcome, said)
        return int(said), machine


@pytest.mark.parametrize("how, answer", [
    pytest.param(b"l", 0, id="load"), pytest.param(b"s", 1, id="stores of all sizes"),
    pytest.param(b"x", 1, id="exchange and add"), pytest.param(b"c", 5, id="compare and exchange"),
    pytest.param(b"r", 1, id="string store over a slot's end"), pytest.param(b"u", 1, id="store over two pages"),
    pytest.param(b"k", 3, id="stack"), pytest.param(b"t", 0, id="page table"),
    pytest.param(b".l", 0, id="ring 3: load"), pytest.param(b".s", 1, id="ring 3: store"),
    pytest.param(b".x", 1, id="ring 3: exchange and add"), pytest.param(b".p", 7, id="ring 3: SSE load"),
    pytest.param(b".q", 7, id="ring 3: SSE store"), pytest.param(b".f", 9, id="ring 3: code"),
])
def test_a_first_touch_is_one_of_zeros(untouched: str, how: bytes, answer: int) -> None:
    found, machine = ask(untouched, how)
    assert found == answer
    assert machine.mmio.unclaimed == 0
    if machine.softkvm is not None:
        assert machine.slots is not None and len(machine.slots.rows) > 1


@pytest.mark.parametrize("how, answer", [(b"d", 0xFFF), (b"v", 0x37F)], ids=["descriptor register", "FPU state"])
def test_a_guest_that_is_no_linux_has_all_of_its_slots(guest: Path, how: bytes, answer: int) -> None:
    """KVM would lose what these store where there is none."""
    found, machine = ask(taken(guest, how.decode()), how)
    assert found == answer
    assert machine.slots is None


@pytest.mark.parametrize("used, field", [
    (7, "used: is of type int"), ([7], "used[0]"), ([[0]], "used[0]"), ([[2, 1]], "used[0]"), ([[-1, 4]], "used[0]"),
    ([[0, True]], "used[0]"), ([[0, MEMORY // 4096 + 1]], "used[0]"), ([[0, 8], [4, 9]], "used[1]"),
    ([[0, 1 << 70]], "used[0]"),
])
def test_a_part_in_use_that_can_not_be(untouched: str, used: object, field: str) -> None:
    taken = Snapshot(untouched)
    if "used" not in taken.state:
        pytest.skip("KVM needs no help with ring 0")
    with pytest.raises(SnapshotError) as caught:
        restore(Snapshot(untouched, taken.state | {"used": used})).close()
    assert field in str(caught.value)


def test_a_guest_none_of_whose_ram_has_a_slot_runs(untouched: str) -> None:
    """As a hostile snapshot may have it."""
    with restore(Snapshot(untouched, Snapshot(untouched).state | {"used": []})) as machine:
        machine.console.send(b"l")
        machine.start()
        outcome = machine.wait(20)
    assert outcome is None or outcome.reason in ("poweroff", "crash", "internal-error")


def covered(machine: Machine) -> int:
    """How many bytes of RAM have slots."""
    return machine.memory.size if machine.slots is None else sum(row[3] for row in machine.slots.rows)


def test_linux_uses_more_ram_than_it_did(micro: Taken, tmp_path: Path) -> None:
    """The disk by DMA, a file in tmpfs by ring 0, programs: then twice a difference, and a machine of the last."""
    data = micro.disk.read_bytes()
    with micro.go_on() as shell:
        machine = shell.machine
        before = covered(machine)
        shell.run("for i in 1 2 3 4 5; do cat /dev/vda; done > /tmp/big", timeout=120)
        assert hashlib.md5(5 * data).hexdigest() in shell.run("md5sum /tmp/big", timeout=120)
        assert machine.mmio.unclaimed == 0
        if machine.softkvm is not None:
            assert before < covered(machine) < machine.memory.size
        save(machine, str(tmp_path / "one"), diff=True, track=True)
        assert covered(machine) == machine.memory.size      # who tracks needs them all
        shell.run("cat /dev/vda >> /tmp/big", timeout=60)
        save(machine, str(tmp_path / "two"), diff=True)
    with Going(restore(str(tmp_path / "two"))) as shell:
        assert hashlib.md5(6 * data).hexdigest() in shell.run("md5sum /tmp/big", timeout=120)


def test_a_clone_costs_the_kernel_a_fraction(micro: Taken) -> None:
    """Of ten bytes for each page."""
    with micro.go_on() as shell:
        if shell.machine.softkvm is None:
            pytest.skip("KVM needs no help with ring 0")
        assert shell.machine.slots is not None
        assert covered(shell.machine) < shell.machine.memory.size / 2
        folder = micro.place / "again"
        save(shell.machine, str(folder))
    with restore(str(folder)) as machine:
        assert covered(machine) < machine.memory.size / 2
