"""Structures for reading and setting a processor's whole state (asm/kvm.h, uapi). abi_chips.py has the machine's."""

from __future__ import annotations

__all__ = [
    "DebugRegs", "Fpu", "LapicState", "MpState", "Sregs2", "Translation", "VcpuEvents", "Xcr", "Xcrs", "Xsave",
    "msr_list",
]

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64

from hv.kvm.abi_x86 import Dtable, Segment


class Fpu(Structure):
    """struct kvm_fpu: x87 and SSE registers in FXSAVE order."""

    _fields_ = [
        ("fpr", (c_uint8 * 16) * 8), ("fcw", c_uint16), ("fsw", c_uint16), ("ftwx", c_uint8), ("pad1", c_uint8),
        ("last_opcode", c_uint16), ("last_ip", c_uint64), ("last_dp", c_uint64), ("xmm", (c_uint8 * 16) * 16),
        ("mxcsr", c_uint32), ("pad2", c_uint32),
    ]


class Xsave(Structure):
    """struct kvm_xsave: the XSAVE area, 4 KiB (KVM_CAP_XSAVE2 says when it is larger)."""

    _fields_ = [("region", c_uint32 * 1024)]


class Xcr(Structure):
    """struct kvm_xcr."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(Structure):
    """struct kvm_xcrs."""

    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16)]


class LapicState(Structure):
    """struct kvm_lapic_state: the register page, 1 KiB."""

    _fields_ = [("regs", c_uint8 * 1024)]


class MpState(Structure):
    """struct kvm_mp_state."""

    _fields_ = [("mp_state", c_uint32)]


class DebugRegs(Structure):
    """struct kvm_debugregs."""

    _fields_ = [("db", c_uint64 * 4), ("dr6", c_uint64), ("dr7", c_uint64), ("flags", c_uint64),
                ("reserved", c_uint64 * 9)]


class _Exception(Structure):
    _fields_ = [("injected", c_uint8), ("nr", c_uint8), ("has_error_code", c_uint8), ("pending", c_uint8),
                ("error_code", c_uint32)]


class _Interrupt(Structure):
    _fields_ = [("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8)]


class _Nmi(Structure):
    _fields_ = [("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8)]


class _Smi(Structure):
    _fields_ = [("smm", c_uint8), ("pending", c_uint8), ("smm_inside_nmi", c_uint8), ("latched_init", c_uint8)]


class VcpuEvents(Structure):
    """struct kvm_vcpu_events: pending and injected exceptions, interrupts, NMI, SMI."""

    _fields_ = [
        ("exception", _Exception), ("interrupt", _Interrupt), ("nmi", _Nmi), ("sipi_vector", c_uint32),
        ("flags", c_uint32), ("smi", _Smi), ("triple_fault", c_uint8), ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8), ("exception_payload", c_uint64),
    ]


def msr_list(count: int) -> Structure:
    """A struct kvm_msr_list with room for `count` indices."""
    kind = type("MsrList", (Structure,), {"_fields_": [("nmsrs", c_uint32), ("indices", c_uint32 * count)]})
    made: Structure = kind()
    made.nmsrs = count
    return made


class Sregs2(Structure):
    """struct kvm_sregs2: sregs with PDPTRs in place of the interrupt bitmap."""

    _fields_ = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Dtable), ("idt", Dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "flags")),
        ("pdptrs", c_uint64 * 4),
    ]


class Translation(Structure):
    """struct kvm_translation."""

    _fields_ = [("linear_address", c_uint64), ("physical_address", c_uint64), ("valid", c_uint8),
                ("writeable", c_uint8), ("usermode", c_uint8), ("pad", c_uint8 * 5)]
