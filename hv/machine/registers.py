"""An EntryState becomes vCPU registers: real mode, flat protected mode, or long mode with paging.

Sources: Intel SDM 3A, 9.1 (reset state) and 3.4.5 (descriptor types); Documentation/arch/x86/boot.rst,
"64-bit BOOT PROTOCOL"; the PVH boot ABI (xen/docs/misc/pvh.pandoc); Multiboot 0.6.96, 3.2.
"""

from __future__ import annotations

__all__ = ["apply_entry"]

from hv.boot.entry import LONG64, PROT32, REAL16
from hv.memory.layout import BOOT_GDT, PAGE_TABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.boot.entry import EntryState
    from hv.kvm.abi_x86 import Segment, Sregs
    from hv.kvm.vcpu import VcpuFd

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1        # bit 1 always reads 1

CODE_SELECTOR = 0x10            # __BOOT_CS, entry 2 (boot.rst)
DATA_SELECTOR = 0x18            # __BOOT_DS, entry 3
TSS_SELECTOR = 0x20

TYPE_CODE = 0xB                 # execute, read, accessed
TYPE_DATA = 0x3                 # read, write, accessed
TYPE_TSS32_BUSY = 0xB


def apply_entry(vcpu: VcpuFd, entry: EntryState) -> None:
    """Set the boot processor's registers for `entry`."""
    sregs = vcpu.get_sregs()
    if entry.mode == REAL16:
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.selector = 0, 0
        sregs.cs.base, sregs.cs.selector = entry.cs_base, entry.cs_base >> 4
    elif entry.mode == PROT32:
        _flat_segments(sregs, long_mode=False)
        sregs.cr0 = CR0_PE | CR0_ET
    elif entry.mode == LONG64:
        _flat_segments(sregs, long_mode=True)
        sregs.cr3 = PAGE_TABLES
        sregs.cr4 = CR4_PAE
        sregs.efer = EFER_LME | EFER_LMA
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG
    else:
        raise AssertionError(entry.mode)
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    for name in ("rip", "rsp", "rax", "rbx", "rsi", "rdi"):
        setattr(regs, name, getattr(entry, name))
    regs.rflags = RFLAGS_RESERVED
    vcpu.set_regs(regs)


def _flat_segments(sregs: Sregs, *, long_mode: bool) -> None:
    _flat(sregs.cs, CODE_SELECTOR, TYPE_CODE)
    sregs.cs.l, sregs.cs.db = int(long_mode), int(not long_mode)
    for name in ("ds", "es", "fs", "gs", "ss"):
        _flat(getattr(sregs, name), DATA_SELECTOR, TYPE_DATA)
    tr = sregs.tr
    tr.base, tr.limit, tr.selector, tr.type, tr.present, tr.s = 0, 0x67, TSS_SELECTOR, TYPE_TSS32_BUSY, 1, 0
    sregs.gdt.base, sregs.gdt.limit = BOOT_GDT, 5 * 8 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0


def _flat(segment: Segment, selector: int, kind: int) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFFFFFF, selector, kind
    segment.present, segment.dpl, segment.s, segment.g, segment.db = 1, 0, 1, 1, 1
    segment.l = segment.unusable = 0
