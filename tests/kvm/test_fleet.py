"""Many real machines in one process: one loop, one I/O thread, and no machine that troubles another."""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.run import needs_kvm

from hv import ConfigError, Host, Machine, MachineConfig, StateError
from hv.cli.vm_client import Vm
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.rng import RngConfig
from hv.machine import halted
from hv.machine.fleet import raise_descriptor_limit
from hv.machine.halted import _run_ns
from hv.machine.machine import Outcome

pytestmark = needs_kvm

IDLE = b"\xfb\xf4\xeb\xfd"                          # sti; hlt; jmp: asleep, and can be woken
DEAD = b"\xfa\xf4\xeb\xfc"                          # cli; hlt; jmp to cli
SPIN = b"\xeb\xfe"
POWER_OFF = b"\xba\x04\x06\xb8\x00\x34\xef\xf4"     # out 0x604, 0x3400
EXIT = b"\xb0\x03\xe6\xf4\xf4"                    # out 0xf4, 3: debug exit


def tiny(code: bytes, **options: object) -> MachineConfig:
    return MachineConfig(code, boot_protocol="flat", memory=2 << 20, **options)     # type: ignore[arg-type]


def things() -> tuple[set[str], int, int]:
    """Descriptors, mappings of KVM's, threads: what a machine might leave behind."""
    gc.collect()
    fds = {f"{name} {os.readlink(f'/proc/self/fd/{name}')}" for name in os.listdir("/proc/self/fd")
           if os.path.exists(f"/proc/self/fd/{name}")}
    with open("/proc/self/maps") as file:
        return fds, sum("kvm" in line for line in file), len(os.listdir("/proc/self/task"))


def settled(wanted: tuple[set[str], int, int]) -> tuple[set[str], int, int]:
    """What is there once threads that told of their end are gone; within seconds."""
    for _ in range(300):
        if (found := things()) == wanted:
            break
        time.sleep(0.01)
    return found


class Ends:
    """Who ended, and how."""

    def __init__(self) -> None:
        self.seen: dict[str, Outcome | None] = {}

    def __call__(self, name: str, outcome: Outcome | None) -> None:
        self.seen[name] = outcome

    def reasons(self) -> dict[str, str]:
        return {name: outcome.reason for name, outcome in self.seen.items() if outcome is not None}


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
def host(ends: Ends) -> Iterator[Host]:
    with Host(ends) as made:
        yield made
        assert not made.errors


def test_each_ends_in_its_own_way_and_is_forgotten(host: Host, ends: Ends) -> None:
    for name, code in (("off", POWER_OFF), ("exit", EXIT), ("halt", DEAD), ("stays", IDLE)):
        host.adopt(name, host.build(tiny(code, debug_exit=0xF4)))
        host.start(name)
    assert not host.wait(4)
    assert ends.reasons() == {"off": "poweroff", "exit": "debug-exit", "halt": "halt"}
    assert list(host.machines) == ["stays"]
    host.stop_all()
    assert host.wait(10)
    assert ends.reasons()["stays"] == "quit"


def test_the_host_gives_everything_back() -> None:
    def some() -> None:
        with Host() as host:
            for index in range(5):
                host.adopt(str(index), host.build(tiny(IDLE, devices=(RngConfig(),), cpus=2)))
                if index:       # one is never started
                    host.start(str(index))
            host.close_one("3")
            host.close_one("no such")

    alone = len(os.listdir("/proc/self/task"))
    some()      # loads what is loaded once
    for _ in range(300):
        if len((before := things())[0]) and before[2] <= alone:
            break
        time.sleep(0.01)
    some()
    *others, threads = settled(before)
    assert others == list(before[:2])
    assert threads <= before[2]         # one of an earlier test's may have ended meanwhile


