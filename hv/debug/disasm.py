"""What instruction a vCPU stands at, by capstone. The only user of capstone besides softkvm."""

from __future__ import annotations

__all__ = ["Disassembler", "bits_of", "code_at"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.kvm.abi_x86 import Sregs
    from hv.machine.vcpu import Vcpu

LONGEST = 15            # bytes of the longest x86 instruction (SDM 2A, 2.3.11)
_CACHE = 4096


class Disassembler:
    """Text of single instructions; what was seen before is remembered."""

    def __init__(self) -> None:
        import capstone

        self._engines: dict[int, Any] = {
            bits: capstone.Cs(capstone.CS_ARCH_X86, mode)
            for bits, mode in ((16, capstone.CS_MODE_16), (32, capstone.CS_MODE_32), (64, capstone.CS_MODE_64))}
        self._seen: dict[tuple[int, int, bytes], str] = {}

    def text(self, code: bytes, bits: int, address: int) -> str:
        """The first instruction in `code` at linear `address`; "(bad)" where there is none."""
        key = (bits, address, code)
        text = self._seen.get(key)
        if text is None:
            if len(self._seen) > _CACHE:
                self._seen.clear()
            text = "(bad)"
            for _, _, mnemonic, operands in self._engines[bits].disasm_lite(code, address, 1):
                text = f"{mnemonic} {operands}".rstrip()
            self._seen[key] = text
        return text


def code_at(vcpu: Vcpu, linear: int, length: int = LONGEST) -> bytes:
    """Up to `length` bytes of guest code at `linear`, through the guest's page tables; fewer where unmapped.

    Only in the vCPU's own thread, or while it is not running.
    """
    memory, code = vcpu.machine.memory, b""
    while len(code) < length:
        at = linear + len(code) & 0xFFFFFFFFFFFFFFFF
        gpa = vcpu.fd.translate(at)
        size = min(length - len(code), 0x1000 - (at & 0xFFF))
        if gpa is None or not memory.contains(gpa, size):
            break
        code += memory.read(gpa, size)
    return code


def bits_of(sregs: Sregs) -> int:
    """16, 32 or 64: how the processor decodes instructions now."""
    return 64 if sregs.cs.l else 32 if sregs.cs.db else 16
