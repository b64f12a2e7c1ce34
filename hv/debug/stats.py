"""`--stats`: exits by reason, how long pyhv took over them, and its share of wall time."""

from __future__ import annotations

__all__ = ["collect", "report"]

from hv.debug.trace import exit_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine


def collect(machine: Machine) -> dict[str, object]:
    """Plain data: per reason count and seconds outside KVM_RUN, over all vCPUs; shares are 0 to 1."""
    exits: dict[str, list[float]] = {}
    inside = 0
    for vcpu in machine.vcpus:
        inside += vcpu.inside_ns
        for reason, (count, spent) in vcpu.exits.items():
            entry = exits.setdefault(exit_name(reason), [0, 0])
            entry[0] += count
            entry[1] += spent / 1e9
    outside = sum(spent for _, spent in exits.values())
    total = inside / 1e9 + outside
    return {
        "exits": {name: {"count": int(count), "seconds": spent} for name, (count, spent) in exits.items()},
        "seconds_in_guest": inside / 1e9, "seconds_outside": outside,
        "share_outside": outside / total if total else 0.0,
        "unclaimed_ports": machine.pio.unclaimed, "unclaimed_mmio": machine.mmio.unclaimed,
        "softkvm": dict(machine.softkvm.counters) if machine.softkvm else {},
    }


def report(machine: Machine) -> str:
    """The same as a table."""
    data = collect(machine)
    exits: dict[str, dict[str, float]] = data["exits"]  # type: ignore[assignment]
    lines = ["exits by reason             count    time outside KVM_RUN      each"]
    for name, entry in sorted(exits.items(), key=lambda item: -item[1]["seconds"]):
        lines.append(f"  {name:<24} {entry['count']:>6} {entry['seconds'] * 1000:15.1f} ms "
                     f"{entry['seconds'] / entry['count'] * 1e6:13.1f} us")
    lines.append(f"in the guest {data['seconds_in_guest']:.3f} s, outside {data['seconds_outside']:.3f} s: "
                 f"{data['share_outside']:.1%} of vCPU time outside KVM_RUN")
    if data["unclaimed_ports"] or data["unclaimed_mmio"]:
        lines.append(f"accesses nobody claimed: {data['unclaimed_ports']} port, {data['unclaimed_mmio']} memory")
    help_given: dict[str, int] = data["softkvm"]  # type: ignore[assignment]
    if help_given:
        lines.append("software-KVM help: " + ", ".join(f"{name} {count}" for name, count in sorted(
            help_given.items(), key=lambda item: -item[1])))
    return "\n".join(lines)
