"""What the user asks of a machine. Checked here, once; read-only afterwards by custom."""

from __future__ import annotations

__all__ = ["MAX_CPUS", "MachineConfig", "parse_size"]

from hv.errors import ConfigError

MAX_CPUS = 64       # what the MP table in the BIOS area and one xAPIC cluster of ids comfortably hold
_UNITS = {"": 1 << 20, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SOFTKVM_MODES = ("auto", "on", "off")
HUGE_MODES = ("", "thp", "2M")
RING_LEAST, RING_MOST = 1024, 65536     # KVM keeps some free (virt/kvm/dirty_ring.c); KVM_DIRTY_RING_MAX_ENTRIES
BACKINGS = ("anon", "memfd")
TRANSPORTS = ("auto", "mmio", "pci")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from hv.devices.virtio.device import VirtioDevice

    class DeviceConfig(Protocol):
        """What the user asks of one device; each model's file has its own (hv/devices/virtio)."""

        def create(self) -> VirtioDevice:
            """The device, not yet attached. ConfigError where it can't be."""


class MachineConfig:
    """Everything that decides how a machine is built.

    `kernel` is a path, bytes, or None for the built-in guest; `memory` is in bytes; `timeout` in
    seconds or None; `debug_exit` a port or None; `devices` are configurations of virtio devices, in the order in
    which the guest finds them. ConfigError names the field that can't be.
    """

    __slots__ = (
        "acpi", "backing", "boot_protocol", "cmdline", "cpus", "debug_exit", "devices", "dirty_ring", "huge", "initrd",
        "kernel", "ksm", "memory", "modules", "prefault", "raw_cmdline", "softkvm", "timeout", "transport",
    )

    def __init__(self, kernel: str | bytes | None = None, *, initrd: str | bytes | None = None,
                 cmdline: str | None = None, raw_cmdline: bool = False, memory: int = 128 << 20, cpus: int = 1,
                 modules: tuple[tuple[str, str], ...] = (), boot_protocol: str | None = None,
                 backing: str = "anon", huge: str = "", ksm: bool = False, prefault: bool = False,
                 softkvm: str = "auto", debug_exit: int | None = None, timeout: float | None = None,
                 acpi: bool = True, devices: tuple[DeviceConfig, ...] = (), transport: str = "auto",
                 dirty_ring: int = 0) -> None:
        if not 1 <= cpus <= MAX_CPUS:
            raise ConfigError(f"{cpus} processors asked for, possible are 1 to {MAX_CPUS}", "change --cpus")
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"a timeout of {timeout} s is not positive", "change --timeout")
        if debug_exit is not None and not 0 < debug_exit <= 0xFFFF:
            raise ConfigError(f"debug-exit port {debug_exit:#x} is no port", "ports are 1 to 0xffff; usual is 0xf4")
        if dirty_ring and (dirty_ring & dirty_ring - 1 or not RING_LEAST <= dirty_ring <= RING_MOST):
            raise ConfigError(f"a dirty ring of {dirty_ring} entries: possible are powers of two from {RING_LEAST} to "
                              f"{RING_MOST}", "change --dirty-ring")
        for name, value, allowed in (("softkvm", softkvm, SOFTKVM_MODES), ("huge", huge, HUGE_MODES),
                                     ("backing", backing, BACKINGS), ("transport", transport, TRANSPORTS)):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is not one of {', '.join(map(repr, allowed))}")
        self.kernel = kernel
        self.initrd = initrd
        self.cmdline = cmdline
        self.raw_cmdline = raw_cmdline      # True: nothing is added to cmdline
        self.memory = memory
        self.cpus = cpus
        self.modules = modules
        self.boot_protocol = boot_protocol
        # A vhost-user back end maps guest RAM, so there must be something to map (docs/vhost-user.md).
        shared = any(getattr(device, "vhost_user", None) for device in devices)
        self.backing = "memfd" if shared else backing
        self.huge = huge
        self.ksm = ksm
        self.prefault = prefault
        self.softkvm = softkvm
        self.debug_exit = debug_exit
        self.timeout = timeout
        self.acpi = acpi
        self.devices = devices
        self.transport = transport
        self.dirty_ring = dirty_ring        # entries for each vCPU; 0: changes are tracked by the dirty log


def parse_size(text: str) -> int:
    """Bytes from `512M`, `1G`, `65536K`, `4096B`, or a bare number of MiB. ConfigError otherwise."""
    number, unit = text, ""
    if text and text[-1].upper() in _UNITS:
        number, unit = text[:-1], text[-1].upper()
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"size {text!r} is not a number with K, M, G or T", "for example --memory 512M")
    return int(number) * _UNITS[unit]
