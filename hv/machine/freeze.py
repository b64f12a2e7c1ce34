"""A machine that stands still as a whole: processors, devices, and the time its guest sees.

    freeze    the vCPUs leave the guest, then the devices finish what is in flight, then the clocks are read
    thaw      the clocks are set back to what they were, the guest is told that it was stopped, all goes on

So the guest's kvmclock, time stamp counter and ACPI timer do not see the pause: uptime stands still, no watchdog barks,
and its time of day is late by the pause, as with QEMU's `stop`; the CMOS clock shows the host's time
(`hwclock --hctosys`). KVM moves the time stamp counter by an attribute of each vCPU (Documentation/virt/kvm/devices/
vcpu.rst, KVM_VCPU_TSC_OFFSET): one written by MSR within a second of what it would be is taken for an attempt to
synchronise, and does not move at all (arch/x86/kvm/x86.c, kvm_synchronize_tsc). Where the host lacks the attribute
(before Linux 5.16) the clocks run on.

Left out on purpose: timers that the host keeps for the guest (local APIC, PIT) run on. One that ends meanwhile is one
early interrupt, which kernels must bear.

Driven by tests/kvm/test_control_linux.py.
"""

from __future__ import annotations

__all__ = ["Clocks", "Still", "freeze", "thaw"]

import ctypes
from time import monotonic_ns

from hv.errors import KernelError
from hv.kvm import ioctl as req
from hv.linux.libc import ioctl_ptr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

MSR_IA32_TSC = 0x10                                 # SDM 4, table 2-2
KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET = 0, 0       # arch/x86/include/uapi/asm/kvm.h
_U64 = (1 << 64) - 1


class _DeviceAttr(ctypes.Structure):
    """struct kvm_device_attr (include/uapi/linux/kvm.h)."""

    _fields_ = (("flags", ctypes.c_uint32), ("group", ctypes.c_uint32), ("attr", ctypes.c_uint64),
                ("addr", ctypes.c_uint64))


class Clocks:
    """What the guest's clocks showed when the machine was frozen. `tsc` is None where the host can't set it back."""

    __slots__ = ("at_ns", "kvmclock_ns", "tsc")

    def __init__(self, machine: Machine) -> None:
        self.at_ns = monotonic_ns()
        self.kvmclock_ns = int(machine.vm.get_clock().clock)
        self.tsc: int | None = None
        try:
            _tsc_offset(machine.vcpus[0])
            self.tsc = machine.vcpus[0].fd.get_msrs([MSR_IA32_TSC]).get(MSR_IA32_TSC)
        except KernelError:
            pass

    def set_back(self, machine: Machine) -> None:
        """Have the clocks go on from there. The vCPUs are held."""
        if self.tsc is None:
            return
        now = machine.vcpus[0].fd.get_msrs([MSR_IA32_TSC])[MSR_IA32_TSC]
        # One step for all, so that they stay in step; the TSC first, since kvmclock is told in its terms.
        for vcpu in machine.vcpus:
            _set_tsc_offset(vcpu, _tsc_offset(vcpu) - (now - self.tsc) & _U64)
        clock = machine.vm.get_clock()
        clock.clock, clock.flags = self.kvmclock_ns, 0
        machine.vm.set_clock(clock)
        passed = monotonic_ns() - self.at_ns
        machine.power.skip(passed)
        machine.late_ns += passed


def freeze(machine: Machine) -> None:
    """Stop vCPUs, then devices, then time. A machine that does not run, or is frozen, stays as it is."""
    machine.pause()
    if machine.frozen is not None or not machine.running():
        return
    for device in machine.devices.values():
        device.stop()
    machine.frozen = Clocks(machine)


class Still:
    """`with Still(machine):` it stands still, whoever else wants it to go on; behind that it is as it was before."""

    __slots__ = ("_machine", "_was_frozen", "_was_paused")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __enter__(self) -> Still:
        machine = self._machine
        machine.freezing.acquire()
        self._was_frozen, self._was_paused = machine.frozen is not None, machine.pausing
        try:
            freeze(machine)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        machine = self._machine
        try:
            if not self._was_frozen:
                _let_go(machine)
            if not self._was_paused:
                machine.resume()
        finally:
            machine.freezing.release()


def thaw(machine: Machine) -> None:
    """Time, devices and vCPUs go on."""
    _let_go(machine)
    machine.resume()


def _let_go(machine: Machine) -> None:
    """All but the vCPUs."""
    clocks, machine.frozen = machine.frozen, None
    if clocks is not None and machine.running():
        clocks.set_back(machine)
        for device in machine.devices.values():
            device.resume()
        for vcpu in machine.vcpus:
            machine.run_on_vcpu(vcpu.index, _tell)


def _tell(vcpu: Vcpu) -> None:
    try:
        vcpu.fd.kvmclock_ctrl()
    except KernelError:
        pass        # this guest does not use kvmclock (EINVAL)


def _tsc_offset(vcpu: Vcpu) -> int:
    value = ctypes.c_uint64()
    ioctl_ptr(vcpu.fd.fd, req.KVM_GET_DEVICE_ATTR, _attribute(value), "KVM_GET_DEVICE_ATTR(TSC_OFFSET)")
    return value.value


def _set_tsc_offset(vcpu: Vcpu, offset: int) -> None:
    ioctl_ptr(vcpu.fd.fd, req.KVM_SET_DEVICE_ATTR, _attribute(ctypes.c_uint64(offset)),
              "KVM_SET_DEVICE_ATTR(TSC_OFFSET)")


def _attribute(value: ctypes.c_uint64) -> _DeviceAttr:
    return _DeviceAttr(0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, ctypes.addressof(value))
