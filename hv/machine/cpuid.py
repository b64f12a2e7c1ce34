"""What the guest's CPUID says: the host's leaves with this machine's topology put in (SDM 2A, CPUID)."""

from __future__ import annotations

__all__ = ["for_vcpu"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_x86 import Cpuid2

LEAF1_ECX_TSC_DEADLINE = 1 << 24
LEAF1_ECX_HYPERVISOR = 1 << 31
LEAF1_EDX_HTT = 1 << 28


def for_vcpu(table: Cpuid2, index: int, cpus: int) -> Cpuid2:
    """Edit `table` (from KVM_GET_SUPPORTED_CPUID) in place for processor `index` of `cpus` and return it.

    One socket, one thread per core; APIC id = index.
    """
    for entry in table.entries[:table.nent]:
        leaf = entry.function
        if leaf == 1:
            entry.ebx = entry.ebx & 0x0000FFFF | min(cpus, 255) << 16 | index << 24
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE
            entry.edx = entry.edx | LEAF1_EDX_HTT if cpus > 1 else entry.edx & ~LEAF1_EDX_HTT
        elif leaf == 4:     # deterministic cache parameters: cores per package in EAX[31:26]
            entry.eax = entry.eax & 0x03FFFFFF | min(cpus - 1, 63) << 26
        elif leaf in (0xB, 0x1F):
            _topology(entry, index, cpus)
        elif leaf == 0x80000008:    # AMD APM 3, E.4.7: ApicIdCoreIdSize, NC
            entry.ecx = entry.ecx & ~0xF0FF | (cpus - 1).bit_length() << 12 | cpus - 1
        elif leaf == 0x8000001E:    # AMD APM 3, E.4.16: extended APIC id, core id, one thread per core
            entry.eax, entry.ebx, entry.ecx = index, index & 0xFF, 0
    return table


def _topology(entry: object, index: int, cpus: int) -> None:
    subleaf = entry.index  # type: ignore[attr-defined]
    shift, count, kind = {0: (0, 1, 1), 1: ((cpus - 1).bit_length(), cpus, 2)}.get(subleaf, (0, 0, 0))
    entry.eax, entry.ebx, entry.ecx, entry.edx = (  # type: ignore[attr-defined]
        shift, count, subleaf & 0xFF | kind << 8, index)
