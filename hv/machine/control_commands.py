"""The commands that every control socket has (docs/control.md); how one is written stands in control_call.py.

Driven by tests/kvm/test_control.py.
"""

from __future__ import annotations

__all__ = ["COMMANDS"]

import os
from time import clock_gettime, perf_counter_ns

from hv.errors import ConfigError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.devices.virtio.device import VirtioDevice
    from hv.machine.control_call import Call, Reply
    from hv.machine.machine import Machine

# name -> where the function is; those that aren't here are loaded when they are first asked for.
COMMANDS = {name: f"hv.machine.control_commands:{name}" for name in (
    "balloon", "console", "help", "input", "link", "pause", "resume", "stats", "status", "stop")}

TIMEOUT_MOST = 3600.0
_HISTORY_MOST = 1 << 20
# What the device models count, where they do.
_COUNTERS = ("sent", "received", "dropped", "longest_sent", "discarded", "target", "actual", "errors", "refused")
_CPU_CLOCK_OF_THREAD = 6        # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED (include/linux/posix-timers.h)


def help(call: Call) -> Reply:
    """The commands and their fields."""
    from hv.machine.control_call import signature

    server = call.client.server
    return {"commands": {name: signature(server.command(name)) for name in sorted(server.commands)}}


def status(call: Call) -> Reply:
    """What this machine is, and whether it runs."""
    machine = call.machine
    config = machine.config
    kernel = config.kernel
    _look(machine)
    return {
        "name": call.client.server.control.name, "pid": os.getpid(), "state": _state(machine),
        "uptime": round((perf_counter_ns() - machine.phases["first_entry"]) / 1e9, 3) if _started(machine) else 0.0,
        "cpus": config.cpus, "memory": config.memory, "backing": config.backing,
        "kernel": "guest:demo" if kernel is None else kernel if isinstance(kernel, str) else "(bytes)",
        "cmdline": machine.cmdline.decode(errors="replace"), "softkvm": machine.softkvm is not None,
        "devices": [{"name": device.name, "kind": device.NAME, "driven": device.driven}
                    for device in machine.devices.values()],
        "warnings": list(machine.warnings),
    }


def _look(machine: Machine) -> None:
    """What has become of the file behind guest RAM is among the warnings."""
    if machine.memory.look is not None:
        machine.memory.look()


def _started(machine: Machine) -> bool:
    return "first_entry" in machine.phases


def _state(machine: Machine) -> str:
    if not machine.running():
        return "stopping" if _started(machine) else "starting"
    return "paused" if machine.pausing else "running"


def pause(call: Call) -> Reply:
    """Hold the vCPUs, the devices and the guest's clocks."""
    _require_running(call.machine)
    _look(call.machine)
    call.machine.freeze()
    return {"state": _state(call.machine)}


def resume(call: Call) -> Reply:
    """Go on."""
    _require_running(call.machine)
    call.machine.thaw()
    return {"state": _state(call.machine)}


def _require_running(machine: Machine) -> None:
    if not machine.running():
        raise StateError(f"the machine is {_state(machine)}")


def stop(call: Call, *, timeout: float = 10.0, force: bool = False) -> None:
    """Press the power button, and pull the plug after `timeout` seconds; at once where `force`.

    The reply comes when the machine has ended, and says how.
    """
    if not 0 <= timeout <= TIMEOUT_MOST:
        raise ConfigError(f"stop: timeout {timeout} is not between 0 and {TIMEOUT_MOST:g} seconds")
    machine = call.machine
    forced = force
    timer: object = None

    def pull_plug() -> None:
        nonlocal forced
        forced = True
        machine.stop("quit", "stopped by its control socket")

    def ended() -> Reply:
        if timer is not None:
            machine.loop.cancel(timer)
        outcome = machine.outcome
        assert outcome is not None
        return {"reason": outcome.reason, "detail": outcome.detail, "code": outcome.code, "forced": forced}

    call.on_end = ended
    if force:
        pull_plug()
        return
    machine.thaw()              # one that is paused could not shut down
    machine.power.press_power_button()
    timer = machine.loop.call_later(timeout, pull_plug)


