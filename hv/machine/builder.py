"""The boot path: from a configuration to a machine whose boot processor stands at the kernel's first instruction.

`build` is one linear function; read it top to bottom, then the helpers below it in call order. The order of
the KVM calls matters: a memory slot or an MSR filter set after the interrupt controllers exist waits 7 to 12 ms for
a grace period of the kernel's (SRCU), before them 20 us. The controllers themselves start such a period, and a VM
that ends within 13 ms waits for it; so they are made as early as can be, and everything that is not needed for them
is imported behind them.
"""

from __future__ import annotations

__all__ = ["build"]

from time import perf_counter_ns

from hv.errors import ConfigError
from hv.kvm.system import Kvm
from hv.memory.guest import GuestMemory
from hv.memory.layout import IDENTITY_MAP, TSS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.boot.entry import EntryState
    from hv.boot.load import Prepared
    from hv.machine.attach import Attached
    from hv.machine.config import MachineConfig
    from hv.machine.machine import Machine
    from hv.softkvm.helper import SoftKvm

# What every Linux guest is told: where its console is, and that a reboot or a panic ends the machine through the
# keyboard controller's reset line (Documentation/admin-guide/kernel-parameters.txt).
LINUX_CMDLINE = b"reboot=k panic=-1"
SERIAL_CONSOLE = b"console=ttyS0"


def build(machine: Machine) -> None:
    """Give `machine` its memory, VM, devices, kernel and processors, in that order."""
    config = machine.config
    machine.memory = memory = GuestMemory(config.memory, backing=config.backing, huge=config.huge, ksm=config.ksm,
                                          prefault=config.prefault)
    machine.kvm = kvm = Kvm()
    kvm.require_api()
    machine.vm = vm = kvm.create_vm()
    if config.dirty_ring:
        from hv.machine.dirtyring import enable_rings

        enable_rings(machine)
    for slot, region in enumerate(memory.regions):
        vm.set_memory(slot, region.gpa, region.size, region.host)
    vm.set_identity_map_addr(IDENTITY_MAP)
    vm.set_tss_addr(TSS)
    machine.softkvm = software_kvm_help(machine)
    vm.create_irqchip()
    machine.phases["vm_created"] = perf_counter_ns()

    from hv.machine.platform import add_devices

    add_devices(machine)

    kernel = open_kernel(config)
    helper = machine.softkvm = confirm_help(machine, kernel)
    attached = virtio_devices(machine, kernel)
    machine.cmdline = command_line(config, kernel, helper, attached)
    entry = load_kernel(machine, kernel, attached)
    machine.phases["kernel_loaded"] = perf_counter_ns()

    from hv.machine.cpuid import for_vcpu
    from hv.machine.registers import apply_entry
    from hv.machine.vcpu import Vcpu

    cpuid = kvm.supported_cpuid()
    if helper:
        helper.adjust_cpuid(cpuid)
    for index in range(config.cpus):
        vcpu = vm.create_vcpu(index)
        machine.vcpus.append(Vcpu(machine, vcpu))
        vcpu.set_cpuid(for_vcpu(cpuid, index, config.cpus))
    apply_entry(machine.vcpus[0].fd, entry)


def software_kvm_help(machine: Machine) -> SoftKvm | None:
    """The helper for a KVM that emulates ring 0, where the processor shows that there may be one to help."""
    wish = machine.config.softkvm
    if wish == "off":
        return None
    if wish == "auto":
        from hv.softkvm.detect import is_candidate

        if not is_candidate():
            return None
    from hv.softkvm.helper import SoftKvm

    helper = SoftKvm(machine)
    helper.attach()
    return helper


def open_kernel(config: MachineConfig) -> Prepared:
    """The kernel file, its format recognised; guest:NAME is one of pyhv's own, guest:demo where none is named."""
    from hv.boot.load import prepare
    from hv.machine.files import open_file

    source = config.kernel
    if source is None or (isinstance(source, str) and source.startswith("guest:")):
        from hv.guests import resolve

        source = resolve(source)
    image: bytes | mmap = open_file(source, "kernel")
    return prepare(image, config.boot_protocol, name=source if isinstance(source, str) else "kernel")


def confirm_help(machine: Machine, kernel: Prepared) -> SoftKvm | None:
    """Measure whether ring 0 is emulated, for Linux, which must be told on its command line.

    That takes 2 ms; for other guests the helper measures when it is first called, if ever.
    """
    helper = machine.softkvm
    if helper is not None and kernel.is_linux and not helper.is_needed():
        helper.detach()
        return None
    return helper


def virtio_devices(machine: Machine, kernel: Prepared) -> Attached | None:
    """The virtio devices of the configuration; None where there are none, and nothing of theirs is loaded."""
    if not machine.config.devices:
        return None
    from hv.machine.attach import attach_devices

    return attach_devices(machine, kernel)


def load_kernel(machine: Machine, kernel: Prepared, attached: Attached | None) -> EntryState:
    """Kernel, initrd and modules into guest memory."""
    from hv.machine.files import open_file

    config, helper = machine.config, machine.softkvm
    initrd = None if config.initrd is None else open_file(config.initrd, "initrd")
    modules = [(open_file(source, "module"), words.encode()) for source, words in config.modules]
    return kernel.load(machine.memory, cmdline=machine.cmdline, initrd=initrd, modules=modules, cpus=config.cpus,
                       acpi=config.acpi, reserved=helper.reserved if helper else [],
                       aml=attached.aml if attached else b"", pci=attached.pci if attached else None)


def command_line(config: MachineConfig, kernel: Prepared, helper: SoftKvm | None,
                 attached: Attached | None) -> bytes:
    """pyhv's defaults, what software KVM needs, the devices, then the user's words, which win where they conflict."""
    try:
        words = (config.cmdline or "").encode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        words = (config.cmdline or "").encode("utf-8", "surrogateescape")
    if b"\0" in words:
        raise ConfigError("the command line contains a NUL byte", "it would end there")
    if config.raw_cmdline:
        return words
    devices = attached.words if attached else []
    console = attached.console if attached and attached.console else SERIAL_CONSOLE
    parts = [console, LINUX_CMDLINE, helper.cmdline() if helper else b""] if kernel.is_linux else []
    return b" ".join(part for part in (*parts, *devices, words) if part)
