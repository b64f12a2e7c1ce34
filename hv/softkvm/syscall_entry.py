"""System calls from a ring 3 that runs natively while ring 0 is emulated.

There SYSCALL arrives at LSTAR with CS and SS still those of ring 3, so the guest's entry code faults. pyhv keeps the
guest's LSTAR to itself and gives the processor the address of a stub instead, in a page that the guest's own page
tables now show at an unused address, executable from ring 3. The stub stores to a page with nothing behind it: one
exit, on which CS, SS and RIP become what the guest asked for. SYSRET and IRET need no help.

    ring 3: syscall --> stub (ring 3): mov %al, doorbell --> KVM_EXIT_MMIO --> ring 0 at the guest's entry point

Left out: SYSCALL from 32-bit code (CSTAR) and SYSENTER. Driven by tests/kvm/test_softkvm.py.
"""

from __future__ import annotations

__all__ = ["SyscallEntry"]

from hv.kvm.run import MSR_DATA, MSR_ERROR, MSR_INDEX
from hv.memory.layout import PAGE_SIZE, SOFTKVM_DOORBELL, SOFTKVM_PAGES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_x86 import Segment, Sregs
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

MSR_STAR, MSR_LSTAR = 0xC0000081, 0xC0000082
CR4_LA57 = 1 << 12
PRESENT, WRITE, USER, LARGE = 1, 2, 4, 1 << 7
ADDRESS = 0x000FFFFFFFFFF000
MASK64 = 0xFFFFFFFFFFFFFFFF

# The last 2 MiB of the address space: Linux leaves them unused, below a level-2 table that all processes share
# (Documentation/x86/x86_64/mm.rst, "2 MB unused hole").
WINDOW = 0xFFFFFFFFFFE00000
STUB_PAGE, TABLE_PAGE = SOFTKVM_PAGES, SOFTKVM_PAGES + PAGE_SIZE
SPARE_PAGES = (SOFTKVM_PAGES + 2 * PAGE_SIZE, SOFTKVM_PAGES + 3 * PAGE_SIZE)    # levels 2, 3 where there are none
# mov %al, doorbell(%rip); 1: jmp 1b - the doorbell is the page after the stub
STUB = b"\x88\x05" + (PAGE_SIZE - 6).to_bytes(4, "little") + b"\xeb\xfe"

TYPE_CODE, TYPE_DATA = 0xB, 0x3


class SyscallEntry:
    """One per machine. `star` and `lstar` per vCPU are what the guest wrote."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._star: dict[int, int] = {}
        self._lstar: dict[int, int] = {}

    def state(self) -> dict[str, object]:
        """The two MSRs of every vCPU."""
        return {"star": dict(self._star), "lstar": dict(self._lstar)}

    def load(self, state: dict[str, object]) -> None:
        """Take them over; the stub and its mapping are in guest memory already."""
        for name, into in (("star", self._star), ("lstar", self._lstar)):
            values: dict[object, object] = state[name]  # type: ignore[assignment]
            into.update({int(index): int(value) & MASK64  # type: ignore[call-overload]
                         for index, value in values.items()})

    # MSR accesses ---------------------------------------------------------------------------------

    def rdmsr(self, vcpu: Vcpu) -> bool:
        """Show the guest its own value."""
        view, index = vcpu.fd, vcpu.fd.run_u32[MSR_INDEX // 4]
        table = {MSR_STAR: self._star, MSR_LSTAR: self._lstar}.get(index)
        if table is None:
            return False
        view.run_u64[MSR_DATA // 8] = table.get(vcpu.index, 0)
        view.run_u8[MSR_ERROR] = 0
        return True

    def wrmsr(self, vcpu: Vcpu, *, stub: bool) -> bool:
        """Remember the guest's value; the processor gets STAR as it is and the stub, if wanted, for LSTAR."""
        view, index = vcpu.fd, vcpu.fd.run_u32[MSR_INDEX // 4]
        value = view.run_u64[MSR_DATA // 8]
        if index == MSR_STAR:
            self._star[vcpu.index] = value
        elif index == MSR_LSTAR:
            # A non-canonical address is #GP, as on the processor (SDM 2B, WRMSR).
            if value >> 47 not in (0, 0x1FFFF) and not view.get_sregs().cr4 & CR4_LA57:
                view.run_u8[MSR_ERROR] = 1
                return True
            self._lstar[vcpu.index] = value
            if stub and self._map_stub(view.get_sregs()):
                value = WINDOW
        else:
            return False
        view.run_u8[MSR_ERROR] = int(bool(view.set_msrs({index: value})))
        return True

    # the system call ------------------------------------------------------------------------------

    def enter(self, vcpu: Vcpu) -> None:
        """The stub rang: RCX, R11 and RFLAGS are as SYSCALL leaves them, CS, SS and RIP are still to do."""
        view = vcpu.fd
        sregs = view.get_sregs()
        selector = self._star.get(vcpu.index, 0) >> 32 & 0xFFFC        # SDM 2B, SYSCALL
        if sregs.cs.dpl != 3:
            return      # the guest rang the bell itself, for nothing
        _flat(sregs.cs, selector, TYPE_CODE, long=1)
        _flat(sregs.ss, selector + 8, TYPE_DATA, long=0)
        view.set_sregs(sregs)
        regs = view.get_regs()
        regs.rip = self._lstar.get(vcpu.index, 0)
        view.set_regs(regs)

    # the stub -------------------------------------------------------------------------------------

    def _map_stub(self, sregs: Sregs) -> bool:
        """Show the stub and the doorbell at WINDOW in the page tables in use. False where that place is taken."""
        memory = self._machine.memory
        memory.write(STUB_PAGE, STUB)
        memory.put64(TABLE_PAGE, STUB_PAGE | PRESENT | USER)
        memory.put64(TABLE_PAGE + 8, SOFTKVM_DOORBELL | PRESENT | USER | WRITE)
        table = sregs.cr3 & ADDRESS
        spare = list(SPARE_PAGES)
        for level in range(5 if sregs.cr4 & CR4_LA57 else 4, 2, -1):
            at = table + 511 * 8
            if not memory.contains(at, 8):
                return False
            entry = memory.u64(at)
            if not entry & PRESENT:
                if not spare:
                    return False
                entry = spare.pop()
            elif entry & LARGE and level == 3:
                return False
            memory.put64(at, entry | PRESENT | WRITE | USER)
            table = entry & ADDRESS
        at = table + 511 * 8
        if not memory.contains(at, 8) or (memory.u64(at) & PRESENT and memory.u64(at) & ADDRESS != TABLE_PAGE):
            return False
        memory.put64(at, TABLE_PAGE | PRESENT | WRITE | USER)
        return True


def _flat(segment: Segment, selector: int, kind: int, long: int) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFFFFFF, selector, kind
    segment.present, segment.dpl, segment.s, segment.g, segment.l = 1, 0, 1, 1, long
    segment.db = 1 - long
    segment.unusable = 0
