"""System instructions that KVM's emulator gives up on, done by hand.

Each is a function of a Context: it changes registers or memory, advances RIP, and says whether it is done. Sources:
SDM 2A-2D, the entry of each instruction; SDM 1, chapter 13 for the XSAVE family.
"""

from __future__ import annotations

__all__ = ["INSTRUCTIONS", "advance", "effective_address", "get_register", "set_operand"]

import ctypes

from hv.softkvm.paging import copy_in, copy_out

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.softkvm.complete import Context

BREAKPOINT, GENERAL_PROTECTION, INVALID_OPCODE = 3, 13, 6
RFLAGS_AC = 1 << 18
MSR_TSC, MSR_TSC_AUX, MSR_KERNEL_GS_BASE = 0x10, 0xC0000103, 0xC0000102
CAPSTONE_REGISTER, CAPSTONE_MEMORY = 1, 3
MASK64 = 0xFFFFFFFFFFFFFFFF

# the XSAVE area (SDM 1, 13.4): legacy region, header, then components
LEGACY, HEADER, COMPONENTS = 512, 64, 576
XSTATE_X87, XSTATE_SSE = 1, 2
COMPACTED = 1 << 63


def advance(context: Context) -> bool:
    """Go on behind the instruction."""
    context.regs.rip = context.next_rip
    context.vcpu.fd.set_regs(context.regs)
    return True


def effective_address(context: Context) -> int:
    """The linear address of the memory operand."""
    insn, regs, sregs = context.insn, context.regs, context.sregs
    memory: Any = next(operand.mem for operand in insn.operands if operand.type == CAPSTONE_MEMORY)
    address: int = memory.disp
    for register, scale in ((memory.base, 1), (memory.index, memory.scale)):
        if register:
            name = insn.reg_name(register)
            address += (context.next_rip if name in ("rip", "eip") else get_register(regs, name)) * scale
    address &= (1 << 8 * insn.addr_size) - 1
    segment = insn.reg_name(memory.segment) if memory.segment else ""
    if context.bits == 64:
        base: int = getattr(sregs, segment).base if segment in ("fs", "gs") else 0
        return address + base & MASK64
    base = getattr(sregs, segment or "ds").base
    return address + base & 0xFFFFFFFF


def get_register(regs: object, name: str) -> int:
    """A general register by any of its 64-, 32- and 16-bit names."""
    if name.startswith("r") and name[1:].rstrip("dw").isdigit():
        wide, size = name.rstrip("dw"), {"d": 4, "w": 2}.get(name[-1], 8)
    elif name.startswith("r"):
        wide, size = name, 8
    elif name.startswith("e"):
        wide, size = "r" + name[1:], 4
    else:
        wide, size = "r" + name, 2
    value: int = getattr(regs, wide)
    return value & (1 << 8 * size) - 1


def set_operand(context: Context, index: int, value: int) -> None:
    """A register operand; a 32-bit result clears the upper half."""
    name = context.insn.reg_name(context.insn.operands[index].reg)
    wide = name.rstrip("d") if name[1:2].isdigit() else "r" + name[1:] if name.startswith("e") else name
    setattr(context.regs, wide, value & (MASK64 if context.insn.operands[index].size == 8 else 0xFFFFFFFF))


def _int3(context: Context) -> bool:
    advance(context)
    context.inject(BREAKPOINT)
    return True


def _clac(context: Context) -> bool:
    context.regs.rflags &= ~RFLAGS_AC
    return advance(context)


def _stac(context: Context) -> bool:
    context.regs.rflags |= RFLAGS_AC
    return advance(context)


def _swapgs(context: Context) -> bool:
    view, sregs = context.vcpu.fd, context.sregs
    kernel = view.get_msrs([MSR_KERNEL_GS_BASE])[MSR_KERNEL_GS_BASE]
    view.set_msrs({MSR_KERNEL_GS_BASE: sregs.gs.base})
    sregs.gs.base = kernel
    view.set_sregs(sregs)
    return advance(context)


def _rdtscp(context: Context) -> bool:
    values = context.vcpu.fd.get_msrs([MSR_TSC, MSR_TSC_AUX])
    context.regs.rax, context.regs.rdx = values[MSR_TSC] & 0xFFFFFFFF, values[MSR_TSC] >> 32
    context.regs.rcx = values.get(MSR_TSC_AUX, 0) & 0xFFFFFFFF
    return advance(context)


