"""The vCPU handle: run, registers, and the rest of a processor's state. Driven by tests/kvm/test_handles.py.

A vCPU's ioctls belong to the thread that runs it (Documentation/virt/kvm/api.rst, 1). Kicking one out of
KVM_RUN is a signal that is blocked in its thread and unblocked only inside KVM_RUN (KVM_SET_SIGNAL_MASK):
no handler is installed, nothing global is touched, and a kick that comes too early is not lost.
"""

from __future__ import annotations

__all__ = ["KICK_SIGNAL", "VcpuFd"]

import ctypes
import errno
import mmap
import os

from hv.errors import KernelError, StateError
from hv.kvm import ioctl as req
from hv.kvm.abi_x86 import Regs, Sregs
from hv.kvm.const import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_INTR
from hv.kvm.run import EXIT_REASON, IMMEDIATE_EXIT
from hv.linux.libc import get_errno, ioctl, ioctl_bytes, ioctl_ptr, raw_ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm import abi_state
    from hv.kvm.abi_x86 import Cpuid2
    from hv.kvm.vm import VmFd

KICK_SIGNAL = 23    # SIGURG: ignored by default, so a stray one harms nobody
_ALL_SIGNALS = 0xFFFFFFFFFFFFFFFF
# struct kvm_signal_mask: the length of a kernel's sigset_t, 8 bytes, and one
_RUN_MASK = b"\x08\0\0\0" + (_ALL_SIGNALS & ~(1 << (KICK_SIGNAL - 1))).to_bytes(8, "little")
_CPUID_HEADER, _CPUID_ENTRY = 8, 40     # struct kvm_cpuid2, kvm_cpuid_entry2
_SIZE_SHIFT, _SIZE_MASK = 16, 0x3FFF    # where an ioctl's number has its argument's size (asm-generic/ioctl.h)


