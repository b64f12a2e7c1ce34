"""`--trace`: one readable line per event, with the instruction and, given symbols, the function.

    exits   every exit but the ones below, by reason
    io      port accesses      mmio  memory accesses outside RAM      msr  RDMSR and WRMSR
    insn    every instruction, by single-stepping

KVM reports no MSR access by itself: `msr` denies all of them in an MSR filter and carries each out for the guest
(api.rst, 4.97 KVM_X86_SET_MSR_FILTER); the x2APIC's can't be filtered. `insn` sees ring 0 only where KVM runs ring 3
natively without reporting steps (docs/software-kvm.md). Driven by tests/kvm/test_cli.py.
"""

from __future__ import annotations

__all__ = ["KINDS", "Tracer"]

from time import perf_counter_ns

from hv.debug.disasm import Disassembler, bits_of, code_at
from hv.errors import ConfigError
from hv.kvm import const
from hv.kvm.const import (
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_EXIT_DEBUG,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
)
from hv.kvm.run import (
    IO_COUNT,
    IO_DATA_OFFSET,
    IO_DIRECTION,
    IO_PORT,
    IO_SIZE,
    MMIO_ADDR,
    MMIO_DATA,
    MMIO_IS_WRITE,
    MMIO_LEN,
    MSR_DATA,
    MSR_ERROR,
    MSR_INDEX,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.debug.symbols import Symbols
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

KINDS = ("exits", "io", "mmio", "msr", "insn")
MSR_EXIT_FILTER = 1 << 2            # KVM_MSR_EXIT_REASON_FILTER
_MSR_RANGES = ((0, 0x2000), (0xC0000000, 0x2000), (0x40000000, 0x200), (0x4B564D00, 0x20))
_OPERAND_SIZE = b"\x66"
_OUT_DX, _OUT_IMM = b"\xee\xef\x6e\x6f", b"\xe6\xe7"    # OUT DX, OUTS; OUT imm8 (SDM 2B, OUT)


def exit_name(reason: int) -> str:
    """`KVM_EXIT_HLT` for 5; "exit 99" for one without a name."""
    for name, value in vars(const).items():
        if value == reason and name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_"):
            return name
    return f"exit {reason}"


class Tracer:
    """Attach one to a machine before it starts; `out(line)` is called in vCPU threads."""

    def __init__(self, machine: Machine, kinds: str, out: Callable[[str], None], symbols: Symbols) -> None:
        wanted = [kind for kind in kinds.split(",") if kind]
        unknown = [kind for kind in wanted if kind not in KINDS]
        if unknown or not wanted:
            raise ConfigError(f"--trace {kinds}: {unknown[0] if unknown else 'nothing'} is not traceable",
                              f"choose from {', '.join(KINDS)}")
        self._machine = machine
        self._out = out
        self._symbols = symbols
        self._disassembler = Disassembler()
        self._start = perf_counter_ns()
        self._kinds = set(wanted)
        machine.observers.append(self._see)
        if "msr" in self._kinds:
            self._trace_msrs()
        if "insn" in self._kinds:
            machine.exit_handlers[KVM_EXIT_DEBUG] = self._step
            for vcpu in machine.vcpus:
                vcpu.fd.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)

    def _see(self, vcpu: Vcpu, reason: int) -> None:
        kinds = self._kinds
        if reason == KVM_EXIT_IO:
            if "io" in kinds:
                self._port(vcpu)
        elif reason == KVM_EXIT_MMIO:
            if "mmio" in kinds:
                self._mmio(vcpu)
        elif "exits" in kinds and not (reason == KVM_EXIT_DEBUG and "insn" in kinds):
            self._line(vcpu, exit_name(reason)[len("KVM_EXIT_"):].lower(), self._where(vcpu))

    def _port(self, vcpu: Vcpu) -> None:
        view = vcpu.fd
        u8 = view.run_u8
        size, count, start = u8[IO_SIZE], view.run_u32[IO_COUNT // 4], view.run_u64[IO_DATA_OFFSET // 8]
        values = [int.from_bytes(u8[at:at + size], "little") for at in range(start, start + size * min(count, 4), size)]
        shown = " ".join(f"{value:#0{2 * size + 2}x}" for value in values) + (" ..." if count > 4 else "")
        arrow = "<-" if u8[IO_DIRECTION] else "->"
        self._line(vcpu, "io", f"port {view.run_u16[IO_PORT // 2]:#06x} {arrow} {shown}  "
                   + self._where(vcpu, out_size=size if u8[IO_DIRECTION] else 0))

    def _mmio(self, vcpu: Vcpu) -> None:
        view = vcpu.fd
        size = view.run_u32[MMIO_LEN // 4]
        value = int.from_bytes(view.run_u8[MMIO_DATA:MMIO_DATA + size], "little")
        arrow = "<-" if view.run_u8[MMIO_IS_WRITE] else "->"
        self._line(vcpu, "mmio", f"gpa {view.run_u64[MMIO_ADDR // 8]:#x} {arrow} {value:#0{2 * size + 2}x}  "
                   + self._where(vcpu))

    def _step(self, vcpu: Vcpu) -> bool:
        self._line(vcpu, "insn", self._where(vcpu))
        return True

    def _where(self, vcpu: Vcpu, out_size: int = 0) -> str:
        """`rip=... function+0x1: instruction`. KVM has already gone past an OUT (of `out_size` bytes) by then."""
        regs, sregs = vcpu.fd.get_regs(), vcpu.fd.get_sregs()
        bits = bits_of(sregs)
        rip = regs.rip
        linear = rip if bits == 64 else sregs.cs.base + rip & 0xFFFFFFFF
        if out_size:
            before = code_at(vcpu, linear - 3, 3)
            back = 1 if before[2:] and before[2:] in _OUT_DX else 2 if before[1:] and before[1:2] in _OUT_IMM else 0
            # not the size that the mode gives it: there is a prefix
            if back and out_size == (4 if bits == 16 else 2) and before[2 - back:3 - back] == _OPERAND_SIZE:
                back += 1
            rip, linear = rip - back, linear - back
        text = self._disassembler.text(code_at(vcpu, linear), bits, linear)
        name = self._symbols.name(linear)
        return f"rip={rip:#x} {name + ': ' if name else ''}{text}"

    def _line(self, vcpu: Vcpu, kind: str, text: str) -> None:
        self._out(f"{(perf_counter_ns() - self._start) / 1e9:10.6f} cpu{vcpu.index} {kind:<5} {text}")

    # MSRs -----------------------------------------------------------------------------------------

    def _trace_msrs(self) -> None:
        machine = self._machine
        self._helped = {reason: machine.exit_handlers.get(reason)
                        for reason in (KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR)}
        machine.vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, MSR_EXIT_FILTER)
        machine.vm.set_msr_filter([(3, base, count, bytes(count // 8)) for base, count in _MSR_RANGES])
        machine.exit_handlers[KVM_EXIT_X86_RDMSR] = self._rdmsr
        machine.exit_handlers[KVM_EXIT_X86_WRMSR] = self._wrmsr

    def _rdmsr(self, vcpu: Vcpu) -> bool:
        view, index = vcpu.fd, vcpu.fd.run_u32[MSR_INDEX // 4]
        helper = self._helped[KVM_EXIT_X86_RDMSR]
        if helper is None or not helper(vcpu):
            value = view.get_msrs([index]).get(index)
            view.run_u8[MSR_ERROR] = int(value is None)
            view.run_u64[MSR_DATA // 8] = value or 0
        shown = "#GP" if view.run_u8[MSR_ERROR] else f"{view.run_u64[MSR_DATA // 8]:#x}"
        self._line(vcpu, "msr", f"{index:#x} -> {shown}  " + self._where(vcpu))
        return True

    def _wrmsr(self, vcpu: Vcpu) -> bool:
        view, index = vcpu.fd, vcpu.fd.run_u32[MSR_INDEX // 4]
        value = view.run_u64[MSR_DATA // 8]
        self._line(vcpu, "msr", f"{index:#x} <- {value:#x}  " + self._where(vcpu))
        helper = self._helped[KVM_EXIT_X86_WRMSR]
        if helper is None or not helper(vcpu):
            view.run_u8[MSR_ERROR] = int(bool(view.set_msrs({index: value})))
        return True
