"""One instruction through Unicorn, on the guest's own memory and page tables.

Guest RAM is mapped into Unicorn where it is, and Unicorn's MMU gets the guest's CR0, CR3, CR4 and EFER, so that
translation, permissions and accessed bits come out as on a processor. Unicorn 2.1 knows SSE up to 4.2, BMI and AES but
no AVX, and does not set the sticky exception flags of MXCSR. Driven by tests/kvm/test_softkvm.py.
"""

from __future__ import annotations

__all__ = ["Emulator"]

from typing import Any

import unicorn as _unicorn
from unicorn import x86_const as x86

from hv.softkvm.complete import uses_sse
from hv.softkvm.paging import FAULT_WRITE, PageFault, tables, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory
    from hv.softkvm.complete import Context

unicorn: Any = _unicorn         # it has no usable type hints
MODES = {16: unicorn.UC_MODE_16, 32: unicorn.UC_MODE_32, 64: unicorn.UC_MODE_64}
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
           "rip", "rflags")
GENERAL_64 = tuple(getattr(x86, f"UC_X86_REG_{name.upper()}") for name in GENERAL)
GENERAL_32 = (*(getattr(x86, f"UC_X86_REG_E{name[1:].upper()}") for name in GENERAL[:8]),
              x86.UC_X86_REG_EIP, x86.UC_X86_REG_EFLAGS)
NAMES_32 = (*GENERAL[:8], "rip", "rflags")
XMM = tuple(getattr(x86, f"UC_X86_REG_XMM{index}") for index in range(16))
MSR_EFER = 0xC0000080
EFER_LMA, EFER_LME = 1 << 10, 1 << 8
CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 9, 1 << 10
CR0_EM, CR0_TS = 1 << 2, 1 << 3
DIVIDE_ERROR, PAGE_FAULT, INVALID_OPCODE = 0, 14, 6
_RF = 1 << 16
# in the XSAVE area (SDM 1, 13.4)
MXCSR_AT, XMM_AT, XSTATE_BV_AT, XSTATE_SSE = 24, 160, 512, 2
RUN_BYTES = 256
NOTED = unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE
NOWHERE = 0xFFFFFFFFFFFFFFFF     # Unicorn stops after the count, or here


