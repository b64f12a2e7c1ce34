"""x86 register structures of the vCPU ioctls (asm/kvm.h, uapi). Field names are the header's."""

from __future__ import annotations

__all__ = ["CPUID_MAX", "Cpuid2", "CpuidEntry2", "Dtable", "Regs", "Segment", "Sregs"]

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64

CPUID_MAX = 256     # KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h)


class Regs(Structure):
    """struct kvm_regs: general-purpose registers, RIP, RFLAGS."""

    _fields_ = [(name, c_uint64) for name in (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")]


class Segment(Structure):
    """struct kvm_segment: a segment register with its hidden part."""

    _fields_ = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8),
        ("present", c_uint8), ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8),
        ("g", c_uint8), ("avl", c_uint8), ("unusable", c_uint8), ("padding", c_uint8),
    ]


class Dtable(Structure):
    """struct kvm_dtable: GDTR or IDTR."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(Structure):
    """struct kvm_sregs: segments, control registers, EFER, APIC base."""

    _fields_ = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Dtable), ("idt", Dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class CpuidEntry2(Structure):
    """struct kvm_cpuid_entry2: one leaf, or one subleaf where `flags` bit 0 is set."""

    _fields_ = [*((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
                ("padding", c_uint32 * 3)]


class Cpuid2(Structure):
    """struct kvm_cpuid2 with room for every entry KVM takes."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry2 * CPUID_MAX)]
