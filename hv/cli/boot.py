"""`pyhv boot`: the options, and the run from configuration to exit code."""

from __future__ import annotations

__all__ = ["OPTIONS", "boot", "drive"]

import gc

from hv.cli.options import FLAG, FLOAT, INT, MANY, MAYBE, TEXT, Option
from hv.cli.say import say
from hv.errors import ConfigError
from hv.machine.config import MachineConfig, parse_size
from hv.machine.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.devices.virtio.device import VirtioDevice
    from hv.machine.config import DeviceConfig

OPTIONS = (
    Option("--initrd", TEXT, None, "FILE", "initial RAM disk (for Linux: a cpio archive, compressed or not)"),
    Option("--cmdline", TEXT, None, "TEXT", "added to the kernel's command line"),
    Option("--raw-cmdline", FLAG, False, "", "pass --cmdline alone, without pyhv's defaults"),
    Option("--memory", TEXT, "128M", "SIZE", "guest RAM: 512M, 8G, ..."),
    Option("--cpus", INT, 1, "N", "processors, 1 to 64"),
    Option("--module", MANY, None, "FILE[,ARGS]", "Multiboot module; may be given several times"),
    Option("--boot-protocol", TEXT, None, "NAME", "linux64, pvh, multiboot or flat, instead of the sniffed one"),
    Option("--backing", TEXT, "anon", "KIND", "guest RAM as anon or memfd"),
    Option("--hugepages", TEXT, "", "KIND", "back guest RAM by huge pages: thp or 2M"),
    Option("--ksm", FLAG, False, "", "let the host merge equal pages of guest RAM"),
    Option("--prefault", FLAG, False, "", "touch all guest RAM before the guest starts"),
    Option("--disk", MANY, None, "FILE[,...]", "a disk: readonly, direct, overlay=temp|FILE, serial=TEXT, queues=N, "
           "iops=N, bps=N, vhost-user=SOCKET (docs/disk.md)"),
    Option("--net", MANY, None, "KIND[,...]", "a network card: tap[=NAME], user[,forward=PORT:PORT], pair=SOCKET, "
           "packet=INTERFACE[,netns=PATH]; mac=, rate=, vhost-user=SOCKET (docs/net.md)"),
    Option("--console", TEXT, "serial", "KIND", "the guest's console: serial or virtio (docs/console.md)"),
    Option("--port", MANY, None, "NAME,KIND=PATH", "a virtio-console port: socket=PATH or file=PATH"),
    Option("--rng", FLAG, False, "", "an entropy device"),
    Option("--balloon", MAYBE, None, "[=SIZE]", "a memory balloon, of that size at first (docs/balloon.md)", "0"),
    Option("--vsock", TEXT, None, "SOCKET[,cid=N]", "a channel to the host: SOCKET for its side (docs/vsock.md)"),
    Option("--share", MANY, None, "DIR[,...]", "a folder of the host, by virtio-fs: tag=NAME, readonly, "
           "vhost-user=SOCKET (docs/share.md)"),
    Option("--device", MANY, None, "FILE.py:CLASS[,...]", "a device of your own (docs/adding-a-virtio-device.md)"),
    Option("--transport", TEXT, "auto", "KIND", "how virtio devices are attached: mmio, pci, or what the kernel has"),
    Option("--dirty-ring", INT, 0, "N", "track changes by rings of N entries for each processor, not by the dirty log"),
    Option("--softkvm", TEXT, "auto", "MODE", "help for a KVM that emulates ring 0: auto, on, off"),
    Option("--no-acpi", FLAG, False, "", "give the guest no ACPI tables, only an MP table"),
    Option("--debug-exit", MAYBE, None, "[=PORT]", "isa-debug-exit: writing v ends pyhv with (v << 1) | 1", "0xf4"),
    Option("--timeout", FLOAT, None, "SECONDS", "stop the guest after so long, exit code 124"),
    Option("--snapshot", TEXT, None, "NAME", "save the VM under that name, in the store or at a path, when:"),
    Option("--snapshot-when", TEXT, None, "TEXT", "its console has printed this"),
    Option("--snapshot-on-signal", FLAG, False, "", "pyhv gets SIGUSR1; again and again as NAME-2, NAME-3, ..."),
    Option("--snapshot-stop", FLAG, False, "", "end the VM once it is saved"),
    Option("--name", TEXT, None, "NAME", "what `pyhv vm` calls it [default: vm-PID]"),
    Option("--control", TEXT, None, "PATH", "the control socket, elsewhere than usual (docs/control.md)"),
    Option("--no-control", FLAG, False, "", "no control socket: `pyhv vm` does not see it"),
    Option("--log", TEXT, None, "FILE", "copy what the guest prints to FILE"),
    Option("--json", TEXT, None, "FILE", "write what happened: phases, exits, exit reason"),
    Option("--trace", TEXT, None, "KINDS", "print exits, io, mmio, msr, insn (comma-separated) on standard error"),
    Option("--symbols", TEXT, None, "FILE", "ELF file or System.map for names in traces and profiles"),
    Option("--stats", FLAG, False, "", "print exits by reason and the time spent outside the guest"),
    Option("--profile", MAYBE, None, "[=HZ]", "sample the guest's RIP and print where time went", "100"),
    Option("--quiet", FLAG, False, "", "do not print how the guest ended"),
    Option("--debug", FLAG, False, "", "print tracebacks"),
)