class Emulator:
    """One per vCPU."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._engines: dict[int, Any] = {}
        self._vector: int | None = None

    def step(self, context: Context, run: tuple[str, ...]) -> int:
        """Run the instruction of `context`, and the rest of `run` where that goes well; how many were done.

        0 where Unicorn does not know the instruction. A page fault is raised as PageFault; other exceptions are
        delivered to the guest.
        """
        bits, regs, sregs, view = context.bits, context.regs, context.sregs, context.vcpu.fd
        engine = self._engines.get(bits) or self._make(bits)
        area: Any = None
        if uses_sse(context.insn):
            area = view.get("XSAVE")        # KVM_SET_FPU would leave MXCSR out
        self._enter(engine, context)
        ids, names = (GENERAL_64, GENERAL) if bits == 64 else (GENERAL_32, NAMES_32)
        self._load(engine, context, area)
        linear = regs.rip if bits == 64 else sregs.cs.base + regs.rip & 0xFFFFFFFF
        self._vector = None
        count = len(run)
        noting = engine.hook_add(NOTED, self._note, context) if self._memory.dirty is not None else 0
        try:
            engine.ctl_remove_cache(linear, linear + RUN_BYTES)
            engine.emu_start(linear, NOWHERE, count=count)
        except unicorn.UcError:
            if count > 1:
                return self.step(context, run[:1])
            if self._vector is None:
                return 0
        finally:
            if noting:
                engine.hook_del(noting)
        if self._vector is not None:
            return self.step(context, run[:1]) if count > 1 else self._exception(engine, context)
        for register, name in zip(ids, names, strict=True):
            setattr(regs, name, engine.reg_read(register))
        if count == 1:
            regs.rip = context.next_rip
        regs.rflags &= ~_RF
        if area is not None:
            raw = memoryview(area).cast("B")
            for index, register in enumerate(XMM):
                raw[XMM_AT + 16 * index:XMM_AT + 16 * index + 16] = engine.reg_read(register).to_bytes(16, "little")
            raw[MXCSR_AT:MXCSR_AT + 4] = engine.reg_read(x86.UC_X86_REG_MXCSR).to_bytes(4, "little")
            raw[XSTATE_BV_AT] |= XSTATE_SSE
            view.set("XSAVE", area)
        view.set_regs(regs)
        return count

    def _load(self, engine: Any, context: Context, area: Any) -> None:
        """The guest's registers into Unicorn's."""
        ids, names = (GENERAL_64, GENERAL) if context.bits == 64 else (GENERAL_32, NAMES_32)
        for register, name in zip(ids, names, strict=True):
            engine.reg_write(register, getattr(context.regs, name))
        if area is not None:
            raw = memoryview(area).cast("B")
            for index, register in enumerate(XMM):
                engine.reg_write(register, int.from_bytes(raw[XMM_AT + 16 * index:XMM_AT + 16 * index + 16], "little"))
            engine.reg_write(x86.UC_X86_REG_MXCSR, int.from_bytes(raw[MXCSR_AT:MXCSR_AT + 4], "little"))

    def _make(self, bits: int) -> Any:
        engine = unicorn.Uc(unicorn.UC_ARCH_X86, MODES[bits])
        engine.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC_ROME)
        for region in self._memory.regions:
            host = self._memory.host_address(region.gpa, region.size)
            engine.mem_map_ptr(region.gpa, region.size, unicorn.UC_PROT_ALL, host)
        engine.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        self._engines[bits] = engine
        return engine

    def _enter(self, engine: Any, context: Context) -> None:
        """The processor's mode. Without paging Unicorn takes linear addresses for physical ones, as is right."""
        sregs = context.sregs
        if context.bits == 16 and not sregs.cr0 & 1:
            for name in ("cs", "ds", "es", "ss", "fs", "gs"):
                engine.reg_write(getattr(x86, f"UC_X86_REG_{name.upper()}"), getattr(sregs, name).selector)
            return
        engine.reg_write(x86.UC_X86_REG_CR4, sregs.cr4 & ~(1 << 18 | 1 << 20 | 1 << 21) | CR4_OSFXSR | CR4_OSXMMEXCPT)
        if context.bits == 64:
            engine.reg_write(x86.UC_X86_REG_MSR, (MSR_EFER, sregs.efer))
            engine.reg_write(x86.UC_X86_REG_FS_BASE, sregs.fs.base)
            engine.reg_write(x86.UC_X86_REG_GS_BASE, sregs.gs.base)
        engine.reg_write(x86.UC_X86_REG_CR0, sregs.cr0 & ~(CR0_EM | CR0_TS))
        engine.reg_write(x86.UC_X86_REG_CR3, sregs.cr3)     # also drops all translations it kept

    def _note(self, engine: Any, access: int, address: int, size: int, value: int, context: Context) -> None:
        """An access, with somebody tracking what changes: the bytes, and the page tables' accessed and dirty bits.

        `address` is linear.
        """
        memory, sregs, dirty = self._memory, context.sregs, self._memory.dirty
        if dirty is None:
            return
        for linear in (address, address + size - 1, context.regs.rip):
            for table in tables(memory, sregs, linear):
                dirty.mark(table, 8)
        if access == unicorn.UC_MEM_WRITE:
            for linear in (address, address + size - 1):
                try:
                    gpa = walk(memory, sregs, linear)
                except PageFault:
                    continue
                dirty.mark(gpa, 1)

    def _interrupt(self, engine: Any, vector: int, _: object) -> None:
        self._vector = vector
        engine.emu_stop()

    def _exception(self, engine: Any, context: Context) -> int:
        vector = self._vector
        if vector == PAGE_FAULT:
            address = engine.reg_read(x86.UC_X86_REG_CR2)
            # Which access it was Unicorn does not say: a page that can be read must have refused a write.
            walk(self._memory, context.sregs, address)
            walk(self._memory, context.sregs, address, write=True)
            raise PageFault(address, FAULT_WRITE)
        if vector == INVALID_OPCODE:
            return 0
        context.vcpu.fd.set_regs(context.regs)
        context.inject(vector or 0)
        return int(vector == DIVIDE_ERROR)
