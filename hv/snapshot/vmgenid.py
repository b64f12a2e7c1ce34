"""A new generation ID for a restored machine, so that its kernel learns that its random numbers are another's.

The guest's firmware tables say where the ID is and which interrupt tells of its change (hv/boot/acpi.py); Linux' driver
(CONFIG_VMGENID, drivers/virt/vmgenid.c) then reseeds, some milliseconds later. A machine without these tables, as one
without ACPI, has none. One that migrates keeps its ID: it goes on, it is not copied.
Driven by tests/unit/test_vmgenid.py and tests/kvm/test_clones.py.
"""

from __future__ import annotations

__all__ = ["renew"]

import os

from hv.devices.irq import IrqLine
from hv.machine.platform import GENERATION_GSI
from hv.memory.layout import ACPI_START, GENERATION_ID, GENERATION_ID_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

_RSDP = b"RSD PTR "             # what tables begin with (ACPI 6.4, 5.2.5.3)
_IOAPIC = 2                     # KVM_IRQCHIP_IOAPIC
_ENTRIES, _MASKED = 24, 1 << 16     # struct kvm_ioapic_state, redirtbl; 82093AA, 3.2.4


def renew(machine: Machine) -> bool:
    """Give the machine, which is not started yet, a new ID, of which it learns by its first interrupt.

    Whether it has one: its tables are still where they were written. What a guest puts there instead is its own loss.
    """
    if machine.memory.read(ACPI_START, len(_RSDP)) != _RSDP:
        return False
    machine.memory.write(GENERATION_ID, os.urandom(GENERATION_ID_SIZE))
    if _listens(machine):
        machine.at_start.append(IrqLine(machine.vm.irq_line, GENERATION_GSI).pulse)
    return True


def _listens(machine: Machine) -> bool:
    """Whether the guest has opened that pin of the IOAPIC. To one that has not, the PIC would bring the interrupt."""
    entry = bytes(machine.vm.get_irqchip(_IOAPIC).chip)[_ENTRIES + 8 * GENERATION_GSI:][:8]
    return not int.from_bytes(entry, "little") & _MASKED