def console(call: Call, *, history: int = 0, view: bool = False) -> None:
    """From the reply on, this connection is the guest's console; with `view` nothing is typed."""
    if not 0 <= history <= _HISTORY_MOST:
        raise ConfigError(f"console: history {history} is not between 0 and {_HISTORY_MOST} bytes")
    call.client.become_console(history, types=not view)


def input(call: Call, *, text: str) -> Reply:
    """Type `text` at the guest's console."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ConfigError("input: text holds half a surrogate pair, which is no character") from None
    call.machine.console.send(data)
    return {"bytes": len(data), "waiting": call.machine.console.waiting}


def balloon(call: Call, *, target: int | None = None) -> Reply:
    """How much memory the guest has given up; with `target`, how much it should."""
    device: Any = _device(call.machine, "balloon0", "balloon")
    if target is not None:
        device.set_target(target)
    return {"target": device.target, "actual": device.actual}


def link(call: Call, *, device: str, up: bool) -> Reply:
    """Plug a network card's cable in, or pull it."""
    card: Any = _device(call.machine, device, "net")
    card.set_link(up)
    return {"device": device, "up": card.link}


def _device(machine: Machine, name: str, kind: str) -> VirtioDevice:
    device = machine.devices.get(name)
    if device is None or kind != device.KIND or not hasattr(device, {"net": "set_link"}.get(kind, "set_target")):
        there = [other.name for other in machine.devices.values() if kind == other.KIND]
        raise ConfigError(f"the machine has no {kind} device {name!r:.80}",
                          f"it has {', '.join(there)}" if there else f"boot with --{kind}")
    return device


def stats(call: Call) -> Reply:
    """Counters and memory. Exits are counted only by `pyhv boot --stats` or --json."""
    machine = call.machine
    _look(machine)
    return {
        "vcpus": [{"cpu_seconds": _cpu_seconds(vcpu.tid), "exits": _exits(vcpu.exits)} for vcpu in machine.vcpus],
        "measured": machine.measure,
        "memory": _memory(machine),
        "console": {"printed": machine.console.printed, "waiting": machine.console.waiting},
        "devices": {device.name: _counters(device) for device in machine.devices.values()},
        "softkvm": dict(machine.softkvm.counters) if machine.softkvm is not None else {},
        "unclaimed": {"ports": machine.pio.unclaimed, "mmio": machine.mmio.unclaimed},
        "warnings": list(machine.warnings),
    }


def _cpu_seconds(tid: int) -> float:
    """Processor time of a thread of ours; 0.0 once it has ended."""
    try:
        return clock_gettime((~tid << 3) | _CPU_CLOCK_OF_THREAD) if tid else 0.0
    except OSError:
        return 0.0


def _exits(counted: dict[int, list[int]]) -> dict[str, int]:
    from hv.kvm import const

    names = {value: name.removeprefix("KVM_EXIT_") for name, value in vars(const).items()
             if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")}
    return {names.get(reason, str(reason)): count for reason, (count, _) in counted.copy().items()}


def _counters(device: VirtioDevice) -> dict[str, Any]:
    found = {name: getattr(device, name) for name in _COUNTERS if isinstance(getattr(device, name, None), int)}
    return found | {"faults": device.faults, "warnings": list(device.warnings)}


def _memory(machine: Machine) -> dict[str, int]:
    """Bytes: the guest's RAM that the host has given it (`rss`; `pss` counts shared pages in parts), the process's.

    The kernel may have joined the guest's range with a neighbour; that counts then, too.
    """
    ranges = [(region.host, region.host + region.size) for region in machine.memory.regions]
    found = {"size": machine.config.memory, "rss": 0, "pss": 0}
    ours = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if line[0] in "0123456789abcdef":
                first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
                ours = any(first < end and start < last for start, end in ranges)
            elif ours and line.startswith(("Rss:", "Pss:")):
                found[line[:3].lower()] += int(line.split()[1]) << 10
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith(("Rss:", "Pss:")):
                found[f"process_{line[:3].lower()}"] = int(line.split()[1]) << 10
    return found
