"""KVM's dirty rings, set up for a VM that has no processor yet (Documentation/virt/kvm/api.rst, 8.29).

A VM has them or the dirty log, for its whole life. Who collects them: hv/snapshot/track_ring.py. Not where ring 0 is
emulated: such a KVM makes an entry for every single store, and was seen to run over the end of a ring before it says
that it is full.
Driven by tests/kvm/test_snapshot_ring.py.
"""

from __future__ import annotations

__all__ = ["ENTRY", "enable_rings", "has_rings"]

from hv.errors import ConfigError
from hv.kvm.const import KVM_CAP_DIRTY_LOG_RING
from hv.softkvm.detect import is_candidate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

ENTRY = 16                      # bytes of a struct kvm_dirty_gfn


def has_rings(machine: Machine) -> bool:
    """Whether this host's KVM can give the rings that the configuration asks for."""
    return not is_candidate() and machine.vm.check(KVM_CAP_DIRTY_LOG_RING) >= machine.config.dirty_ring * ENTRY


def enable_rings(machine: Machine) -> None:
    """Give each vCPU to come a ring. ConfigError where this host has none."""
    if not has_rings(machine):
        raise ConfigError(f"no dirty rings of {machine.config.dirty_ring} entries that can be relied on in this KVM",
                          "leave --dirty-ring out: changes are tracked by its dirty log then")
    machine.vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, machine.config.dirty_ring * ENTRY)