def _rdpid(context: Context) -> bool:
    set_operand(context, 0, context.vcpu.fd.get_msrs([MSR_TSC_AUX]).get(MSR_TSC_AUX, 0))
    return advance(context)


def _flush_tlb(context: Context) -> bool:
    """INVLPG and INVPCID: storing CR3 again drops all translations KVM keeps."""
    view, sregs = context.vcpu.fd, context.sregs
    cr3 = sregs.cr3
    sregs.cr3 = 0 if not sregs.cr0 >> 31 else cr3 ^ 8      # PWT: another value, the same tables
    view.set_sregs(sregs)
    sregs.cr3 = cr3
    view.set_sregs(sregs)
    return advance(context)


def _xgetbv(context: Context) -> bool:
    regs = context.regs
    if regs.rcx & 0xFFFFFFFF:
        return _fault(context)
    value = _xcr0(context)
    regs.rax, regs.rdx = value & 0xFFFFFFFF, value >> 32
    return advance(context)


def _xsetbv(context: Context) -> bool:
    from hv.errors import KernelError

    regs, view = context.regs, context.vcpu.fd
    xcrs = view.get("XCRS")
    xcrs.xcrs[0].value = regs.rdx << 32 & MASK64 | regs.rax & 0xFFFFFFFF  # type: ignore[attr-defined]
    if regs.rcx & 0xFFFFFFFF or context.sregs.cs.dpl:
        return _fault(context)
    try:
        view.set("XCRS", xcrs)
    except KernelError:
        return _fault(context)
    return advance(context)


def _fault(context: Context) -> bool:
    context.vcpu.fd.set_regs(context.regs)
    context.inject(GENERAL_PROTECTION, 0)
    return True


# the XSAVE family -------------------------------------------------------------------------------------


def _xcr0(context: Context) -> int:
    xcrs = context.vcpu.fd.get("XCRS")
    return int(xcrs.xcrs[0].value) if xcrs.nr_xcrs else 3  # type: ignore[attr-defined]


def _components(context: Context) -> dict[int, tuple[int, int, bool]]:
    """Component -> (offset in the standard format, size, whether the compacted format aligns it), CPUID leaf 0xD."""
    table = context.vcpu.fd.vm.kvm.supported_cpuid()
    found = {}
    for entry in table.entries[:table.nent]:
        if entry.function == 0xD and entry.index >= 2 and entry.eax and not entry.ecx & 1:
            found[int(entry.index)] = (int(entry.ebx), int(entry.eax), bool(entry.ecx & 2))
    return found


def _layout(context: Context, mask: int, compacted: bool) -> dict[int, tuple[int, int, int]]:
    """Component -> (offset in the guest's area, offset in KVM's standard area, size) for the components in `mask`."""
    rows, at = {}, COMPONENTS
    for index, (offset, size, aligned) in sorted(_components(context).items()):
        if not mask >> index & 1:
            continue
        if compacted:
            at = at + 63 & ~63 if aligned else at
            rows[index] = (at, offset, size)
            at += size
        else:
            rows[index] = (offset, offset, size)
    return rows


def _xsave(context: Context) -> bool:
    """XSAVE and XSAVEOPT: the standard format; nothing is optimised away."""
    return _save(context, compacted=False)


def _xsavec(context: Context) -> bool:
    """XSAVEC and XSAVES: the compacted format. There are no supervisor components (IA32_XSS is 0)."""
    return _save(context, compacted=True)


