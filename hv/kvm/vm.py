"""The VM handle: memory slots, interrupt controllers, event descriptors, clock. Driven by tests/kvm/test_handles.py."""

from __future__ import annotations

__all__ = ["VmFd"]

import ctypes
import os

from hv.kvm import ioctl as req
from hv.kvm.abi import EnableCap, PitConfig, UserspaceMemoryRegion
from hv.kvm.const import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    KVM_PIT_SPEAKER_DUMMY,
)
from hv.linux.libc import ioctl, ioctl_ptr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_chips import ClockData, IrqchipState, PitState2
    from hv.kvm.system import Kvm
    from hv.kvm.vcpu import VcpuFd


class VmFd:
    """One virtual machine. A context manager; closing it ends the VM once its vCPUs are closed too."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        self.kvm = kvm
        self.fd = fd

    def check(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the VM: what this VM, not just this host, can do."""
        return ioctl(self.fd, req.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        cap = EnableCap(cap=capability)
        for index, value in enumerate(args):
            cap.args[index] = value
        ioctl_ptr(self.fd, req.KVM_ENABLE_CAP, cap, f"KVM_ENABLE_CAP({capability})",
                  "the host's KVM lacks this capability; `pyhv doctor` lists what is lost")

    # memory ---------------------------------------------------------------------------------------

    def set_memory(self, slot: int, gpa: int, size: int, host: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION: back [gpa, gpa+size) by host memory; size 0 removes the slot.

        All in bytes, page aligned. The host memory must outlive the VM.
        """
        region = UserspaceMemoryRegion(slot, flags, gpa, size, host)
        ioctl_ptr(self.fd, req.KVM_SET_USER_MEMORY_REGION, region,
                  f"KVM_SET_USER_MEMORY_REGION(slot={slot} gpa={gpa:#x} size={size:#x})",
                  "slots must be page aligned and must not overlap")

    def dirty_log(self, slot: int, pages: int) -> bytearray:
        """KVM_GET_DIRTY_LOG: one bit per page written since the last call; rearms the log."""
        from hv.kvm.abi_io import DirtyLog

        bitmap = bytearray((pages + 63) // 64 * 8)
        anchor = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        log = DirtyLog(slot=slot, dirty_bitmap=ctypes.addressof(anchor))
        ioctl_ptr(self.fd, req.KVM_GET_DIRTY_LOG, log, "KVM_GET_DIRTY_LOG", "the slot must log dirty pages")
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, bitmap: bytearray, pages: int) -> None:
        """KVM_CLEAR_DIRTY_LOG: rearm only the pages whose bit is set (manual protect mode)."""
        from hv.kvm.abi_io import ClearDirtyLog

        anchor = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        log = ClearDirtyLog(slot=slot, num_pages=pages, first_page=first_page, dirty_bitmap=ctypes.addressof(anchor))
        ioctl_ptr(self.fd, req.KVM_CLEAR_DIRTY_LOG, log, "KVM_CLEAR_DIRTY_LOG")

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: protect the pages of all collected entries again; how many that were."""
        return ioctl(self.fd, req.KVM_RESET_DIRTY_RINGS, 0, "KVM_RESET_DIRTY_RINGS")

    # processors and interrupt controllers ---------------------------------------------------------

    def create_vcpu(self, index: int) -> VcpuFd:
        """KVM_CREATE_VCPU: `index` becomes the local APIC id."""
        from hv.kvm.vcpu import VcpuFd

        fd = ioctl(self.fd, req.KVM_CREATE_VCPU, index, f"KVM_CREATE_VCPU({index})",
                   "ask for fewer processors; `pyhv doctor` shows the host's limit")
        return VcpuFd(self, fd, index)

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages Intel needs for real mode."""
        ioctl(self.fd, req.KVM_SET_TSS_ADDR, gpa, "KVM_SET_TSS_ADDR")

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page Intel needs for unpaged mode; before any vCPU."""
        ioctl_ptr(self.fd, req.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(gpa), "KVM_SET_IDENTITY_MAP_ADDR")

    def set_boot_cpu(self, index: int) -> None:
        """KVM_SET_BOOT_CPU_ID: before any vCPU."""
        ioctl(self.fd, req.KVM_SET_BOOT_CPU_ID, index, "KVM_SET_BOOT_CPU_ID")

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, IOAPIC and a LAPIC per vCPU, in the kernel. Slots first: see machine/builder."""
        ioctl(self.fd, req.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")

    def create_pit(self, speaker: bool = True) -> None:
        """KVM_CREATE_PIT2: the 8254, with port 0x61 unless `speaker` is false."""
        ioctl_ptr(self.fd, req.KVM_CREATE_PIT2, PitConfig(flags=KVM_PIT_SPEAKER_DUMMY if speaker else 0),
                  "KVM_CREATE_PIT2")

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE: drive an interrupt line of the in-kernel chips."""
        from hv.kvm.abi_io import IrqLevel

        ioctl_ptr(self.fd, req.KVM_IRQ_LINE, IrqLevel(gsi, int(level)), f"KVM_IRQ_LINE({gsi})")

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: 1 delivered, 0 blocked by the guest."""
        from hv.kvm.abi_io import Msi

        return ioctl_ptr(self.fd, req.KVM_SIGNAL_MSI,
                         Msi(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data), "KVM_SIGNAL_MSI")

    def set_gsi_routing(self, entries: list[tuple[int, int, tuple[int, int, int]]]) -> None:
        """KVM_SET_GSI_ROUTING: replace the table by (gsi, type, (a, b, c)) rows.

        For type IRQCHIP a, b are chip and pin; for MSI a, b, c are address low, high and data.
        """
        from hv.kvm.abi_io import irq_routing

        table = irq_routing(len(entries))
        for row, (gsi, kind, values) in zip(table.entries, entries, strict=True):
            row.gsi, row.type = gsi, kind
            for index, value in enumerate(values):
                row.u[index] = value
        ioctl_ptr(self.fd, req.KVM_SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING")

    # event descriptors ----------------------------------------------------------------------------

    def irqfd(self, fd: int, gsi: int, resample_fd: int = -1, *, remove: bool = False) -> None:
        """KVM_IRQFD: writes to eventfd `fd` raise `gsi` without leaving the kernel."""
        from hv.kvm.abi_io import Irqfd

        flags = KVM_IRQFD_FLAG_DEASSIGN if remove else KVM_IRQFD_FLAG_RESAMPLE if resample_fd >= 0 else 0
        ioctl_ptr(self.fd, req.KVM_IRQFD, Irqfd(fd, gsi, flags, max(resample_fd, 0)), f"KVM_IRQFD(gsi={gsi})")

    def ioeventfd(self, fd: int, address: int, length: int, *, match: int | None = None, pio: bool = False,
                  remove: bool = False) -> None:
        """KVM_IOEVENTFD: guest writes of `length` bytes (0, 1, 2, 4, 8) to `address` signal eventfd `fd`.

        With `match` only writes of that value count.
        """
        from hv.kvm.abi_io import Ioeventfd

        flags = ((KVM_IOEVENTFD_FLAG_DATAMATCH if match is not None else 0)
                 | (KVM_IOEVENTFD_FLAG_PIO if pio else 0) | (KVM_IOEVENTFD_FLAG_DEASSIGN if remove else 0))
        ioctl_ptr(self.fd, req.KVM_IOEVENTFD, Ioeventfd(match or 0, address, length, fd, flags),
                  f"KVM_IOEVENTFD({address:#x})")

    def coalesce(self, address: int, size: int, *, pio: bool = False, remove: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: queue writes to the range in the ring page instead of exiting."""
        from hv.kvm.abi_io import CoalescedZone

        name = "KVM_UNREGISTER_COALESCED_MMIO" if remove else "KVM_REGISTER_COALESCED_MMIO"
        ioctl_ptr(self.fd, getattr(req, name), CoalescedZone(address, size, int(pio)), name)

    def set_msr_filter(self, ranges: list[tuple[int, int, int, bytes]]) -> None:
        """KVM_X86_SET_MSR_FILTER: rows of (flags, base, count, bitmap); a clear bit denies that MSR.

        An empty list removes the filter. At most 16 rows.
        """
        from hv.kvm.abi import MsrFilter

        table = MsrFilter()
        anchors = []
        for row, (flags, base, count, bits) in zip(table.ranges, ranges, strict=False):
            anchor = ctypes.create_string_buffer(bits, len(bits))
            anchors.append(anchor)
            row.flags, row.base, row.nmsrs, row.bitmap = flags, base, count, ctypes.addressof(anchor)
        ioctl_ptr(self.fd, req.KVM_X86_SET_MSR_FILTER, table, "KVM_X86_SET_MSR_FILTER")

    # state ----------------------------------------------------------------------------------------

    def get_irqchip(self, chip: int) -> IrqchipState:
        """KVM_GET_IRQCHIP: 0 master PIC, 1 slave PIC, 2 IOAPIC."""
        from hv.kvm.abi_chips import IrqchipState

        state = IrqchipState(chip_id=chip)
        ioctl_ptr(self.fd, req.KVM_GET_IRQCHIP, state, "KVM_GET_IRQCHIP")
        return state

    def set_irqchip(self, state: IrqchipState) -> None:
        """KVM_SET_IRQCHIP."""
        ioctl_ptr(self.fd, req.KVM_SET_IRQCHIP, state, "KVM_SET_IRQCHIP")

    def get_pit(self) -> PitState2:
        """KVM_GET_PIT2."""
        from hv.kvm.abi_chips import PitState2

        state = PitState2()
        ioctl_ptr(self.fd, req.KVM_GET_PIT2, state, "KVM_GET_PIT2")
        return state

    def set_pit(self, state: PitState2) -> None:
        """KVM_SET_PIT2."""
        ioctl_ptr(self.fd, req.KVM_SET_PIT2, state, "KVM_SET_PIT2")

    def get_clock(self) -> ClockData:
        """KVM_GET_CLOCK: kvmclock, ns."""
        from hv.kvm.abi_chips import ClockData

        state = ClockData()
        ioctl_ptr(self.fd, req.KVM_GET_CLOCK, state, "KVM_GET_CLOCK")
        return state

    def set_clock(self, state: ClockData) -> None:
        """KVM_SET_CLOCK."""
        ioctl_ptr(self.fd, req.KVM_SET_CLOCK, state, "KVM_SET_CLOCK")

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> VmFd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
