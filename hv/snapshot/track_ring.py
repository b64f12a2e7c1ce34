"""Which pages of guest RAM changed, by KVM's dirty rings: as Tracker, but what it costs grows with the pages that
changed, not with the guest's RAM.

    vCPU writes a page for the first time -> an entry in its ring -> collected by take(), or by the vCPU's thread when
    the ring is full (KVM_EXIT_DIRTY_RING_FULL) -> KVM_RESET_DIRTY_RINGS protects the page again

Collected is before reset, and a page's content is read behind both: a write in between is in the content, one after it
makes an entry (Documentation/virt/kvm/api.rst, 8.29). Driven by tests/kvm/test_snapshot_ring.py.
"""

from __future__ import annotations

__all__ = ["RingTracker"]

from _thread import allocate_lock

from hv.kvm.const import KVM_EXIT_DIRTY_RING_FULL
from hv.machine.dirtyring import ENTRY
from hv.memory.dirty import PageSet
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.track import Tracker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu


class RingTracker(Tracker):
    """Tracks `machine`, whose configuration has a dirty ring. `full` counts how often a ring was."""

    def __init__(self, machine: Machine) -> None:
        self._lock = allocate_lock()
        self._collected = PageSet(machine.memory.regions)
        self._pages = []                # of each slot: (number of its first page, how many)
        number = 0
        for region in machine.memory.regions:
            self._pages.append((number, region.size // PAGE_SIZE))
            number += region.size // PAGE_SIZE
        self.full = 0
        super().__init__(machine)
        machine.exit_handlers[KVM_EXIT_DIRTY_RING_FULL] = self._ring_full
        self._collect()                 # what an earlier tracker has left in them
        self._collected.take()

    def _logged(self) -> PageSet:
        self._collect()
        logged = PageSet(self._machine.memory.regions)
        for first, end in self._collected.take().runs():
            logged.add_run(first, end)
        return logged

    def _collect(self) -> bool:
        machine = self._machine
        size = machine.config.dirty_ring * ENTRY
        with self._lock:
            found = False
            for vcpu in machine.vcpus:
                for slot, page in vcpu.fd.collect_dirty(size):
                    found = True
                    first, count = self._pages[slot & 0xFFFF]       # the upper half is the address space: SMM's is 1
                    if page < count:
                        self._collected.add_page(first + page)
            if found:
                machine.vm.reset_dirty_rings()
        return found

    def _ring_full(self, vcpu: Vcpu) -> bool:
        self.full += 1
        if not self._collect():
            self._machine.stop("internal-error", "KVM ran over the end of a dirty ring: it does not say any more what "
                               "has changed, nor goes on")
        return True
