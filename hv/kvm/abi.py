"""Structures of the VM ioctls (linux/kvm.h, uapi). Field names are the header's.

Only what every boot needs stands here; structures for state, interrupt routing and debugging are in
abi_state.py, abi_chips.py and abi_io.py, so that a boot does not pay for building their classes.
"""

from __future__ import annotations

__all__ = ["EnableCap", "MsrFilter", "MsrFilterRange", "PitConfig", "UserspaceMemoryRegion"]

from ctypes import Structure, c_uint8, c_uint32, c_uint64


class UserspaceMemoryRegion(Structure):
    """struct kvm_userspace_memory_region: one memory slot."""

    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32),
        ("guest_phys_addr", c_uint64), ("memory_size", c_uint64), ("userspace_addr", c_uint64),
    ]


class PitConfig(Structure):
    """struct kvm_pit_config."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class EnableCap(Structure):
    """struct kvm_enable_cap."""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class MsrFilterRange(Structure):
    """struct kvm_msr_filter_range: a bitmap of allowed MSRs from `base`."""

    _fields_ = [("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("pad", c_uint32),
                ("bitmap", c_uint64)]


class MsrFilter(Structure):
    """struct kvm_msr_filter: up to 16 ranges; MSRs in none are allowed unless flags bit 0."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32), ("ranges", MsrFilterRange * 16)]

