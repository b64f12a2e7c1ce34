"""Machines as a library has them: many in one process, paused, looked into, closed without a trace."""

from __future__ import annotations

import os
import threading
import time

import pytest
from framework.run import needs_kvm

from hv import ConfigError, ImageError, KernelError, Machine, MachineConfig, StateError

pytestmark = needs_kvm
HALT_FOREVER = bytes.fromhex("fb" "f4" "ebfc")                      # sti; hlt; jmp back
COUNT = bytes.fromhex("66ff060005" "ebf9")                          # real mode: inc dword [0x500]; jmp back
SAY_OK = bytes.fromhex("baf803" "b06f" "ee" "b06b" "ee" "fa" "f4" "ebfd")


def flat(code: bytes, **options: object) -> MachineConfig:
    return MachineConfig(code, boot_protocol="flat", memory=16 << 20, **options)     # type: ignore[arg-type]


def descriptors() -> set[str]:
    return {f"{name} {os.readlink(f'/proc/self/fd/{name}')}" for name in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{name}")}


def mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum("kvm" in line or "memfd" in line for line in file)


def test_close_gives_everything_back() -> None:
    with Machine(flat(COUNT, backing="memfd", cpus=3)) as machine:     # loads what is loaded once
        machine.start()
    before = descriptors(), mappings(), threading.active_count(), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        with Machine(flat(COUNT, backing="memfd", cpus=3)) as machine:
            machine.start()
            time.sleep(0.01)
    for _ in range(100):        # a thread that has told us of its end may need a moment to be gone
        if len(os.listdir("/proc/self/task")) == before[3]:
            break
        time.sleep(0.01)
    assert (descriptors(), mappings(), threading.active_count(), len(os.listdir("/proc/self/task"))) == before


def test_close_waits_for_the_last_that_a_vcpu_does() -> None:
    machine = Machine(flat(COUNT))
    real, seen = machine.vcpu_ended, []

    def slow() -> None:
        time.sleep(0.1)
        real()                                  # wakes the loop by its descriptor,
        seen.append(machine.loop._wake)         # type: ignore[union-attr]  # which has to be open still

    machine.vcpu_ended = slow                   # type: ignore[method-assign]
    machine.start()
    machine.close()
    assert seen and seen[0] >= 0


def test_a_machine_that_cannot_be_built_leaves_nothing() -> None:
    with pytest.raises(ImageError):
        Machine(MachineConfig("/no/such/kernel"))
    before = descriptors()
    for _ in range(3):
        with pytest.raises(ImageError):
            Machine(MachineConfig("/no/such/kernel"))
    assert descriptors() == before


def test_many_machines_run_side_by_side() -> None:
    machines = [Machine(flat(COUNT)) for _ in range(12)]
    try:
        for machine in machines:
            machine.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all(machine.memory.u32(0x500) for machine in machines):
            time.sleep(0.01)
        assert all(machine.memory.u32(0x500) for machine in machines)
    finally:
        for machine in machines:
            machine.close()


def test_consoles_do_not_mix() -> None:
    machines = [Machine(MachineConfig("guest:fault", cmdline=f"off number{index}")) for index in range(4)]
    for machine in machines:
        machine.start()
    for index, machine in enumerate(machines):
        with machine:
            assert machine.run().reason == "poweroff"
            assert machine.console.output == f"fault: off number{index}\n".encode()


def test_paused_means_no_progress() -> None:
    with Machine(flat(COUNT)) as machine:
        machine.start()
        while not machine.memory.u32(0x500):
            time.sleep(0.001)
        machine.pause()
        stopped_at = machine.memory.u32(0x500)
        time.sleep(0.1)
        assert machine.memory.u32(0x500) == stopped_at
        assert machine.vcpus[0].fd.get_regs().rip < 0x8000
        machine.resume()
        deadline = time.monotonic() + 5
        while machine.memory.u32(0x500) == stopped_at and time.monotonic() < deadline:
            time.sleep(0.001)
        assert machine.memory.u32(0x500) != stopped_at


def test_pause_and_resume_from_many_threads_end() -> None:
    with Machine(flat(COUNT, cpus=2)) as machine:
        machine.start()

        def disturb() -> None:
            for _ in range(30):
                machine.pause()
                machine.resume()

        threads = [threading.Thread(target=disturb) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        machine.resume()
        seen = machine.memory.u32(0x500)
        time.sleep(0.05)
        assert machine.memory.u32(0x500) != seen


def test_stopping_a_paused_machine_ends_it() -> None:
    with Machine(flat(COUNT)) as machine:
        machine.start()
        machine.pause()
        machine.stop("quit")
        outcome = machine.wait(5)
        assert outcome is not None and outcome.reason == "quit"


def test_starting_twice_is_refused() -> None:
    with Machine(flat(COUNT)) as machine:
        machine.start()
        with pytest.raises(StateError):
            machine.start()
    with pytest.raises(StateError):
        machine.start()
    machine.close()


def test_a_task_runs_in_the_vcpu_thread() -> None:
    with Machine(flat(COUNT)) as machine:
        machine.start()
        done = threading.Event()
        seen: list[int] = []

        def look(vcpu: object) -> None:
            seen.append(threading.get_ident())
            done.set()

        machine.run_on_vcpu(0, look)
        assert done.wait(5)
        assert seen != [threading.get_ident()]


def test_no_pit_before_the_guest_wants_one() -> None:
    with Machine(MachineConfig("guest:tiny")) as machine:
        assert machine.run().reason == "poweroff"
        with pytest.raises(KernelError):
            machine.vm.get_pit()
    with Machine(MachineConfig("guest:timer")) as machine:
        assert machine.run().reason == "poweroff"
        assert machine.vm.get_pit().channels[0].mode == 0       # pit_stop leaves it there


def test_halt_is_noticed_and_sleep_is_not() -> None:
    with Machine(flat(SAY_OK)) as machine:
        assert machine.run().reason == "halt"
        assert machine.console.output == b"ok"
    with Machine(flat(HALT_FOREVER, timeout=4)) as machine:
        assert machine.run().reason == "timeout"


def test_wait_for_text_and_its_absence() -> None:
    with Machine(MachineConfig("guest:echo", cmdline="echo")) as machine:
        machine.start()
        machine.console.wait_for(b"ready", 10)
        machine.console.send(b"some words")
        machine.console.wait_for(b"some words", 10)
        with pytest.raises(TimeoutError, match="never"):
            machine.console.wait_for(b"never", 0.1)
        machine.console.send(b"\x04")
        assert machine.wait(10).reason == "poweroff"        # type: ignore[union-attr]


def test_an_error_in_a_device_stops_the_machine_with_its_name() -> None:
    with Machine(flat(SAY_OK)) as machine:
        def broken(data: bytes) -> None:
            raise ZeroDivisionError("broken sink")

        machine.console.add_sink(broken)
        outcome = machine.run()
        assert outcome.reason == "internal-error" and "broken sink" in outcome.detail
        assert outcome.code == 70


@pytest.mark.parametrize("options", [
    {"memory": 0}, {"memory": 1 << 20}, {"memory": 1 << 50}, {"memory": (64 << 20) + 1}, {"cpus": 0}, {"cpus": 1000},
    {"cpus": -1}, {"backing": "cloud"}, {"huge": "3M"}, {"softkvm": "maybe"}, {"timeout": -1.0},
    {"boot_protocol": "efi"}, {"debug_exit": 1 << 16},
])
def test_impossible_configurations_are_refused(options: dict[str, object]) -> None:
    before = descriptors()
    with pytest.raises(ConfigError) as caught:
        Machine(MachineConfig("guest:tiny", **options))     # type: ignore[arg-type]
    assert caught.value.hint or " is not one of " in str(caught.value)
    assert descriptors() == before
