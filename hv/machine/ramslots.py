"""Memory slots over the part of guest RAM that is in use, for a KVM where a slot costs by its size.

A KVM that shadows page tables keeps ten bytes for each page of a slot, touched or not (arch/x86/kvm/x86.c,
kvm_alloc_memslot_metadata: reverse maps, write tracking): 656 KiB for 256 MiB, more than all the rest of an idle clone.
So a restored machine gets slots over what had ever been touched when it was saved. All else of its RAM is zeros that
nobody has seen; whoever touches it first makes the slot, before he does:

    a processor         its access leaves the guest as one to a device would (MmioBus.ram) and is done on RAM
    a device, pyhv      GuestMemory.first_use

KVM makes an exit of what its emulator can. In ring 3, which runs on the processor itself, it may know the instruction
as little as it can fetch one from there: hv/softkvm/helper.py backs all of RAM then, and has the guest try again. A
page table there is none to KVM: the page fault that the guest gets is the one that a page of zeros would have meant.

Some accesses KVM neither makes an exit of nor has a fault for: FXSAVE, descriptor tables and their registers
(emulate.c, segmented_write_std, linear_read_system) are lost, or tried for ever. Linux writes to a page with plain
stores before it uses it so, and snapshots of other guests name no untouched RAM (hv/snapshot/memory.py, used_runs).

Each slot that is added later takes in twice as much RAM as the one before: adding one can wait for the kernel's readers
(SRCU: see builder.py). Driven by tests/kvm/test_ramslots.py.
"""

from __future__ import annotations

__all__ = ["RamSlots"]

from _thread import allocate_lock

from hv.memory.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from hv.kvm.vm import VmFd
    from hv.memory.guest import GuestMemory

GRANULE = 2 << 20           # slots begin and end at multiples of it: what one page of a page table maps
FIRST_MORE = 8 << 20        # what the first slot that is added later covers, aligned


class RamSlots:
    """`used`: where RAM was ever touched, as (first, end) in bytes of the ranges one behind the other, in order.

    `rows` has the slots there are: (slot, number of its first page, gpa, bytes, address in this process).
    """

    def __init__(self, vm: VmFd, memory: GuestMemory, used: Sequence[tuple[int, int]]) -> None:
        self.rows: list[tuple[int, int, int, int, int]] = []
        self._vm, self._memory = vm, memory
        self._more = FIRST_MORE
        self._lock = allocate_lock()
        holes = []
        start = 0
        for region in memory.regions:
            at = 0                      # up to here the range has slots, or is known to have none
            for first, end in used:
                low = max(at, (first - start) // GRANULE * GRANULE)
                high = min(region.size, -((start - end) // GRANULE) * GRANULE)
                if low < high:
                    if at < low:
                        holes.append((region.gpa + at, region.gpa + low))
                    self._add(region.gpa + low, region.gpa + high)
                    at = high
            if at < region.size:
                holes.append((region.gpa + at, region.gpa + region.size))
            start += region.size
        self._holes = tuple(holes)      # (first, end), in guest-physical addresses
        if holes:
            memory.first_use = self.back

    @property
    def partial(self) -> bool:
        """Whether any RAM is without a slot."""
        return bool(self._holes)

    def back(self, gpa: int, length: int) -> None:
        """See to it that [gpa, gpa+length) has slots as far as it is RAM, and some of what lies around it."""
        end = gpa + length
        if not any(gpa < high and low < end for low, high in self._holes):
            return
        with self._lock:
            holes: list[tuple[int, int]] = []
            for low, high in self._holes:
                if gpa < high and low < end:
                    first = max(low, gpa // self._more * self._more)
                    last = min(high, -(-end // self._more) * self._more)
                    self._add(first, last)
                    holes += [(a, b) for a, b in ((low, first), (last, high)) if a < b]
                else:
                    holes.append((low, high))
            if tuple(holes) != self._holes:
                self._more *= 2
            self._holes = tuple(holes)      # behind the slots: who sees no hole finds one
            if not holes:
                self._memory.first_use = None

    def back_all(self) -> None:
        """All RAM has slots from now on."""
        for region in self._memory.regions:
            self.back(region.gpa, region.size)

    def _add(self, first: int, end: int) -> None:
        """A slot for RAM at [first, end), which lies in one range."""
        number = 0
        for region in self._memory.regions:
            if region.gpa <= first < region.gpa + region.size:
                slot, at = len(self.rows), first - region.gpa
                self._vm.set_memory(slot, first, end - first, region.host + at)
                self.rows.append((slot, number + at // PAGE_SIZE, first, end - first, region.host + at))
            number += region.size // PAGE_SIZE