def _save(context: Context, compacted: bool) -> bool:
    regs, view, memory = context.regs, context.vcpu.fd, context.vcpu.machine.memory
    address = effective_address(context)
    if address & 63:
        return _fault(context)
    mask = (regs.rdx << 32 & MASK64 | regs.rax & 0xFFFFFFFF) & _xcr0(context)
    state = bytes(view.get("XSAVE"))  # type: ignore[call-overload]
    used = int.from_bytes(state[LEGACY:LEGACY + 8], "little")
    area = bytearray(copy_in(memory, context.sregs, address, COMPONENTS))
    if mask & XSTATE_X87:
        area[0:24], area[32:160] = state[0:24], state[32:160]
    if mask & XSTATE_SSE:
        area[160:416] = state[160:416]
    if mask & ~XSTATE_X87:
        area[24:32] = state[24:32]          # MXCSR and its mask
    header = (used | 3) & mask if not compacted else used & mask | mask & 3
    old = int.from_bytes(area[LEGACY:LEGACY + 8], "little")
    area[LEGACY:LEGACY + 8] = (header if compacted else old & ~mask | header).to_bytes(8, "little")
    if compacted:
        area[LEGACY + 8:LEGACY + 16] = (COMPACTED | mask).to_bytes(8, "little")
        area[LEGACY + 16:COMPONENTS] = bytes(HEADER - 16)
    for offset, source, size in _layout(context, mask, compacted).values():
        copy_out(memory, context.sregs, address + offset, state[source:source + size])
    copy_out(memory, context.sregs, address, bytes(area))
    return advance(context)


def _xrstor(context: Context) -> bool:
    """XRSTOR and XRSTORS, either format."""
    regs, view, memory = context.regs, context.vcpu.fd, context.vcpu.machine.memory
    address = effective_address(context)
    area = copy_in(memory, context.sregs, address, COMPONENTS)
    used, layout = (int.from_bytes(area[LEGACY + at:LEGACY + at + 8], "little") for at in (0, 8))
    xcr0 = _xcr0(context)
    compacted = bool(layout & COMPACTED)
    if address & 63 or used & ~xcr0 or (layout & ~COMPACTED & ~xcr0 if compacted else layout):
        return _fault(context)
    mask = (regs.rdx << 32 & MASK64 | regs.rax & 0xFFFFFFFF) & xcr0
    kept = view.get("XSAVE")
    state = bytearray(bytes(kept))  # type: ignore[call-overload]
    present = int.from_bytes(state[LEGACY:LEGACY + 8], "little") & ~mask | used & mask
    if mask & XSTATE_X87:
        state[0:24], state[32:160] = (area[0:24], area[32:160]) if used & 1 else (b"\x7f\x03" + bytes(22), bytes(128))
    if mask & XSTATE_SSE:
        state[160:416] = area[160:416] if used & 2 else bytes(256)
    if mask & ~XSTATE_X87:
        mxcsr = int.from_bytes(area[24:28], "little")
        if mxcsr & ~0xFFFF:
            return _fault(context)
        state[24:28] = area[24:28]
    for index, (offset, target, size) in _layout(context, (layout if compacted else MASK64) & mask, compacted).items():
        if used >> index & 1:
            state[target:target + size] = copy_in(memory, context.sregs, address + offset, size)
    state[LEGACY:LEGACY + 8] = present.to_bytes(8, "little")
    ctypes.memmove(ctypes.addressof(kept), bytes(state), len(state))  # type: ignore[arg-type]
    view.set("XSAVE", kept)
    return advance(context)


INSTRUCTIONS: dict[str, Callable[[Context], bool]] = {
    "int3": _int3, "clac": _clac, "stac": _stac, "swapgs": _swapgs, "rdtscp": _rdtscp, "rdpid": _rdpid,
    "invlpg": _flush_tlb, "invpcid": _flush_tlb, "xgetbv": _xgetbv, "xsetbv": _xsetbv,
    "xsave": _xsave, "xsave64": _xsave, "xsaveopt": _xsave, "xsaveopt64": _xsave,
    "xsavec": _xsavec, "xsavec64": _xsavec, "xsaves": _xsavec, "xsaves64": _xsavec,
    "xrstor": _xrstor, "xrstor64": _xrstor, "xrstors": _xrstor, "xrstors64": _xrstor,
    # Nothing to wait for, to order or to fetch ahead.
    **dict.fromkeys(("wait", "fwait", "lfence", "mfence", "sfence", "pause", "nop", "endbr32", "endbr64", "wbinvd",
                     "wbnoinvd", "clflush", "clflushopt", "clwb", "prefetch", "prefetchw", "prefetcht0", "prefetcht1",
                     "prefetcht2", "prefetchnta", "verw", "serialize"), advance),
}
