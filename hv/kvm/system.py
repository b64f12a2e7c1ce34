"""The system handle: /dev/kvm. Driven by tests/kvm/test_handles.py."""

from __future__ import annotations

__all__ = ["Kvm"]

import errno
import os

from hv.errors import KernelError
from hv.kvm import ioctl as req
from hv.kvm.const import KVM_API_VERSION
from hv.linux.libc import ioctl, ioctl_ptr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.abi_x86 import Cpuid2
    from hv.kvm.vm import VmFd

_HINTS = {
    errno.ENOENT: "load the kvm_intel or kvm_amd module, enable virtualization in the firmware, or pass the device"
                  " into this container; `pyhv doctor` says more",
    errno.EACCES: "join the group that owns the device (often `kvm`): sudo usermod -aG kvm $USER, then log in again",
    errno.EPERM: "the container or sandbox forbids the device: allow /dev/kvm in its device list",
    errno.ENODEV: "the device node is there but no KVM module is loaded",
}


class Kvm:
    """An open /dev/kvm. A context manager; `close` may be called twice."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open `path`; KernelError names what to do when it is absent or forbidden."""
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(f"open {path}", error.errno or 0, _HINTS.get(error.errno or 0, "")) from None
        self._vcpu_mmap_size = 0

    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 since Linux 2.6.22."""
        return ioctl(self.fd, req.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION",
                     "this is not a KVM device")

    def require_api(self) -> None:
        """Raise unless the API version is the one these bindings speak."""
        version = self.api_version()
        if version != KVM_API_VERSION:
            raise KernelError(f"KVM_GET_API_VERSION (got {version}, need {KVM_API_VERSION})", errno.ENOTSUP,
                              "a newer host kernel is needed")

    def check(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where absent, else 1 or the capability's own number."""
        return ioctl(self.fd, req.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of the kvm_run mapping."""
        if not self._vcpu_mmap_size:
            self._vcpu_mmap_size = ioctl(self.fd, req.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
        return self._vcpu_mmap_size

    def supported_cpuid(self) -> Cpuid2:
        """KVM_GET_SUPPORTED_CPUID: the leaves this host can give a guest."""
        return self._cpuid(req.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")

    def emulated_cpuid(self) -> Cpuid2:
        """KVM_GET_EMULATED_CPUID: features KVM emulates that the processor lacks."""
        return self._cpuid(req.KVM_GET_EMULATED_CPUID, "KVM_GET_EMULATED_CPUID")

    def msr_indices(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that hold guest state."""
        return self._msr_list(req.KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST")

    def msr_feature_indices(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe what the host can give."""
        return self._msr_list(req.KVM_GET_MSR_FEATURE_INDEX_LIST, "KVM_GET_MSR_FEATURE_INDEX_LIST")

    def create_vm(self) -> VmFd:
        """KVM_CREATE_VM: a new, empty virtual machine."""
        from hv.kvm.vm import VmFd

        fd = ioctl(self.fd, req.KVM_CREATE_VM, 0, "KVM_CREATE_VM",
                   "the host is out of memory or of VM slots; end other VMs")
        return VmFd(self, fd)

    def close(self) -> None:
        """Close the descriptor; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Kvm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cpuid(self, request: int, name: str) -> Cpuid2:
        from hv.kvm.abi_x86 import CPUID_MAX, Cpuid2

        table = Cpuid2(nent=CPUID_MAX)
        ioctl_ptr(self.fd, request, table, name)
        return table

    def _msr_list(self, request: int, name: str) -> list[int]:
        from hv.kvm.abi_state import msr_list

        probe = msr_list(0)
        try:
            ioctl_ptr(self.fd, request, probe, name)
        except KernelError as error:
            if error.errno != errno.E2BIG:
                raise
        full = msr_list(probe.nmsrs)
        ioctl_ptr(self.fd, request, full, name)
        return list(full.indices)
