"""The boot path: from a configuration to a machine whose boot processor stands at the kernel's first instruction.

`build` is one linear function; read it top to bottom, then the helpers below it in call order. The order of
the KVM calls matters: a memory slot or an MSR filter set after the interrupt controllers exist waits 7 to 12 ms for
a grace period of the kernel's (SRCU), before them 20 us.
"""

from __future__ import annotations

__all__ = ["build"]

from time import perf_counter_ns

from hv.boot.load import prepare
from hv.devices.bus import MmioBus, PioBus
from hv.errors import ConfigError
from hv.kvm.system import Kvm
from hv.machine.console import Console
from hv.machine.cpuid import for_vcpu
from hv.machine.files import open_file
from hv.machine.platform import add_devices
from hv.machine.registers import apply_entry
from hv.machine.vcpu import Vcpu
from hv.memory.guest import GuestMemory
from hv.memory.layout import IDENTITY_MAP, TSS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.boot.load import Prepared
    from hv.machine.config import MachineConfig
    from hv.machine.machine import Machine
    from hv.softkvm.helper import SoftKvm

# What every Linux guest is told: where its console is, and that a reboot or a panic ends the machine through the
# keyboard controller's reset line (Documentation/admin-guide/kernel-parameters.txt).
LINUX_CMDLINE = b"console=ttyS0 reboot=k panic=-1"
BUILT_IN = "demo"


def build(machine: Machine) -> None:
    """Give `machine` its memory, VM, devices, kernel and processors, in that order."""
    config = machine.config
    kernel = open_kernel(config)
    initrd = None if config.initrd is None else open_file(config.initrd, "initrd")
    modules = [(open_file(source, "module"), arguments.encode()) for source, arguments in config.modules]
    machine.phases["kernel_opened"] = perf_counter_ns()

    machine.memory = memory = GuestMemory(config.memory, backing=config.backing, huge=config.huge, ksm=config.ksm,
                                          prefault=config.prefault)
    machine.kvm = kvm = Kvm()
    kvm.require_api()
    machine.vm = vm = kvm.create_vm()
    for slot, region in enumerate(memory.regions):
        vm.set_memory(slot, region.gpa, region.size, region.host)
    machine.softkvm = helper = software_kvm_help(machine, kernel)
    if helper:
        helper.attach()
    vm.set_identity_map_addr(IDENTITY_MAP)
    vm.set_tss_addr(TSS)
    vm.create_irqchip()
    vm.create_pit()
    machine.phases["vm_created"] = perf_counter_ns()

    machine.pio, machine.mmio, machine.console = PioBus(), MmioBus(), Console()
    add_devices(machine)

    machine.cmdline = command_line(config, kernel, helper)
    entry = kernel.load(memory, cmdline=machine.cmdline, initrd=initrd, modules=modules, cpus=config.cpus,
                        acpi=config.acpi, reserved=helper.reserved if helper else [])
    machine.phases["kernel_loaded"] = perf_counter_ns()

    cpuid = kvm.supported_cpuid()
    if helper:
        helper.adjust_cpuid(cpuid)
    for index in range(config.cpus):
        vcpu = vm.create_vcpu(index)
        machine.vcpus.append(Vcpu(machine, vcpu))
        vcpu.set_cpuid(for_vcpu(cpuid, index, config.cpus))
    apply_entry(machine.vcpus[0].fd, entry)


def open_kernel(config: MachineConfig) -> Prepared:
    """The kernel file, its format recognised; the built-in guest where none is named."""
    source = config.kernel
    if source is None:
        from hv.guests import path

        source = path(BUILT_IN)
    image: bytes | mmap = open_file(source, "kernel")
    return prepare(image, config.boot_protocol, name=source if isinstance(source, str) else "kernel")


def software_kvm_help(machine: Machine, kernel: Prepared) -> SoftKvm | None:
    """The helper for a KVM that emulates ring 0, where there is one to help and the user did not forbid it.

    Measuring costs 2 ms. That is nothing to Linux, which must be told on its command line; for other guests the
    helper measures when it is first called, if ever.
    """
    wish = machine.config.softkvm
    if wish == "off":
        return None
    from hv.softkvm.detect import is_candidate, is_software

    if wish == "auto" and not (is_software(machine.kvm) if kernel.is_linux else is_candidate()):
        return None
    from hv.softkvm.helper import SoftKvm

    return SoftKvm(machine)


def command_line(config: MachineConfig, kernel: Prepared, helper: SoftKvm | None) -> bytes:
    """pyhv's defaults, then what software KVM needs, then the user's words, which win where they conflict."""
    try:
        words = (config.cmdline or "").encode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        words = (config.cmdline or "").encode("utf-8", "surrogateescape")
    if b"\0" in words:
        raise ConfigError("the command line contains a NUL byte", "it would end there")
    if config.raw_cmdline or not kernel.is_linux:
        return words
    return b" ".join(part for part in (LINUX_CMDLINE, helper.cmdline() if helper else b"", words) if part)
