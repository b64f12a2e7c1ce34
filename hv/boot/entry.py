"""Where and how a loaded guest starts: the state a loader hands to the vCPU."""

from __future__ import annotations

__all__ = ["LONG64", "PROT32", "REAL16", "EntryState"]

REAL16 = "real16"
PROT32 = "prot32"
LONG64 = "long64"


class EntryState:
    """Registers of the boot processor at its first instruction.

    `mode` is one of REAL16, PROT32 (flat segments, paging off) and LONG64 (identity-mapped
    first 4 GiB, paging on). `cs_base` counts in REAL16 only. All values are unsigned.
    """

    __slots__ = ("cs_base", "mode", "rax", "rbx", "rdi", "rip", "rsi", "rsp")

    def __init__(self, mode: str, rip: int, *, rsp: int = 0, rax: int = 0, rbx: int = 0,
                 rsi: int = 0, rdi: int = 0, cs_base: int = 0) -> None:
        self.mode = mode
        self.rip = rip
        self.rsp = rsp
        self.rax = rax
        self.rbx = rbx
        self.rsi = rsi
        self.rdi = rdi
        self.cs_base = cs_base

    def __repr__(self) -> str:
        return f"EntryState({self.mode}, rip={self.rip:#x})"
