"""The boot path: from a configuration to a machine whose boot processor stands at the kernel's first instruction.

`build` is one linear function; read it top to bottom, then the helpers below it in call order. The order of
the KVM calls matters on some hosts: a memory slot set after the interrupt controllers exist costs 7.5 ms on
a software KVM, before them 20 us.
"""

from __future__ import annotations

__all__ = ["build"]

from time import perf_counter_ns

from hv.boot.load import load
from hv.devices.bus import MmioBus, PioBus
from hv.kvm.system import Kvm
from hv.machine.config import parse_size
from hv.machine.console import Console
from hv.machine.cpuid import for_vcpu
from hv.machine.kernel import open_file, open_kernel
from hv.machine.platform import add_devices
from hv.machine.registers import apply_entry
from hv.machine.vcpu import Vcpu
from hv.memory.guest import GuestMemory
from hv.memory.layout import IDENTITY_MAP, TSS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

__all__ += ["parse_size"]


def build(machine: Machine) -> None:
    """Give `machine` its memory, VM, devices, kernel and processors, in that order."""
    config = machine.config
    image = open_kernel(config)
    machine.phases["kernel_opened"] = perf_counter_ns()

    machine.memory = memory = GuestMemory(config.memory, backing=config.backing, huge=config.huge, ksm=config.ksm,
                                          prefault=config.prefault)
    machine.kvm = kvm = Kvm()
    kvm.require_api()
    machine.vm = vm = kvm.create_vm()
    for slot, region in enumerate(memory.regions):
        vm.set_memory(slot, region.gpa, region.size, region.host)
    vm.set_identity_map_addr(IDENTITY_MAP)
    vm.set_tss_addr(TSS)
    vm.create_irqchip()
    vm.create_pit()
    machine.phases["vm_created"] = perf_counter_ns()

    machine.pio, machine.mmio, machine.console = PioBus(), MmioBus(), Console()
    add_devices(machine)

    helper = _software_kvm_help(machine, image)
    machine.cmdline = image.command_line(config, helper.cmdline() if helper else "")
    entry = load(memory, image.image, cmdline=machine.cmdline, initrd=open_file(config.initrd, "initrd"),
                 modules=image.modules(config), cpus=config.cpus, acpi=config.acpi,
                 reserved=helper.reserved if helper else [])
    machine.phases["kernel_loaded"] = perf_counter_ns()

    if helper:
        helper.before_vcpus()
    cpuid = kvm.supported_cpuid()
    for index in range(config.cpus):
        vcpu = vm.create_vcpu(index)
        machine.vcpus.append(Vcpu(machine, vcpu))
        vcpu.set_cpuid(for_vcpu(cpuid, index, config.cpus))
    apply_entry(machine.vcpus[0].fd, entry)
