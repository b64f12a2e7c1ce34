"""The ioctls of one restore, recorded for a C program that makes the same ones again (hv/bench/restore.c).

Each is kept with the bytes of its argument. What only the process that makes them can know, the address of guest RAM
and the numbers of descriptors, is named by where it stands. Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["record_restore"]

import ctypes
import time
from pathlib import Path
from struct import pack

from hv.errors import HvError
from hv.kvm import ioctl as req
from hv.kvm.abi import MsrFilter, UserspaceMemoryRegion
from hv.kvm.abi_io import Ioeventfd, Irqfd
from hv.linux import libc
from hv.snapshot.restore import restore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine

    Fix = tuple[int, int, int, int]     # offset, size, kind, value

KVM, VM, VCPU = range(3)                # restore.c: targets, the third and those behind it are processors
TO_MEMORY, TO_EVENT, TO_ARGUMENT = range(3)
_PATIENCE = 10.0                        # s


class _Recorder:
    """Stands before the two bindings of ioctl that all of pyhv uses but for entering a guest."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int | bytes, int]] = []      # when, descriptor, number, argument, result
        self._plain, self._pointer = libc.raw_ioctl, libc._ioctl_ptr

    def __enter__(self) -> _Recorder:
        libc.raw_ioctl = self._wrap(self._plain, lambda value: int(value))
        libc._ioctl_ptr = self._wrap(self._pointer, _content)
        return self

    def _wrap(self, call: Any, content: Any) -> Any:
        def ioctl(fd: int, request: int, argument: Any) -> int:
            kept = content(argument)
            result: int = call(fd, request, argument)
            if result >= 0:
                self.calls.append((time.perf_counter_ns(), fd, request, kept, result))
            return result

        return ioctl

    def __exit__(self, *exc: object) -> None:
        libc.raw_ioctl, libc._ioctl_ptr = self._plain, self._pointer


def record_restore(folder: str, file: Path) -> int:
    """Restore the snapshot in `folder` once and write what that took into `file`; how many ioctls it was."""
    with _Recorder() as recorder, restore(folder) as machine:
        machine.start()
        entered = entry_of(machine)
        rows = [_row(call, machine, recorder.calls) for call in recorder.calls if call[0] <= entered]
    file.write_bytes(b"".join(rows))
    return len(rows)


def entry_of(machine: Machine) -> int:
    """When the first processor entered the guest, on perf_counter_ns()'s clock."""
    vcpu = machine.vcpus[0]
    end = time.monotonic() + _PATIENCE
    while not vcpu.first_entry_ns:
        if time.monotonic() > end:
            raise HvError(f"the restored machine does not start ({machine.outcome})")
        time.sleep(0.0002)
    return vcpu.first_entry_ns


def _content(argument: Any) -> bytes:
    if isinstance(argument, bytes):
        return argument
    value = argument._obj
    data = bytes(value)
    if isinstance(value, MsrFilter):
        for row in value.ranges:        # the bitmaps behind it
            data += ctypes.string_at(row.bitmap, (row.nmsrs + 7) // 8) if row.bitmap else b""
    return data


def _row(call: tuple[int, int, int, int | bytes, int], machine: Machine,
         calls: list[tuple[int, int, int, int | bytes, int]]) -> bytes:
    """struct call, its argument, its fixes."""
    _, fd, request, argument, _ = call
    data, fixes = (argument, _fixes(request, argument, machine)) if isinstance(argument, bytes) else (b"", [])
    integer = isinstance(argument, int)
    head = pack("<2I2Q2I", _target(fd, machine, request), integer, request, argument if integer else 0, len(data),
                len(fixes))
    return head + data.ljust((len(data) + 7) & ~7, b"\0") + b"".join(pack("<4IQ", offset, size, kind, 0, value)
                                                                  for offset, size, kind, value in fixes)


def _target(fd: int, machine: Machine, request: int) -> int:
    handles = {machine.kvm.fd: KVM, machine.vm.fd: VM}
    handles |= {vcpu.fd.fd: VCPU + vcpu.index for vcpu in machine.vcpus}
    if fd not in handles:
        raise HvError(f"the restore called ioctl {request:#x} on something that hv/bench/restore.c does not know")
    return handles[fd]


def _fixes(request: int, data: bytes, machine: Machine) -> list[Fix]:
    if request == req.KVM_SET_USER_MEMORY_REGION:
        slot = UserspaceMemoryRegion.from_buffer_copy(data)
        offset = next(region.file_offset + slot.userspace_addr - region.host for region in machine.memory.regions
                      if region.host <= slot.userspace_addr < region.host + region.size)
        return [(UserspaceMemoryRegion.userspace_addr.offset, 8, TO_MEMORY, offset)]
    if request in (req.KVM_IRQFD, req.KVM_IOEVENTFD):
        kind = Irqfd if request == req.KVM_IRQFD else Ioeventfd
        event = kind.from_buffer_copy(data).fd
        return [(kind.fd.offset, 4, TO_EVENT, machine.owned_fds.index(event))]
    if request == req.KVM_X86_SET_MSR_FILTER:
        table, behind, fixes = MsrFilter.from_buffer_copy(data), ctypes.sizeof(MsrFilter), []
        for index, row in enumerate(table.ranges):
            if row.bitmap:
                at = MsrFilter.ranges.offset + index * ctypes.sizeof(row) + type(row).bitmap.offset
                fixes.append((at, 8, TO_ARGUMENT, behind))
                behind += (row.nmsrs + 7) // 8
        return fixes
    return []
