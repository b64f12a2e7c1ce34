"""Finishing an instruction that KVM's emulator gave up on, and going on behind it.

System instructions are done by our own code (system.py); everything that only computes goes through Unicorn
(emulate.py). What neither knows ends the machine with a report, as without help. Driven by tests/kvm/test_softkvm.py,
which holds each instruction to what the real processor makes of it.
"""

from __future__ import annotations

__all__ = ["PLAIN", "Completer", "Context", "load_decoder", "plain", "uses_sse"]

from hv.kvm.run import EMULATION_FLAGS, EMULATION_INSN_BYTES, EMULATION_INSN_SIZE, INTERNAL_NDATA
from hv.softkvm.bits import INSTRUCTIONS as BITS
from hv.softkvm.paging import PageFault, copy_in
from hv.softkvm.system import CAPSTONE_MEMORY, CAPSTONE_REGISTER, INSTRUCTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.kvm.abi_x86 import Regs, Sregs
    from hv.machine.vcpu import Vcpu
    from hv.softkvm.emulate import Emulator

LONGEST = 15
HAS_BYTES = 1                   # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
PAGE_FAULT, INVALID_OPCODE = 14, 6
RFLAGS_RF_TF = 1 << 16
_CACHE = 4096
RUN_BYTES = 256                 # how far ahead to look for more of the same kind
RUN_LONGEST = 64
# Instructions without operands, in 64-bit mode (SDM 2). They need no decoder, whose loading takes 10 MiB and up to
# 90 ms: a Linux that goes on after a restore often meets FWAIT and nothing else.
PLAIN = {
    b"\x9b": "wait", b"\xcc": "int3", b"\x0f\x01\xca": "clac", b"\x0f\x01\xcb": "stac", b"\x0f\x01\xd0": "xgetbv",
    b"\x0f\x01\xd1": "xsetbv", b"\x0f\x01\xf8": "swapgs", b"\x0f\x01\xf9": "rdtscp", b"\x0f\x09": "wbinvd",
    b"\x0f\xae\xe8": "lfence", b"\x0f\xae\xf0": "mfence", b"\x0f\xae\xf8": "sfence",
}


class Context:
    """One instruction about to be completed: registers, mode, and the decoded instruction."""

    __slots__ = ("bits", "insn", "next_rip", "regs", "sregs", "vcpu")

    def __init__(self, vcpu: Vcpu, regs: Regs, sregs: Sregs, bits: int, insn: Any) -> None:
        self.vcpu = vcpu
        self.regs = regs
        self.sregs = sregs
        self.bits = bits
        self.insn = insn
        self.next_rip = regs.rip + insn.size

    def inject(self, vector: int, error_code: int | None = None) -> None:
        """Deliver an exception at the next entry. Set the registers first: that clears what is pending."""
        view = self.vcpu.fd
        events = view.get_events()
        exception = events.exception
        exception.injected, exception.pending, exception.nr = 1, 0, vector
        exception.has_error_code = int(error_code is not None)
        exception.error_code = error_code or 0
        view.set_events(events)


def load_decoder() -> None:
    """Now, for who forks processes that will use it: they share it then, instead of loading 10 MiB each."""
    import capstone

    capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


