"""Each instruction that is completed in user space does what the real processor does.

The same table of instructions runs as a program in user mode, on the processor, and in ring 0 of a guest, where a
software KVM gives up on most of them. All registers, flags that are defined, and memory must come out alike.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from framework.run import ROOT, boot, needs_kvm

from hv import Machine, MachineConfig

pytestmark = needs_kvm
HERE = Path(__file__).parent / "instructions"
RESULTS, ROUNDS, MEMORY, FLAGS_AT, MXCSR_AT = 0x1000000, 4, 128, 40, 48
SIZE = MEMORY + 1024


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program, and the guest linked with guests/common."""
    folder = tmp_path_factory.mktemp("instructions")
    tree = folder / "guests"
    shutil.copytree(ROOT / "guests", tree)
    (tree / "instructions").mkdir()
    for leaf in ("table.S", "state.h", "guest.c"):
        shutil.copy(HERE / leaf, tree / "instructions")
    script = tree / "build.py"
    script.write_text(script.read_text().replace('    "demo": LONG,', '    "demo": LONG,\n    "instructions": LONG,'))
    subprocess.run(["python3", str(script), "--out", str(folder), "instructions"], check=True, timeout=60)
    sources = [str(HERE / "program.c"), str(HERE / "table.S")]
    subprocess.run(["gcc", "-O1", "-no-pie", "-o", str(folder / "program"), *sources], check=True, timeout=60)
    return folder / "program", folder / "instructions.elf"


def test_every_instruction_does_what_the_processor_does(built: tuple[Path, Path]) -> None:
    program, guest = built
    listing = subprocess.run([program, "names"], capture_output=True, text=True, check=True, timeout=30).stdout
    tests = [line.split(" ", 1) for line in listing.splitlines()]
    wanted = subprocess.run([program], capture_output=True, check=True, timeout=30).stdout
    assert len(wanted) == len(tests) * ROUNDS * SIZE
    with Machine(MachineConfig(str(guest), memory=128 << 20, timeout=60, debug_exit=0xF4)) as machine:
        outcome = machine.run()
        assert b"instructions: done" in machine.console.output, (outcome, machine.console.output)
        got = bytes(machine.memory.read(RESULTS, len(wanted)))
        completed = dict(machine.softkvm.counters) if machine.softkvm else {}
    wrong = []
    for number, (flags, name) in enumerate(tests):
        for index in range(ROUNDS):
            at = (number * ROUNDS + index) * SIZE
            expected, seen = bytearray(wanted[at:at + SIZE]), bytearray(got[at:at + SIZE])
            for state in (expected, seen):
                value = struct.unpack_from("<Q", state, FLAGS_AT)[0] & int(flags, 16)
                struct.pack_into("<Q", state, FLAGS_AT, value)
                state[MXCSR_AT] &= 0xC0         # Unicorn does not report the sticky exception flags
                if name.startswith("through"):
                    del state[MEMORY:]      # layouts may differ in parts that are reserved
            if expected != seen:
                first = next(i for i in range(len(expected)) if expected[i] != seen[i])
                wrong.append(f"{name}, round {index}: byte {first} is {seen[first]:#x}, on the processor "
                             f"{expected[first]:#x}")
    assert not wrong, "\n".join(wrong)
    if machine.softkvm is not None:
        assert completed.get("popcnt", 0) == 4 * ROUNDS     # all of them came here, none was skipped
        assert completed.get("pshufb", 0) == ROUNDS


def test_off_means_no_help() -> None:
    done = boot("guest:fault", "--softkvm", "off", "--cmdline", "off")
    assert done.returncode == 0
    assert b"software KVM" not in done.stderr


def test_system_calls_are_counted() -> None:
    done = boot("guest:ring3", "--stats")
    assert done.returncode == 0
    if b"software KVM" in done.stderr:
        assert b"software-KVM help: syscall 100" in done.stderr


def test_hardware_kvm_loads_none_of_it() -> None:
    with Machine(MachineConfig("guest:tiny", softkvm="off")) as machine:
        assert machine.softkvm is None
        assert machine.run().reason == "poweroff"
        assert not machine.exit_handlers and not machine.doorbells
