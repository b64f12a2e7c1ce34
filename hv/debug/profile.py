"""`--profile`: where the guest spends its time, by looking at RIP many times a second.

Each sample kicks the vCPU out of the guest, so what is counted is where guest code stood, also in code that KVM
emulates. Driven by tests/linux/test_linux.py.
"""

from __future__ import annotations

__all__ = ["Profiler"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.debug.symbols import Symbols
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

KERNEL_HALF = 1 << 63


class Profiler:
    """Samples every vCPU `hz` times a second while the machine runs."""

    def __init__(self, machine: Machine, hz: float) -> None:
        self._machine = machine
        self._period = 1 / hz
        self.samples: dict[tuple[int, int], int] = {}      # (ring, rip) -> count
        self._asked: set[int] = set()
        machine.loop.call_later(self._period, self._tick)

    def _tick(self) -> None:
        machine = self._machine
        if machine.stopping:
            return
        if machine.running() and not machine.pausing:
            for vcpu in machine.vcpus:
                if vcpu.index not in self._asked:       # one that is slow to come out is asked once
                    self._asked.add(vcpu.index)
                    machine.run_on_vcpu(vcpu.index, self._sample)
        machine.loop.call_later(self._period, self._tick)

    def _sample(self, vcpu: Vcpu) -> None:
        self._asked.discard(vcpu.index)
        key = (vcpu.fd.get_sregs().cs.dpl, vcpu.fd.get_regs().rip)
        self.samples[key] = self.samples.get(key, 0) + 1

    def functions(self, symbols: Symbols) -> list[tuple[str, int]]:
        """(function, samples), most first. Ring 3 is one line; addresses without a name stand by page."""
        counts: dict[str, int] = {}
        for (ring, rip), count in self.samples.items():
            name = "(ring 3)" if ring else symbols.function(rip)[0] or f"{rip & ~0xFFF:#x}"
            counts[name] = counts.get(name, 0) + count
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def report(self, symbols: Symbols, most: int = 40) -> str:
        """A table: share, samples, function."""
        total = sum(self.samples.values())
        if not total:
            return "profile: no samples; the guest ended too soon"
        lines = [f"profile: {total} samples, one each {self._period * 1000:g} ms"]
        for name, count in self.functions(symbols)[:most]:
            lines.append(f"  {count / total:6.1%} {count:7}  {name}")
        return "\n".join(lines)