# Commands of a control socket beyond the built-in ones: name -> "module:function" (hv/machine/control_call.py).
VM_COMMANDS: dict[str, str] = {"snapshot": "hv.snapshot.commands:snapshot",
                               "migrate": "hv.snapshot.commands:migrate"}

CONTROL_AFTER = 0.03            # s: runs so short never load what makes the socket; nobody could have used it


def boot(values: dict[str, Any], kernel: str | None) -> int:
    """Boot `kernel` with parsed option values; returns the exit code (README lists them)."""
    return drive(Machine(config_of(values, kernel)), values, kernel)


def drive(machine: Machine, values: dict[str, Any], kernel: str | None = None) -> int:
    """Run a built machine on this process's terminal until it ends; the exit code."""
    saver = None
    try:
        if (seconds := values["timeout"]) is not None and not seconds > 0:
            raise ConfigError(f"a timeout of {seconds} s is not positive", "change --timeout")
        machine.config.timeout = seconds        # this run's, not that of the run in which it was saved
        watch = None
        if values.get("snapshot") or values.get("snapshot_when") or values.get("snapshot_on_signal") \
                or values.get("snapshot_stop"):
            from hv.cli.snapshot_when import Saver

            saver = Saver(machine, values)
        if values["json"] or values["trace"] or values["stats"] or values["profile"]:
            from hv.cli.watch import Watch

            watch = Watch(machine, values, kernel)
        from hv.cli.terminal import Terminal

        _open_control(machine, values)
        if machine.softkvm is not None and not values["quiet"]:
            say(f"pyhv: {machine.softkvm.summary(machine.cmdline)}")
        gc.enable()
        with Terminal(machine, log=values["log"]):
            outcome = machine.run()
        if watch is not None:
            watch.report(outcome)
    finally:
        if saver is not None:
            saver.close()
        machine.close()
    for device in machine.devices.values():
        if not values["quiet"]:
            _say_about(device)
    for text in () if values["quiet"] else machine.warnings:
        say(f"pyhv: {text}")
    if outcome.reason not in ("poweroff", "reset", "debug-exit", "quit") and not values["quiet"]:
        say(f"pyhv: {outcome.reason}: {outcome.detail}")
    if outcome.error is not None and values["debug"]:
        raise outcome.error
    return outcome.code


def _open_control(machine: Machine, values: dict[str, Any]) -> None:
    """The control socket: one that was asked for now, the usual one soon, while the guest runs already."""
    name, path = values.get("name"), values.get("control")
    if values.get("no_control"):
        if path is not None:
            raise ConfigError("--no-control and --control exclude each other", "give one of them")
    elif name is not None or path is not None:
        from hv.machine.control import open_control

        open_control(machine, name, path, VM_COMMANDS)
    else:
        machine.loop.call_later(CONTROL_AFTER, lambda: _open_usual_control(machine, values["quiet"]))


def _open_usual_control(machine: Machine, quiet: bool) -> None:
    from hv.machine.control import open_usual

    why_not = open_usual(machine, VM_COMMANDS)
    if why_not and not quiet:
        say(f"pyhv: {why_not}; `pyhv vm` does not see this one")


def _say_about(device: VirtioDevice) -> None:
    """What the user should know of a device once the guest has ended."""
    if not device.driven:
        say(f"pyhv: {device.name}: the guest never drove it; its kernel needs {device.DRIVER}")
    for text in device.warnings:
        say(f"pyhv: {device.name}: {text}")
    if device.faults:
        say(f"pyhv: {device.name}: the guest broke {device.faults} rules, first: {device.fault_texts[0]}")


def config_of(values: dict[str, Any], kernel: str | None) -> MachineConfig:
    """The MachineConfig that the option values ask for. ConfigError names the option that can't be."""
    port: int | None = None
    if values["debug_exit"] is not None:
        try:
            port = int(str(values["debug_exit"]), 0)
        except ValueError:
            raise ConfigError(f"--debug-exit: {values['debug_exit']!r} is no port", "for example 0xf4") from None
    modules = []
    for text in values["module"]:
        name, _, arguments = text.partition(",")
        modules.append((name, arguments))
    devices: tuple[DeviceConfig, ...] = ()
    if any(values[key] for key in ("disk", "net", "port", "rng", "balloon", "vsock", "share", "device")) \
            or values["console"] != "serial":
        from hv.cli.devices import configurations

        devices = configurations(values)
    return MachineConfig(
        kernel, initrd=values["initrd"], cmdline=values["cmdline"], raw_cmdline=values["raw_cmdline"],
        memory=parse_size(str(values["memory"])), cpus=values["cpus"], modules=tuple(modules),
        boot_protocol=values["boot_protocol"], backing=values["backing"], huge=values["hugepages"],
        ksm=values["ksm"], prefault=values["prefault"], softkvm=values["softkvm"], debug_exit=port,
        timeout=values["timeout"], acpi=not values["no_acpi"],
        devices=devices, transport=values["transport"], dirty_ring=values["dirty_ring"])
