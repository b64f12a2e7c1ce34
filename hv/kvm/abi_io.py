"""Structures for event descriptors, interrupt routing, the dirty log and debugging (linux/kvm.h, uapi)."""

from __future__ import annotations

__all__ = [
    "ClearDirtyLog",
    "CoalescedZone",
    "CreateDevice",
    "DeviceAttr",
    "DirtyLog",
    "GuestDebug",
    "Ioeventfd",
    "IrqLevel",
    "IrqRoutingEntry",
    "Irqfd",
    "Msi",
    "irq_routing",
]

from ctypes import Structure, c_int32, c_uint8, c_uint32, c_uint64


class IrqLevel(Structure):
    """struct kvm_irq_level."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class Irqfd(Structure):
    """struct kvm_irqfd."""

    _fields_ = [("fd", c_uint32), ("gsi", c_uint32), ("flags", c_uint32), ("resamplefd", c_uint32),
                ("pad", c_uint8 * 16)]


class Ioeventfd(Structure):
    """struct kvm_ioeventfd; len is 0, 1, 2, 4 or 8."""

    _fields_ = [("datamatch", c_uint64), ("addr", c_uint64), ("len", c_uint32), ("fd", c_int32),
                ("flags", c_uint32), ("pad", c_uint8 * 36)]


class CoalescedZone(Structure):
    """struct kvm_coalesced_mmio_zone; pio 1 for port I/O."""

    _fields_ = [("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32)]


class DirtyLog(Structure):
    """struct kvm_dirty_log: dirty_bitmap points to one bit per page of the slot."""

    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class ClearDirtyLog(Structure):
    """struct kvm_clear_dirty_log."""

    _fields_ = [("slot", c_uint32), ("num_pages", c_uint32), ("first_page", c_uint64), ("dirty_bitmap", c_uint64)]


class GuestDebug(Structure):
    """struct kvm_guest_debug with the x86 debug registers (DR0-DR7)."""

    _fields_ = [("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8)]


class Msi(Structure):
    """struct kvm_msi."""

    _fields_ = [("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("flags", c_uint32),
                ("devid", c_uint32), ("pad", c_uint8 * 12)]


class IrqRoutingEntry(Structure):
    """struct kvm_irq_routing_entry; `u` is irqchip/pin for type 1, address_lo/hi/data/devid for type 2 (MSI)."""

    _fields_ = [("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", c_uint32 * 8)]


def irq_routing(count: int) -> Structure:
    """A struct kvm_irq_routing with room for `count` entries."""
    kind = type("IrqRouting", (Structure,), {
        "_fields_": [("nr", c_uint32), ("flags", c_uint32), ("entries", IrqRoutingEntry * count)]})
    made: Structure = kind()
    made.nr = count
    return made


class CreateDevice(Structure):
    """struct kvm_create_device."""

    _fields_ = [("type", c_uint32), ("fd", c_uint32), ("flags", c_uint32)]


class DeviceAttr(Structure):
    """struct kvm_device_attr."""

    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]