class Completer:
    """One per vCPU, used in its thread. `count(name)` is told of each completed instruction."""

    def __init__(self, vcpu: Vcpu, count: Callable[[str], None]) -> None:
        self._vcpu = vcpu
        self._count = count
        self._engines: dict[int, Any] = {}
        self._decoded: dict[tuple[int, bytes], Any] = {}
        self._runs: dict[bytes, tuple[str, ...]] = {}
        self._emulator: Emulator | None = None

    def complete(self) -> bool:
        """Complete the instruction at RIP, or deliver the fault it causes. False where we don't know it either."""
        view = self._vcpu.fd
        regs, sregs = view.get_regs(), view.get_sregs()
        bits = 64 if sregs.cs.l else 32 if sregs.cs.db else 16
        try:
            insn = self._decode(self._fetch(regs, sregs, bits), bits)
        except PageFault as fault:
            context = Context(self._vcpu, regs, sregs, bits, _NOTHING)
            return self._page_fault(context, fault)
        context = Context(self._vcpu, regs, sregs, bits, insn)
        handler = INSTRUCTIONS.get(insn.mnemonic) or BITS.get(insn.mnemonic)
        try:
            if handler is None:
                return self._emulate(context)
            done = handler(context)
        except PageFault as fault:
            return self._page_fault(context, fault)
        if done:
            self._count(insn.mnemonic)
        return done

    def _fetch(self, regs: Regs, sregs: Sregs, bits: int) -> bytes:
        """The instruction's bytes: KVM hands over what it fetched, not always all of it."""
        view = self._vcpu.fd
        linear = regs.rip if bits == 64 else sregs.cs.base + regs.rip & 0xFFFFFFFF
        length = LONGEST
        room = 0x1000 - (linear & 0xFFF)
        if room < LONGEST:      # the next page may not be there, and need not
            length = room
        try:
            code = copy_in(self._vcpu.machine.memory, sregs, linear, length)
            if length < LONGEST:
                try:
                    code += copy_in(self._vcpu.machine.memory, sregs, linear + length, LONGEST - length)
                except PageFault:
                    pass
            return code
        except PageFault:
            if view.run_u32[INTERNAL_NDATA // 4] >= 3 and view.run_u64[EMULATION_FLAGS // 8] & HAS_BYTES:
                size = min(view.run_u8[EMULATION_INSN_SIZE], LONGEST)
                return bytes(view.run_u8[EMULATION_INSN_BYTES:EMULATION_INSN_BYTES + size])
            raise

    def _decode(self, code: bytes, bits: int) -> Any:
        insn = self._decoded.get((bits, code))
        if insn is None:
            if len(self._decoded) > _CACHE:
                self._decoded.clear()
            insn = plain(code) if bits == 64 else None
            if insn is None:
                insn = next(self._engine(bits).disasm(code, 0, 1), _NOTHING)
            self._decoded[bits, code] = insn
        return insn

    def _engine(self, bits: int) -> Any:
        engine = self._engines.get(bits)
        if engine is None:
            import capstone

            modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
            engine = self._engines[bits] = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
            engine.detail = True
        return engine

    def _emulate(self, context: Context) -> bool:
        if self._emulator is None:
            from hv.softkvm.emulate import Emulator

            self._emulator = Emulator(self._vcpu.machine.memory)
        run = self._run(context)
        done = self._emulator.step(context, run)
        for name in run[:done]:
            self._count(name)
        return done > 0

    def _run(self, context: Context) -> tuple[str, ...]:
        """The instruction and those behind it that KVM would give up on as well, by name.

        Vector code comes in long runs, and what it costs is the way here. Only the first of a run may store: should
        one of them fault, the run is begun again without the others.
        """
        insn, bits = context.insn, context.bits
        if bits != 64 or not uses_sse(insn):
            return (insn.mnemonic,)
        rip = context.regs.rip
        try:
            code = copy_in(self._vcpu.machine.memory, context.sregs, rip, min(RUN_BYTES, 0x1000 - (rip & 0xFFF)))
        except PageFault:
            return (insn.mnemonic,)
        run = self._runs.get(code)
        if run is None:
            names: list[str] = []
            for following in self._engine(64).disasm(code, 0, RUN_LONGEST):
                if names and (not uses_sse(following) or following.mnemonic in INSTRUCTIONS
                              or following.operands[0].type == CAPSTONE_MEMORY):
                    break
                names.append(following.mnemonic)
            if len(self._runs) > _CACHE:
                self._runs.clear()
            run = self._runs[code] = tuple(names) or (insn.mnemonic,)
        return run

    def _page_fault(self, context: Context, fault: PageFault) -> bool:
        view = self._vcpu.fd
        context.sregs.cr2 = fault.address
        view.set_sregs(context.sregs)
        view.set_regs(context.regs)
        context.inject(PAGE_FAULT, fault.code)
        self._count("#PF")
        return True


def uses_sse(insn: Any) -> bool:
    """True where an operand is an XMM register, or the instruction touches them all the same."""
    return insn.mnemonic in ("ldmxcsr", "stmxcsr") or any(
        operand.type == CAPSTONE_REGISTER and "xmm" in insn.reg_name(operand.reg) for operand in insn.operands)


class Plain:
    """One of PLAIN, decoded."""

    __slots__ = ("mnemonic", "size")
    operands = ()

    def __init__(self, mnemonic: str, size: int) -> None:
        self.mnemonic, self.size = mnemonic, size


def plain(code: bytes) -> Plain | None:
    """The instruction without operands that `code` begins with, in 64-bit mode; None for any other."""
    for size in (1, 2, 3):
        name = PLAIN.get(code[:size])
        if name is not None:
            return Plain(name, size)
    return None


class _Nothing:
    mnemonic, size, operands, bytes = "(bad)", 0, (), b""


_NOTHING = _Nothing()
