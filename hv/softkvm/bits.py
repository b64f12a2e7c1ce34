"""Bit instructions that Unicorn gets wrong: BZHI beyond the operand's width, BLSI's carry flag (SDM 2A)."""

from __future__ import annotations

__all__ = ["INSTRUCTIONS"]

from hv.softkvm.paging import copy_in
from hv.softkvm.system import advance, effective_address, get_register, set_operand

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.softkvm.complete import Context

CF, ZF, SF, OF = 1 << 0, 1 << 6, 1 << 7, 1 << 11
CAPSTONE_REGISTER = 1


def _source(context: Context, index: int) -> int:
    """A register or memory operand of 4 or 8 bytes."""
    operand = context.insn.operands[index]
    if operand.type == CAPSTONE_REGISTER:
        return get_register(context.regs, context.insn.reg_name(operand.reg))
    return int.from_bytes(copy_in(context.vcpu.machine.memory, context.sregs, effective_address(context),
                                  operand.size), "little")


def _finish(context: Context, result: int, carry: bool) -> bool:
    bits = 8 * context.insn.operands[0].size
    set_operand(context, 0, result)
    flags = (CF if carry else 0) | (0 if result else ZF) | (SF if result >> bits - 1 else 0)
    context.regs.rflags = context.regs.rflags & ~(CF | ZF | SF | OF) | flags
    return advance(context)


def _bzhi(context: Context) -> bool:
    bits, value, start = 8 * context.insn.operands[0].size, _source(context, 1), _source(context, 2) & 0xFF
    return _finish(context, value & (1 << start) - 1 if start < bits else value, carry=start >= bits)


def _blsi(context: Context) -> bool:
    value = _source(context, 1)
    return _finish(context, value & -value, carry=value != 0)


INSTRUCTIONS: dict[str, Callable[[Context], bool]] = {"bzhi": _bzhi, "blsi": _blsi}
