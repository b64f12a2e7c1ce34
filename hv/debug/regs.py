"""The registers of every vCPU as text."""

from __future__ import annotations

__all__ = ["describe", "format_registers"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_x86 import Regs, Sregs
    from hv.machine.machine import Machine

_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
            "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")


def describe(machine: Machine) -> str:
    """The registers of all vCPUs; a running machine is paused for the moment it takes."""
    was_paused = machine.pausing
    if not was_paused:
        machine.pause()
    try:
        return "\n".join(f"vCPU {vcpu.index}\n" + format_registers(vcpu.fd.get_regs(), vcpu.fd.get_sregs())
                         for vcpu in machine.vcpus)
    finally:
        if not was_paused:
            machine.resume()


def format_registers(regs: Regs, sregs: Sregs) -> str:
    """General registers four to a line, then control registers and segments."""
    general = [f"{name:>6} {getattr(regs, name):016x}" for name in _GENERAL]
    lines = ["  ".join(general[at:at + 4]) for at in range(0, len(general), 4)]
    control = [f"{name:>6} {getattr(sregs, name):016x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")]
    lines.append("  ".join(control))
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"):
        segment = getattr(sregs, name)
        lines.append(f"{name:>6} {segment.selector:04x} base {segment.base:016x} limit {segment.limit:08x} "
                     f"type {segment.type:x} dpl {segment.dpl}")
    return "\n".join(lines)
