"""Noticing that a guest has stopped for good: every processor halted with interrupts off.

Linux without ACPI ends a power-off this way, small kernels their main function. With the interrupt controllers in
the kernel HLT makes no exit, so each processor is asked once a second, in its own thread. A processor that was never
started waits for another's INIT and counts as halted. Driven by tests/kvm/test_guests.py.
"""

from __future__ import annotations

__all__ = ["PERIOD", "watch_for_halt"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

PERIOD = 1.0                    # seconds between two looks
UNINITIALIZED, INIT_RECEIVED, HALTED = 1, 2, 3      # KVM_MP_STATE_*
RFLAGS_IF = 1 << 9
ROUNDS = 2                      # looks in a row that must agree: the processors are not asked at the same instant


class _Watch:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._asleep: dict[int, bool] = {}
        self._rounds = 0

    def look(self) -> None:
        """Judge the answers of the last round, and ask again."""
        machine = self._machine
        if not machine.running():
            return
        count = len(machine.vcpus)
        if machine.pausing:
            self._rounds = 0            # held vCPUs answer nothing: asking again would only pile up tasks
        elif len(self._asleep) == count:
            self._rounds = self._rounds + 1 if all(self._asleep.values()) else 0
            if self._rounds >= ROUNDS:
                machine.stop("halt", "every processor sleeps with interrupts off; nothing can wake the guest")
                return
            self._asleep = {}
            for index in range(count):
                machine.run_on_vcpu(index, self._ask)
        machine.loop.call_later(PERIOD, self.look)

    def _ask(self, vcpu: Vcpu) -> None:
        state = vcpu.fd.get("MP_STATE").mp_state    # type: ignore[attr-defined]
        self._asleep[vcpu.index] = state in (UNINITIALIZED, INIT_RECEIVED) or (
            state == HALTED and not vcpu.fd.get_regs().rflags & RFLAGS_IF)


def watch_for_halt(machine: Machine) -> None:
    """Ask `machine`'s processors from now on; stop it with reason "halt" when none can ever wake."""
    watch = _Watch(machine)
    for index in range(len(machine.vcpus)):
        machine.run_on_vcpu(index, watch._ask)
    machine.loop.call_later(PERIOD, watch.look)
