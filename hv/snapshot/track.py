"""Which pages of guest RAM changed since the last look, for differential snapshots and migration.

    guest and KVM      KVM's dirty log of each memory slot (Documentation/virt/kvm/api.rst, 4.8)
    pyhv itself        GuestMemory.dirty, marked where it writes
    used rings         the devices write them by views made once: whole rings of the queues in use count as changed

A write by the guest while a slot's log is read is in this log or the next. Driven by tests/kvm/test_snapshot_diff.py.
"""

from __future__ import annotations

__all__ = ["Tracker", "changed_since_restore", "track"]

from hv.kvm.const import KVM_MEM_LOG_DIRTY_PAGES
from hv.memory.dirty import PageSet
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.memory import touched_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

_USED_HEADER, _USED_ENTRY, _EVENT = 4, 8, 2     # bytes (virtio 1.2, 2.7.8)


class Tracker:
    """Tracks `machine` from now on. `base` may say what the changes count from: (folder, id) of a snapshot."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.base: tuple[str, str] | None = None
        machine.memory.dirty = PageSet(machine.memory.regions)
        self._log(KVM_MEM_LOG_DIRTY_PAGES)

    def _log(self, flags: int) -> None:
        for slot, _, gpa, size, host in slots_of(self._machine):
            self._machine.vm.set_memory(slot, gpa, size, host, flags)

    def take(self) -> PageSet:
        """The pages changed since the last call, or since the tracking began. The machine may run."""
        machine = self._machine
        marked = machine.memory.dirty
        assert marked is not None
        logged = self._logged()
        for device in machine.devices.values():
            for queue in device.queues:
                if queue.ready:
                    marked.mark(queue.used, _USED_HEADER + _USED_ENTRY * queue.size + _EVENT)
        for first, end in marked.take().runs():
            logged.add_run(first, end)
        return logged

    def _logged(self) -> PageSet:
        """What KVM says."""
        machine = self._machine
        logged = PageSet(machine.memory.regions)
        for slot, first, _, size, _ in slots_of(machine):
            pages = size // PAGE_SIZE
            logged.add_bitmap(first, machine.vm.dirty_log(slot, pages), pages)
        return logged

    def changed_again(self, first: int, end: int) -> None:
        """Pages first to end-1 count as changed for the next take() too."""
        if self._machine.memory.dirty is not None:
            self._machine.memory.dirty.add_run(first, end)

    def stop(self) -> None:
        """Track no more."""
        self._machine.memory.dirty = None
        self._log(0)


def slots_of(machine: Machine) -> list[tuple[int, int, int, int, int]]:
    """Slots over all of RAM: (slot, number of its first page, gpa, bytes, address in this process)."""
    if machine.slots is not None:
        machine.slots.back_all()
        return machine.slots.rows
    rows = []
    number = 0
    for slot, region in enumerate(machine.memory.regions):
        rows.append((slot, number, region.gpa, region.size, region.host))
        number += region.size // PAGE_SIZE
    return rows


def track(machine: Machine) -> Tracker:
    """A tracker of the kind that the machine was built for."""
    if machine.config.dirty_ring:
        from hv.snapshot.track_ring import RingTracker

        return RingTracker(machine)
    return Tracker(machine)


def changed_since_restore(machine: Machine) -> PageSet:
    """The pages that a restored machine has copies of: all that differ from the snapshot's. No log is needed."""
    changed = PageSet(machine.memory.regions)
    number = 0
    for region in machine.memory.regions:
        for first, end in touched_runs(region):
            changed.add_run(number + first // PAGE_SIZE, number + end // PAGE_SIZE)
        number += region.size // PAGE_SIZE
    return changed
