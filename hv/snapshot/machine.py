"""A whole machine's state: processors, interrupt controllers, clock, fixed devices, virtio devices, software-KVM help.

`collect` reads it from a machine that stands still, `apply` gives it to a new one. Devices come before the interrupt
controllers: loading a device raises its line, and what the controllers made of that is overwritten by their own state.
Guest RAM is hv/snapshot/memory.py's. Driven by tests/kvm/test_snapshot.py.
"""

from __future__ import annotations

__all__ = ["apply", "collect"]

from struct import pack
from time import monotonic_ns, time_ns

from hv.errors import GuestError, HvError, SnapshotError
from hv.kvm import ioctl as req
from hv.linux.libc import ioctl_bytes
from hv.snapshot.cpu import MSR_TSC, load_vcpu, save_vcpu, xsave_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.machine.machine import Machine
    from hv.snapshot.format import Snapshot

CHIPS = 3                       # master PIC, slave PIC, IOAPIC
CHIP_BYTES = 512                # struct kvm_irqchip, the union; chip_id and padding stand before it
KVM_CLOCK_REALTIME = 1 << 2     # the clock goes on for the time that has passed since (api.rst, 4.30)


def collect(machine: Machine, msrs: list[int]) -> dict[str, Any]:
    """Everything but guest RAM and disks, as plain data and bytes. The machine is frozen; `msrs`: settable_msrs()."""
    vm = machine.vm
    xsave = xsave_size(vm)
    clock = vm.get_clock()
    vcpus = [save_vcpu(vcpu.fd, msrs, xsave) for vcpu in machine.vcpus]
    realtime = clock.realtime
    frozen = machine.frozen
    if frozen is not None and realtime:
        # What the guest takes it for: it may have been frozen long ago, and others before it.
        realtime = max(1, realtime - (monotonic_ns() - frozen.at_ns) - machine.late_ns)
    if frozen is not None and frozen.tsc is not None:
        _set_back(vcpus, frozen.tsc)
    state: dict[str, Any] = {
        "vcpus": vcpus,
        "irqchips": [bytes(vm.get_irqchip(chip).chip) for chip in range(CHIPS)],
        "pit": bytes(vm.get_pit()) if machine.pit.made else None,
        "clock": {"kvmclock_ns": frozen.kvmclock_ns if frozen else clock.clock, "realtime_ns": realtime},
        "platform": {name: device.state() for name, device in machine.platform.items()},
        "devices": {name: {"device": device.state(), "transport": device.interrupts.state()}
                    for name, device in machine.devices.items()},
        "pci": None if machine.pci is None else machine.pci.bridge.state(),
        "softkvm": None if machine.softkvm is None else machine.softkvm.state(),
        "cmdline": machine.cmdline.decode("latin-1"),
    }
    return state


def _set_back(vcpus: list[dict[str, Any]], tsc: int) -> None:
    """The time stamp counters as of the moment in which the machine was frozen: the kvmclock is of that moment too."""
    passed = None
    for state in vcpus:
        for pair in state["msrs"]:
            if pair[0] == MSR_TSC:
                passed = pair[1] - tsc if passed is None else passed
                pair[1] = pair[1] - passed & (1 << 64) - 1


def apply(machine: Machine, snapshot: Snapshot, *, clock_now: bool = False) -> None:
    """Give a new machine with the same parts that state. Untrusted: SnapshotError names what can't be."""
    machine.cmdline = snapshot.part("cmdline", kind=str).encode("latin-1", "replace")
    for name, device in machine.platform.items():
        _load(f"platform.{name}", device.load, snapshot.part("platform", name))
    if machine.softkvm is not None:
        _load("softkvm", machine.softkvm.load, snapshot.part("softkvm"))
    _devices(machine, snapshot)
    _controllers(machine, snapshot, clock_now)
    vcpus = snapshot.part("vcpus", kind=list)
    if len(vcpus) != len(machine.vcpus):
        raise SnapshotError("vcpus", f"{len(vcpus)} states of {len(machine.vcpus)} processors", "the state is damaged")
    for vcpu, saved in zip(machine.vcpus, vcpus, strict=True):
        load_vcpu(vcpu.fd, saved, f"vcpus[{vcpu.index}]")


def _devices(machine: Machine, snapshot: Snapshot) -> None:
    saved = snapshot.part("devices")
    if set(saved) != set(machine.devices):
        raise SnapshotError("devices", f"are {sorted(saved)}, of the configuration {sorted(machine.devices)}",
                            "the state is damaged")
    for name, device in machine.devices.items():
        _load(f"devices.{name}", device.load, snapshot.part("devices", name, "device"))
        _load(f"devices.{name}.transport", device.interrupts.load, snapshot.part("devices", name, "transport"))
    if machine.pci is not None:
        _load("pci", machine.pci.bridge.load, snapshot.part("pci"))


def _controllers(machine: Machine, snapshot: Snapshot, clock_now: bool) -> None:
    from hv.kvm.abi_chips import ClockData

    vm = machine.vm
    for chip in range(CHIPS):
        data = snapshot.part("irqchips", chip, kind=bytes)
        if len(data) != CHIP_BYTES:
            raise SnapshotError(f"irqchips[{chip}]", f"is not {CHIP_BYTES} bytes", "the state is damaged")
        _load(f"irqchips[{chip}]", lambda state: ioctl_bytes(vm.fd, req.KVM_SET_IRQCHIP, state, "KVM_SET_IRQCHIP"),
              pack("<II", chip, 0) + data)
    pit = snapshot.state.get("pit")
    if pit is not None:
        from hv.kvm.abi_chips import PitState2

        if not isinstance(pit, bytes) or len(pit) != len(bytes(PitState2())):
            raise SnapshotError("pit", "is not a PIT's state", "the state is damaged")
        machine.pit.make()
        _load("pit", vm.set_pit, PitState2.from_buffer_copy(pit))
    clock = ClockData(clock=snapshot.number("clock", "kvmclock_ns", high=(1 << 63) - 1))
    realtime = snapshot.number("clock", "realtime_ns", high=(1 << 63) - 1)
    if clock_now and realtime:
        clock.flags, clock.realtime = KVM_CLOCK_REALTIME, realtime
    elif realtime:
        machine.late_ns = time_ns() - realtime
    _load("clock", vm.set_clock, clock)


def _load(where: str, load: Callable[[Any], object], value: object) -> None:
    """`load(value)`, with whatever a hostile value makes of it told as the field's fault."""
    try:
        load(value)
    except (HvError, GuestError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(where, f"can't be loaded ({error})", "it is damaged, or of another machine") from None