class VcpuFd:
    """One virtual processor and its kvm_run page. A context manager."""

    def __init__(self, vm: VmFd, fd: int, index: int) -> None:
        self.vm = vm
        self.fd = fd
        self.index = index
        self.cpuid = b""        # struct kvm_cpuid2 as it was set; a software KVM gives back more than that
        self._map = mmap.mmap(fd, vm.kvm.vcpu_mmap_size(), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.run_u8 = memoryview(self._map)
        whole = self.run_u8[:len(self._map) & ~7]
        self.run_u16 = whole.cast("H")
        self.run_u32 = whole.cast("I")
        self.run_u64 = whole.cast("Q")
        whole.release()
        self._ring_map: mmap.mmap | None = None
        self._ring: memoryview | None = None
        self._ring_at = 0       # entries collected so far

    def run(self) -> int:
        """KVM_RUN: the exit reason, KVM_EXIT_INTR when kicked. Only the vCPU's own thread may call it."""
        if raw_ioctl(self.fd, req.KVM_RUN, 0) < 0:
            error = get_errno()
            if error in (errno.EINTR, errno.EAGAIN):
                return KVM_EXIT_INTR
            raise KernelError("KVM_RUN", error, "the host's KVM refused the guest's state")
        return self.run_u32[EXIT_REASON // 4]

    def finish_exit(self) -> None:
        """Let KVM complete the pending exit (write back an IN or MMIO read) without running the guest on."""
        self.run_u8[IMMEDIATE_EXIT] = 1
        try:
            self.run()
        finally:
            self.run_u8[IMMEDIATE_EXIT] = 0

    def collect_dirty(self, size: int) -> list[tuple[int, int]]:
        """The new entries of the dirty ring of `size` bytes: (slot, page in it). They are to be reset then.

        struct kvm_dirty_gfn (linux/kvm.h): flags and slot, 32 bits each, offset, 64. One thread at a time.
        """
        if self._ring_map is None:
            self._ring_map = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE,
                                       offset=KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE)
            self._ring = memoryview(self._ring_map).cast("I")
        ring = self._ring
        assert ring is not None
        found, entries = [], size // 16
        while ring[at := self._ring_at % entries * 4] & KVM_DIRTY_GFN_F_DIRTY:
            found.append((ring[at + 1], ring[at + 2] | ring[at + 3] << 32))
            ring[at] = KVM_DIRTY_GFN_F_RESET
            self._ring_at += 1
        return found

    def set_signal_mask(self) -> None:
        """KVM_SET_SIGNAL_MASK: inside KVM_RUN only the kick signal gets through."""
        ioctl_bytes(self.fd, req.KVM_SET_SIGNAL_MASK, _RUN_MASK, "KVM_SET_SIGNAL_MASK")

    # registers ------------------------------------------------------------------------------------

    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        regs = Regs()
        ioctl_ptr(self.fd, req.KVM_GET_REGS, regs, "KVM_GET_REGS")
        return regs

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        ioctl_ptr(self.fd, req.KVM_SET_REGS, regs, "KVM_SET_REGS")

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS."""
        sregs = Sregs()
        ioctl_ptr(self.fd, req.KVM_GET_SREGS, sregs, "KVM_GET_SREGS")
        return sregs

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS."""
        ioctl_ptr(self.fd, req.KVM_SET_SREGS, sregs, "KVM_SET_SREGS", "KVM found the segment state inconsistent")

    def set_cpuid(self, table: Cpuid2) -> None:
        """KVM_SET_CPUID2: before the first KVM_RUN."""
        ioctl_ptr(self.fd, req.KVM_SET_CPUID2, table, "KVM_SET_CPUID2")
        self.cpuid = bytes(table)[:_CPUID_HEADER + table.nent * _CPUID_ENTRY]

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        """KVM_GET_MSRS: values by index; those the host can't read are left out."""
        from hv.kvm.msrs import msr_values, msrs

        values: dict[int, int] = {}
        while indices:
            table = msrs([(index, 0) for index in indices])
            done = ioctl_ptr(self.fd, req.KVM_GET_MSRS, table, "KVM_GET_MSRS")
            values.update(msr_values(table, done))
            indices = indices[done + 1:]
        return values

    def set_msrs(self, values: dict[int, int]) -> list[int]:
        """KVM_SET_MSRS in the dict's order; returns the indices the host refused."""
        from hv.kvm.msrs import msrs

        items = list(values.items())
        refused: list[int] = []
        while items:
            done = ioctl_ptr(self.fd, req.KVM_SET_MSRS, msrs(items), "KVM_SET_MSRS")
            if done < len(items):
                refused.append(items[done][0])
            items = items[done + 1:]
        return refused

    # the rest of the state ------------------------------------------------------------------------

    def get(self, kind: str) -> object:
        """Read the state structure named `kind` (see STATE_KINDS), e.g. `vcpu.get("LAPIC")`."""
        structure, _ = _state_kind(kind)
        value: object = structure()
        ioctl_ptr(self.fd, getattr(req, f"KVM_GET_{kind}"), value, f"KVM_GET_{kind}")
        return value

    def set(self, kind: str, value: object) -> None:
        """Set the state structure named `kind`."""
        _state_kind(kind)
        ioctl_ptr(self.fd, getattr(req, f"KVM_SET_{kind}"), value, f"KVM_SET_{kind}")

    def get_bytes(self, kind: str, size: int = 0) -> bytes:
        """The state structure of KVM_GET_<kind> as it is in memory; `size` where the request does not tell it."""
        request = getattr(req, f"KVM_GET_{kind}")
        buffer = (ctypes.c_char * (size or request >> _SIZE_SHIFT & _SIZE_MASK))()
        ioctl_ptr(self.fd, request, buffer, f"KVM_GET_{kind}")
        return buffer.raw

    def set_bytes(self, kind: str, data: bytes) -> None:
        """KVM_SET_<kind> from such bytes. StateError where they are too few."""
        request = getattr(req, f"KVM_SET_{kind}")
        if len(data) < request >> _SIZE_SHIFT & _SIZE_MASK:
            raise StateError(f"{kind} of {len(data)} bytes, needed are {request >> _SIZE_SHIFT & _SIZE_MASK}")
        ioctl_ptr(self.fd, request, (ctypes.c_char * len(data)).from_buffer_copy(data), f"KVM_SET_{kind}",
                  "KVM found the state inconsistent")

    def get_events(self) -> abi_state.VcpuEvents:
        """KVM_GET_VCPU_EVENTS."""
        from hv.kvm.abi_state import VcpuEvents

        events = VcpuEvents()
        ioctl_ptr(self.fd, req.KVM_GET_VCPU_EVENTS, events, "KVM_GET_VCPU_EVENTS")
        return events

    def set_events(self, events: abi_state.VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS."""
        ioctl_ptr(self.fd, req.KVM_SET_VCPU_EVENTS, events, "KVM_SET_VCPU_EVENTS")

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE: the guest-physical address of a linear one, None where nothing is mapped."""
        from hv.kvm.abi_state import Translation

        answer = Translation(linear_address=linear)
        ioctl_ptr(self.fd, req.KVM_TRANSLATE, answer, "KVM_TRANSLATE")
        return int(answer.physical_address) if answer.valid else None

    def set_guest_debug(self, control: int, debug_registers: tuple[int, ...] = ()) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_* flags and DR0-DR7."""
        from hv.kvm.abi_io import GuestDebug

        debug = GuestDebug(control=control)
        for index, value in enumerate(debug_registers):
            debug.debugreg[index] = value
        ioctl_ptr(self.fd, req.KVM_SET_GUEST_DEBUG, debug, "KVM_SET_GUEST_DEBUG")

    def nmi(self) -> None:
        """KVM_NMI: queue a non-maskable interrupt."""
        ioctl(self.fd, req.KVM_NMI, 0, "KVM_NMI")

    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the guest's TSC frequency in kHz."""
        return ioctl(self.fd, req.KVM_GET_TSC_KHZ, 0, "KVM_GET_TSC_KHZ")

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was paused, so that its watchdogs don't bark."""
        ioctl(self.fd, req.KVM_KVMCLOCK_CTRL, 0, "KVM_KVMCLOCK_CTRL")

    def close(self) -> None:
        """Unmap kvm_run and close the descriptor. The vCPU's thread must have ended."""
        if self.fd >= 0:
            for view in (self.run_u8, self.run_u16, self.run_u32, self.run_u64):
                view.release()
            self._map.close()
            if self._ring_map is not None and self._ring is not None:
                self._ring.release()
                self._ring_map.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> VcpuFd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


STATE_KINDS = {
    "FPU": "Fpu", "LAPIC": "LapicState", "MP_STATE": "MpState", "DEBUGREGS": "DebugRegs", "XSAVE": "Xsave",
    "XCRS": "Xcrs", "SREGS2": "Sregs2", "VCPU_EVENTS": "VcpuEvents",
}


def _state_kind(kind: str) -> tuple[type[ctypes.Structure], str]:
    from hv.kvm import abi_state

    name = STATE_KINDS[kind]
    return getattr(abi_state, name), name