def test_all_devices_are_served_by_one_thread(host: Host, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    before = len(os.listdir("/proc/self/task"))
    machines = []
    for index in range(3):
        devices = (RngConfig(), DiskConfig(str(tmp_path / "disk"), readonly=True))
        machines.append(host.adopt(str(index), host.build(tiny(IDLE, devices=devices))))
    assert len(os.listdir("/proc/self/task")) == before
    assert all(not machine.io_threads for machine in machines)
    where = set()
    for machine in machines:
        for device in machine.devices.values():
            seen = threading.Event()
            device.io.call(lambda seen=seen: (where.add(threading.get_ident()), seen.set()))    # type: ignore[misc]
            assert seen.wait(10)
    assert len(where) == 1
    assert where != {threading.get_ident()}


def test_a_failing_device_ends_its_own_machine_alone(host: Host, ends: Ends) -> None:
    for name in ("bad", "good"):
        host.adopt(name, host.build(tiny(IDLE, devices=(RngConfig(),))))
        host.start(name)
    good = host.machines["good"].devices["rng0"]
    host.machines["bad"].devices["rng0"].io.call(lambda: 1 // 0)
    for _ in range(500):
        if ends.seen:
            break
        time.sleep(0.01)
    assert ends.reasons() == {"bad": "internal-error"}
    assert "a device: ZeroDivisionError" in str(ends.seen["bad"])
    served = threading.Event()
    good.io.call(served.set)
    assert served.wait(10)
    assert host.machines["good"].running()


def test_nothing_of_a_closed_machine_runs_any_more(host: Host) -> None:
    machine = host.adopt("gone", host.build(tiny(IDLE, devices=(RngConfig(),))))
    host.adopt("stays", host.build(tiny(IDLE, devices=(RngConfig(),))))
    device, over, seen = machine.devices["rng0"], threading.Event(), []

    def note(what: str) -> None:
        if over.is_set():
            seen.append(what)

    device.notified = lambda index: note("kick")     # type: ignore[method-assign]
    for delay in (0.0, 0.02, 0.1, 0.2):
        device.io.call_later(delay, lambda: note("timer"))
        machine.loop.call_later(delay, lambda: note("timer of the loop"))
    blocked = threading.Event()
    host.io.loop.call(lambda: (blocked.set(), time.sleep(0.1)))      # what comes now stands in line
    assert blocked.wait(10)
    device.io.call(lambda: device.io.call(lambda: note("call of a call")))
    os.eventfd_write(device.kick_fds[0], 1)
    host.close_one("gone")
    over.set()
    device.io.call(lambda: note("late call"))
    served = threading.Event()
    host.machines["stays"].devices["rng0"].io.call_later(0.3, served.set)
    assert served.wait(10)
    assert seen == []


def test_each_has_its_control_socket(host: Host, tmp_path: Path) -> None:
    for name in ("a", "b"):
        host.adopt(name, host.build(tiny(IDLE)), control=str(tmp_path / f"{name}.sock"))
        host.start(name)
    with Vm(str(tmp_path / "a.sock")) as a, Vm(str(tmp_path / "b.sock")) as b:
        assert a.ask("status")["state"] == "running"
        assert a.ask("pause")["state"] == "paused"
        assert b.ask("status")["state"] == "running"
        assert b.ask("stop", force=True)["reason"] == "quit"
        assert a.ask("status")["state"] == "paused"
    for _ in range(500):
        if list(host.machines) == ["a"]:
            break
        time.sleep(0.01)
    assert list(host.machines) == ["a"]
    assert not (tmp_path / "b.sock").exists()


def test_a_name_can_be_had_once(host: Host) -> None:
    host.adopt("a", host.build(tiny(IDLE)))
    second = host.build(tiny(IDLE))
    with pytest.raises(ConfigError, match="a machine a already"):
        host.adopt("a", second)
    assert second._closed
    host.close()
    late = Machine(tiny(IDLE))
    with pytest.raises(StateError, match="closed"):
        host.adopt("late", late)
    assert late._closed


def test_a_machine_may_be_waited_for_while_the_host_serves(host: Host) -> None:
    machine = host.build(tiny(POWER_OFF))
    assert machine.run().reason == "poweroff"
    machine.close()
    sleeper = host.build(tiny(IDLE))
    sleeper.start()
    assert sleeper.wait(0.05) is None
    sleeper.close()


def test_a_thousand_tiny_guests_asleep_or_paused(host: Host) -> None:
    raise_descriptor_limit(1000)
    for index in range(1000):
        host.adopt(str(index), host.build(tiny(IDLE)))
        host.start(str(index))
    assert len(host.machines) == 1000
    assert all(machine.running() for machine in host.machines.values())
    for machine in list(host.machines.values())[::2]:
        machine.pause()
    assert sum(vcpu.parked for machine in host.machines.values() for vcpu in machine.vcpus) == 500
    before = time.process_time()
    time.sleep(2)
    assert time.process_time() - before < 1     # asleep: half of one processor would be a thousand pollers
    for machine in list(host.machines.values())[::2]:
        machine.resume()
    assert all(machine.running() for machine in host.machines.values())


def test_too_few_descriptors_are_told_before_anything_is_made() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ConfigError, match=r"\d+ machines need about \d+ open files, the limit is \d+"):
        raise_descriptor_limit(limits[1])
    low = min(256, limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, limits[1]))
    try:
        raise_descriptor_limit(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_sleeping_guest_is_asked_once_and_left_alone(host: Host) -> None:
    machine = host.adopt("a", host.build(tiny(IDLE)))
    machine.start()
    time.sleep(3)       # the watch has begun, and had its answer
    vcpu, = machine.vcpus
    before = switches(vcpu.tid), _run_ns(vcpu)
    time.sleep(4)
    assert (switches(vcpu.tid), _run_ns(vcpu)) == before


def test_a_busy_guest_is_not_interrupted_to_be_asked(host: Host) -> None:
    machine = host.build(tiny(SPIN))
    asked: list[int] = []
    plain = machine.run_on_vcpu
    machine.run_on_vcpu = lambda index, task: (asked.append(index), plain(index, task))    # type: ignore[assignment]
    host.adopt("a", machine)
    machine.start()
    time.sleep(3.2)
    assert not asked


def test_a_guest_that_halts_after_a_rest_is_noticed(host: Host, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halted, "STALE", 3.0)
    # Rests for a while. An interrupt's handler works, 20 times 65536 turns (mov dx, 20; dec cx; jnz; dec dx; jnz), and
    # halts for good.
    work = b"\x31\xc9\xba\x14\x00\x49\x75\xfd\x4a\x75\xfa\xfa\xf4\xeb\xfc"
    code = bytearray(IDLE.ljust(0x40, b"\x90") + work)
    machine = host.adopt("a", host.build(tiny(bytes(code))))
    machine.memory.write(4 * 4, (0x7C40).to_bytes(2, "little") + b"\0\0")
    machine.start()
    time.sleep(3)
    assert machine.running()
    vcpu, = machine.vcpus
    machine.vm.irq_line(4, True)        # the PIC's vectors begin at 0 before it is set up
    assert host.wait(25), (_run_ns(vcpu), ends.seen)
    assert ends.reasons() == {"a": "halt"}


def switches(tid: int) -> int:
    """How often a thread has gone to sleep."""
    with open(f"/proc/self/task/{tid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))
