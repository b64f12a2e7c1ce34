"""Structures of a VM's own state: interrupt controllers, timer, clock (asm/kvm.h and linux/kvm.h, uapi).

Apart from the processors' (abi_state.py): restoring a snapshot needs no more than these.
"""

from __future__ import annotations

__all__ = ["ClockData", "IrqchipState", "PitChannelState", "PitState2"]

from ctypes import Structure, c_int64, c_uint8, c_uint16, c_uint32, c_uint64


class IrqchipState(Structure):
    """struct kvm_irqchip: 0 = master PIC, 1 = slave PIC, 2 = IOAPIC; 512 bytes of register state."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", c_uint8 * 512)]


class PitChannelState(Structure):
    """struct kvm_pit_channel_state."""

    _fields_ = [
        ("count", c_uint32), ("latched_count", c_uint16), ("count_latched", c_uint8), ("status_latched", c_uint8),
        ("status", c_uint8), ("read_state", c_uint8), ("write_state", c_uint8), ("write_latch", c_uint8),
        ("rw_mode", c_uint8), ("mode", c_uint8), ("bcd", c_uint8), ("gate", c_uint8), ("count_load_time", c_int64),
    ]


class PitState2(Structure):
    """struct kvm_pit_state2."""

    _fields_ = [("channels", PitChannelState * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9)]


class ClockData(Structure):
    """struct kvm_clock_data: kvmclock in ns, with the host's clocks where `flags` says so."""

    _fields_ = [("clock", c_uint64), ("flags", c_uint32), ("pad0", c_uint32), ("realtime", c_uint64),
                ("host_tsc", c_uint64), ("pad", c_uint32 * 4)]
