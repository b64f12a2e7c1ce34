"""The three handles against the real /dev/kvm."""

from __future__ import annotations

import errno

import pytest

from hv.errors import KernelError
from hv.kvm.const import KVM_CAP_IRQCHIP, KVM_EXIT_IO
from hv.kvm.run import IO_PORT
from hv.kvm.system import Kvm
from hv.memory.guest import GuestMemory

OUT_TWICE = bytes.fromhex("b041" "baf803" "ee" "b00a" "ee" "f4")    # mov al,'A'; mov dx,0x3f8; out; mov al,10; out; hlt


def test_system_handle_answers() -> None:
    with Kvm() as kvm:
        kvm.require_api()
        assert kvm.check(KVM_CAP_IRQCHIP) == 1
        assert kvm.vcpu_mmap_size() >= 4096
        assert kvm.supported_cpuid().nent > 0
        assert 0x10 in kvm.msr_indices()        # IA32_TIME_STAMP_COUNTER


def test_missing_device_is_one_clear_error() -> None:
    with pytest.raises(KernelError) as caught:
        Kvm("/dev/no-such-kvm")
    assert caught.value.errno == errno.ENOENT
    assert "doctor" in caught.value.hint


def test_failing_ioctl_names_itself() -> None:
    wanted = pytest.raises(KernelError, match=r"KVM_SET_USER_MEMORY_REGION\(slot=0 gpa=0x123.*EINVAL")
    with Kvm() as kvm, kvm.create_vm() as vm, wanted:
        vm.set_memory(0, 0x123, 0x1000, 0)


def test_real_mode_guest_exits_on_port_io() -> None:
    memory = GuestMemory(2 << 20)
    with Kvm() as kvm, kvm.create_vm() as vm:
        for slot, region in enumerate(memory.regions):
            vm.set_memory(slot, region.gpa, region.size, region.host)
        with vm.create_vcpu(0) as vcpu:
            memory.write(0x1000, OUT_TWICE)
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags = 0x1000, 2
            vcpu.set_regs(regs)
            assert vcpu.run() == KVM_EXIT_IO
            assert vcpu.run_u16[IO_PORT // 2] == 0x3F8
            vcpu.finish_exit()
            assert vcpu.get_regs().rip == 0x1006
    memory.close()
