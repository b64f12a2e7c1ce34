"""The help a machine gets on a software KVM: it takes the exits that hardware KVM never makes.

    KVM_EXIT_INTERNAL_ERROR    an instruction that KVM's emulator gave up on: complete.py finishes it
    KVM_EXIT_X86_WRMSR/RDMSR   the guest sets or reads its system-call entry: syscall_entry.py
    a doorbell store           a system call from ring 3: syscall_entry.py

Only this file is loaded with the machine; the others when the first such exit comes.
"""

from __future__ import annotations

__all__ = ["SoftKvm"]

from hv.kvm.const import (
    KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
    KVM_INTERNAL_ERROR_EMULATION,
)
from hv.kvm.run import INTERNAL_SUBERROR
from hv.memory.layout import EBDA_START, SOFTKVM_DOORBELL, SOFTKVM_PAGES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_x86 import Cpuid2
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu
    from hv.softkvm.complete import Completer
    from hv.softkvm.syscall_entry import SyscallEntry

RING_3 = 3
MSR_EXIT_FILTER = 1 << 2        # KVM_MSR_EXIT_REASON_FILTER: denied accesses come to user space
FILTER_READ_WRITE = 3           # KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE
LEAF1_ECX_CX16 = 1 << 13
KVM_CPUID_FEATURES = 0x40000001
# KVM_FEATURE_PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD, MAP_GPA_RANGE (asm/kvm_para.h, uapi): all by hypercall.
BY_HYPERCALL = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16

# What Linux must be told here; docs/software-kvm.md gives the reason for each.
LINUX_CMDLINE = (b"noxsave clearcpuid=smap,smep,popcnt,erms,fsrm pti=off mitigations=off rodata=off retain_initrd "
                 b"clocksource=kvm-clock")


class SoftKvm:
    """One per machine. `counters` says what help was given: completed instructions by name, system calls."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.counters: dict[str, int] = {}
        self.reserved = [(SOFTKVM_PAGES, EBDA_START - SOFTKVM_PAGES)]
        self._completers: dict[int, Completer] = {}
        self._entry: SyscallEntry | None = None

    def cmdline(self) -> bytes:
        """Words for a Linux kernel's command line."""
        return LINUX_CMDLINE

    def told_linux(self) -> bool:
        """Whether the guest is a Linux that was told of it."""
        return LINUX_CMDLINE in self._machine.cmdline

    def summary(self, cmdline: bytes) -> str:
        """One line for the boot log."""
        words = LINUX_CMDLINE.decode()
        added = f"; added to the command line: {words}" if LINUX_CMDLINE in cmdline else ""
        return f"software KVM, guest ring 0 is emulated: instructions and system calls are helped along{added}"

    def attach(self) -> None:
        """Set the VM up so that the exits come, and take them. Before the interrupt controllers: see builder.py."""
        machine, vm = self._machine, self._machine.vm
        vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, MSR_EXIT_FILTER)
        # A bitmap of eight MSRs from 0xC0000080 in which a clear bit denies: STAR and LSTAR.
        vm.set_msr_filter([(FILTER_READ_WRITE, 0xC0000080, 8, b"\xf9")])
        machine.exit_handlers[KVM_EXIT_INTERNAL_ERROR] = self._emulation_failed
        machine.exit_handlers[KVM_EXIT_X86_WRMSR] = self._wrmsr
        machine.exit_handlers[KVM_EXIT_X86_RDMSR] = self._rdmsr
        machine.doorbells[SOFTKVM_DOORBELL] = self._system_call

    def detach(self) -> None:
        """Undo `attach`: this KVM needs no help after all."""
        machine = self._machine
        machine.vm.set_msr_filter([])
        for reason in (KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_X86_WRMSR, KVM_EXIT_X86_RDMSR):
            del machine.exit_handlers[reason]
        del machine.doorbells[SOFTKVM_DOORBELL]

    def adjust_cpuid(self, table: Cpuid2) -> None:
        """Hide CMPXCHG16B, which KVM's emulator lacks and Linux's allocator would use by the thousand, and hypercalls.

        KVM's emulator does not carry VMCALL out: it patches the instruction and expects the processor to run it, so
        that an emulated one is patched forever (arch/x86/kvm/emulate.c, em_hypercall). Most other features can't be
        hidden here: the guest sees the host's all the same.
        """
        for entry in table.entries[:table.nent]:
            if entry.function == 1:
                entry.ecx &= ~LEAF1_ECX_CX16
            elif entry.function == KVM_CPUID_FEATURES:
                entry.eax &= ~BY_HYPERCALL

    def count(self, what: str) -> None:
        """One more `what`."""
        self.counters[what] = self.counters.get(what, 0) + 1

    def state(self) -> dict[str, object]:
        """What a snapshot keeps."""
        return {"entry": self._syscall_entry().state()}

    def load(self, state: dict[str, object]) -> None:
        """Take it over."""
        self._syscall_entry().load(state["entry"])  # type: ignore[arg-type]

    def _emulation_failed(self, vcpu: Vcpu) -> bool:
        if vcpu.fd.run_u32[INTERNAL_SUBERROR // 4] != KVM_INTERNAL_ERROR_EMULATION:
            return False
        slots = self._machine.slots
        if slots is not None and slots.partial and vcpu.fd.get_sregs().ss.dpl == RING_3:
            slots.back_all()        # ring 3 needs no help where there is RAM: the instruction is run again
            return True
        completer = self._completers.get(vcpu.index)
        if completer is None:
            from hv.softkvm.complete import Completer

            completer = self._completers[vcpu.index] = Completer(vcpu, self.count)
        return completer.complete()

    def _wrmsr(self, vcpu: Vcpu) -> bool:
        return self._syscall_entry().wrmsr(vcpu, stub=self.is_needed())

    def _rdmsr(self, vcpu: Vcpu) -> bool:
        return self._syscall_entry().rdmsr(vcpu)

    def _system_call(self, vcpu: Vcpu) -> None:
        self.count("syscall")
        self._syscall_entry().enter(vcpu)

    def is_needed(self) -> bool:
        """Measured now, unless it was before: the machine may have been built on the processor's word alone."""
        if self._machine.config.softkvm == "on":
            return True
        from hv.softkvm.detect import is_software

        return is_software(self._machine.kvm)

    def _syscall_entry(self) -> SyscallEntry:
        if self._entry is None:
            from hv.softkvm.syscall_entry import SyscallEntry

            self._entry = SyscallEntry(self._machine)
        return self._entry
