"""Whole machines into snapshots and back: small guests saved wherever they happen to be, Linux with all devices."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest
from framework.run import needs_kvm
from framework.snapshots import Going, Taken

from hv import ConfigError, Machine, MachineConfig, StateError
from hv.errors import HvError
from hv.machine.recipe_change import for_clone
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(600)]
RAM = 16 << 20
COUNT = bytes.fromhex("66ff060005" "ebf9")          # real mode: inc dword [0x500]; jmp back
# real mode, the PIT as it is set up by nobody: mode 2, 200 Hz; each tick counts at 0x500 (handler at 0x7c80)
TICK = bytes.fromhex(
    "fa" "31c0" "8ed8" "8ed0" "bc007b"              # cli; ax, ds, ss = 0; sp = 0x7b00
    "c7062000807c" "c70622000000"                   # vector 8: 0:0x7c80
    "b011e620" "b008e621" "b004e621" "b001e621" "b0fee621"      # PIC: vectors from 8, only IRQ 0
    "b034e643" "b04de640" "b017e640"                # PIT: channel 0, mode 2, 0x174d: 200 Hz
    "fb" "f4" "ebfd").ljust(0x80, b"\x90") + bytes.fromhex(
    "66ff060005" "50" "b020e620" "58" "cf")         # inc dword [0x500]; end of interrupt; iret


def flat(code: bytes, **options: object) -> MachineConfig:
    return MachineConfig(code, boot_protocol="flat", memory=RAM, **options)     # type: ignore[arg-type]


def counter(machine: Machine) -> int:
    return machine.memory.u32(0x500)


def counts_on(machine: Machine, beyond: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while counter(machine) <= beyond and time.monotonic() < end:
        time.sleep(0.002)
    return counter(machine) > beyond


def relay(config: MachineConfig, folder: Path, seconds: float) -> tuple[str, bytes, int]:
    """Run a guest to its end, saved and restored after every `seconds`: (how it ended, what it printed, how often)."""
    machine, hops, output = Machine(config), 0, b""
    while True:
        with machine:
            machine.start()
            if machine.wait(seconds) is None:
                try:
                    save(machine, str(folder / str(hops)), stop=True)
                except StateError:
                    pass        # it ended just now
            outcome = machine.wait(60)
            output += bytes(machine.console.output)
        assert outcome is not None
        if outcome.detail != "saved":
            return outcome.reason, output, hops
        machine = restore(str(folder / str(hops)))
        hops += 1
        assert hops < 400


# PIC, IOAPIC, PIT, local APIC timer, pending interrupts; a PIT's period begins anew, so the hops are longer than it.
@pytest.mark.parametrize(("guest", "seconds", "options", "last"), [
    ("timer", 0.05, {}, b"timer: ok\n"),
    ("ring3", 0.004, {}, b"ring3: ok\n"),
    ("smp", 0.004, {"cpus": 3, "cmdline": "rounds=8000"}, b"smp: 2 interrupts between processors\nsmp: ok\n"),
    ("smp", 0.02, {"cpus": 2, "cmdline": "rounds=10000", "backing": "memfd"}, b"smp: ok\n"),
    ("memtest", 0.01, {}, b"each 4096 bytes\n"),
])
def test_a_guest_is_saved_at_any_moment_and_ends_as_ever(tmp_path, guest, seconds, options, last):
    config = MachineConfig(f"guest:{guest}", memory=RAM, timeout=60, **options)
    with Machine(config) as machine:
        machine.run()
        whole = bytes(machine.console.output)
    reason, output, hops = relay(config, tmp_path, seconds)
    assert (reason, hops > 1) == ("poweroff", True), (reason, hops, output)
    assert output.endswith(last)
    assert strip(output) == strip(whole)


def strip(text: bytes) -> bytes:
    return re.sub(rb"\d{4}-\d\d-\d\d", b"", text)


def test_typed_input_goes_on_where_it_was(tmp_path):
    with Machine(MachineConfig("guest:echo", memory=RAM, cmdline="echo")) as machine:
        machine.start()
        machine.console.wait_for(b"ready", 10)
        machine.console.send(b"first ")
        machine.console.wait_for(b"first ", 10)
        machine.freeze()
        machine.console.send(b"second")         # in the UART's FIFO, not yet read
        save(machine, str(tmp_path / "s"))
    with restore(str(tmp_path / "s")) as machine:
        machine.start()
        machine.console.wait_for(b"second", 10)
        machine.console.send(b"\x04")
        assert machine.wait(10).reason == "poweroff"


def test_ten_generations_count_on(tmp_path):
    low = 0
    with Machine(flat(COUNT, cpus=2)) as machine:       # the other processor waits for INIT
        machine.start()
        assert counts_on(machine, 0)
        save(machine, folder := str(tmp_path / "0"))
        assert counts_on(machine, counter(machine))     # the first one goes on
    for generation in range(1, 11):
        with restore(folder) as machine:
            saved = counter(machine)
            assert saved > low
            machine.start()
            assert counts_on(machine, saved)
            save(machine, folder := str(tmp_path / str(generation)))
            low = saved
    # all are as they were, the first too
    with restore(str(tmp_path / "0"), verify=True) as machine:
        assert 0 < counter(machine) < saved


def test_a_pit_in_real_mode_ticks_on(tmp_path):
    with Machine(flat(TICK)) as machine:
        machine.start()
        assert counts_on(machine, 3)
        save(machine, str(tmp_path / "s"))
    with restore(str(tmp_path / "s")) as machine:
        saved = counter(machine)
        machine.start()
        assert counts_on(machine, saved + 20)
        began, ticks = time.monotonic(), counter(machine)
        time.sleep(0.5)
        rate = (counter(machine) - ticks) / (time.monotonic() - began)
        assert 100 < rate < 220


def test_a_frozen_machine_stays_frozen_and_a_paused_one_paused(tmp_path):
    with Machine(flat(COUNT)) as machine:
        machine.start()
        assert counts_on(machine, 0)
        for number, (hold, go) in enumerate([(machine.freeze, machine.thaw), (machine.pause, machine.resume)]):
            hold()
            held = counter(machine)
            save(machine, str(tmp_path / str(number)))
            time.sleep(0.05)
            assert counter(machine) == held
            with restore(str(tmp_path / str(number))) as other:
                assert counter(other) == held
                other.start()
                assert counts_on(other, held)
            go()
            assert counts_on(machine, held)


def test_many_savers_and_a_pausing_user_do_not_disturb_each_other(tmp_path):
    errors: list[Exception] = []
    with Machine(flat(COUNT, cpus=2)) as machine:
        machine.start()

        def saver(name: str) -> None:
            try:
                for number in range(4):
                    save(machine, str(tmp_path / f"{name}{number}"))
            except Exception as error:
                errors.append(error)

        def pauser() -> None:
            for _ in range(20):
                machine.freeze()
                machine.thaw()

        threads = [threading.Thread(target=saver, args=(name,)) for name in "abc"] + [threading.Thread(target=pauser)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads)
        assert counts_on(machine, counter(machine))
        assert len(os.listdir(tmp_path)) == 12
    for name in os.listdir(tmp_path):
        with restore(str(tmp_path / name), verify=True) as machine:
            machine.start()
            assert counts_on(machine, counter(machine))


def test_a_machine_closed_while_it_is_saved_waits_for_that(tmp_path):
    for number in range(6):
        found: list[object] = []
        with Machine(flat(COUNT)) as machine:
            machine.start()
            counts_on(machine, 0)

            def saver(machine: Machine = machine, number: int = number, found: list[object] = found) -> None:
                try:
                    found.append(save(machine, str(tmp_path / str(number))))
                except HvError as error:
                    found.append(error)

            thread = threading.Thread(target=saver)
            thread.start()
            time.sleep(0.003 * number)
        thread.join(30)
        assert len(found) == 1
        assert os.path.isdir(tmp_path / str(number)) == (not isinstance(found[0], HvError)), found
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_can_not_be_saved_is_refused(tmp_path):
    with Machine(flat(COUNT)) as machine:
        with pytest.raises(StateError, match="does not run"):
            save(machine, str(tmp_path / "s"))
        machine.start()
        save(machine, str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="is there already"):
            save(machine, str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="no snapshot to take the difference from"):
            save(machine, str(tmp_path / "d"), diff=True)
        with pytest.raises(HvError, match="making"):
            save(machine, "/proc/no/such")
        assert counts_on(machine, counter(machine))
    assert os.listdir(tmp_path) == ["s"]


# Linux ---------------------------------------------------------------------------------------------------


def clocks(shell: Going) -> tuple[float, int]:
    """(uptime, time of day) of the guest."""
    lines = shell.run("cat /proc/uptime; date +%s").splitlines()
    return float(lines[0].split()[0]), int(lines[1])


def test_linux_goes_on_as_often_as_wanted(micro: Taken):
    seen = set()
    for number in range(3):
        with micro.go_on() as shell:
            assert "7 kept shared\n" in shell.run("echo $X $(cat /tmp/file /here/note)")
            shell.run(f"X=changed{number}; echo {number} > /tmp/file; echo {number} >> /here/written")
            assert f"changed{number} {number}\n" in shell.run("echo $X $(cat /tmp/file)")
            assert not shell.machine.softkvm or shell.machine.softkvm.counters["syscall"] > 0
            seen.add(shell.run("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum"))
    assert len(seen) == 3
    assert (micro.share / "written").read_text() == "0\n1\n2\n"
    (micro.share / "written").unlink()


def test_clones_diverge_side_by_side(micro: Taken):
    snapshot = Snapshot(micro.folder)
    shells = []
    try:
        for number in range(3):
            shells.append(Going(restore(snapshot, recipe=for_clone(snapshot.part("config"), number))))
        for number, shell in enumerate(shells):
            shell.run(f"X=$((X + {number})); echo {number} | dd of=/dev/vda bs=512 conv=sync oflag=direct 2>/dev/null")
        for number, shell in enumerate(shells):
            assert f"{7 + number} {number}\n" in shell.run("echo $X $(dd if=/dev/vda bs=2 count=1 2>/dev/null)")
    finally:
        for shell in shells:
            shell.machine.close()


def test_time_goes_on_from_when_it_was_saved_or_from_now(micro: Taken):
    created = float(Snapshot(micro.folder).state["created"])
    with micro.go_on() as shell:
        first, date = clocks(shell)
    with micro.go_on() as shell:
        began = time.monotonic()
        again, date_again = clocks(shell)
        spent = time.monotonic() - began
    assert abs(again - first) < 5 + spent
    assert abs(date_again - date) < 6 + spent and abs(date - created) < 10 + spent
    away = time.time() - created
    assert away > 3, "the snapshot is too new to tell"
    with micro.go_on(clock_now=True) as shell:
        began = time.monotonic()
        uptime, now = clocks(shell)
        spent = time.monotonic() - began
        assert abs(now - time.time()) < 2 + spent
        assert abs(uptime - first - away) < 8 + spent
        assert shell.run("dmesg | grep -ciE 'stall|lockup|unstable|BUG'").startswith("0\n")


def test_the_time_of_a_frozen_machine_is_that_of_its_freezing(micro: Taken, tmp_path: Path):
    with micro.go_on() as shell:
        uptime, _ = clocks(shell)
        shell.machine.freeze()
        time.sleep(4)
        save(shell.machine, str(tmp_path / "s"))
    with Going(restore(str(tmp_path / "s"))) as shell:
        began = time.monotonic()
        later, _ = clocks(shell)
        assert 0 <= later - uptime < 3 + time.monotonic() - began
    with Going(restore(str(tmp_path / "s"), clock_now=True)) as shell:
        began = time.monotonic()
        _, date = clocks(shell)
        assert abs(date - time.time()) < 3 + time.monotonic() - began


def test_a_linux_saved_while_it_booted_boots_on(micro: Taken):
    with Going(restore(micro.early)) as shell:
        shell.booted()
        assert "42\n" in shell.run("echo $((6 * 7))")


def test_every_processor_and_pci_device_goes_on(smp: Taken, tmp_path: Path):
    """Also a snapshot of a machine that was restored, while its processors count."""
    with smp.go_on() as shell:
        assert "7 kept shared\n" in shell.run("echo $X $(cat /tmp/file /here/note)", 120)
        shell.run("(steady count 0 & steady count 1 &)", 120)
        both_count(shell)
        shell.machine.freeze()
        said = counted(bytes(shell.machine.console.output))
        save(shell.machine, str(tmp_path / "s"))
    for _ in range(2):
        with Going(restore(str(tmp_path / "s"))) as shell:
            seen = both_count(shell)
            for cpu in (0, 1):
                assert seen[cpu][-1] > said[cpu][-1], (seen, said)
            shell.machine.console.send(b"killall steady\n")
            shell.wait_for(b"pyhv# ", 120)
            text = shell.run("dd if=/dev/vda bs=64k count=1 iflag=direct 2>/dev/null | md5sum; dd if=/dev/hwrng bs=9 "
                             "count=1 2>/dev/null | wc -c; cat /here/note; dmesg | grep -ciE 'stall|lockup|BUG:'", 120)
            assert re.search(r"[0-9a-f]{32}  -\n9\nshared\n0\n", text), text
            assert "bad" not in bytes(shell.machine.console.output).decode()


def both_count(shell: Going) -> dict[int, list[int]]:
    end = time.monotonic() + 60
    while len(seen := counted(bytes(shell.machine.console.output))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    return seen


def counted(text: bytes) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for cpu, number in re.findall(rb"steady: cpu(\d) (\d+)\r?\n", text):
        found.setdefault(int(cpu), []).append(int(number))
    return found
