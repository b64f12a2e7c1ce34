"""Noticing that a guest has stopped for good: every processor halted with interrupts off.

Linux without ACPI ends a power-off this way, small kernels their main function. With the interrupt controllers in
the kernel HLT makes no exit, so a processor has to be asked, in its own thread. Asking wakes it: a guest that sleeps
would wake for our sake. So the time that the threads have run is watched, which disturbs nobody:

    a thread has run since the last look    its processor is at work, or was: look again in a second
    none has                                whoever has run since he was asked last is asked, once
    all sleep with interrupts off           they are asked once more, since they did not answer at the same instant
    somebody can wake                       nothing more until a thread has run; the looks become rarer meanwhile

Looks of all machines fall on the same instants: a process with hundreds of sleeping guests wakes for them once. A
processor that was never started waits for another's INIT and counts as halted. Driven by tests/kvm/test_guests.py and
tests/kvm/test_fleet.py.
"""

from __future__ import annotations

__all__ = ["LONGEST", "PERIOD", "watch_for_halt"]

from time import clock_gettime_ns, monotonic, thread_time_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

PERIOD = 1.0                    # seconds between two looks while the guest is at work
LONGEST = 8.0                   # and where it sleeps
AGAIN = 0.1                     # seconds that a processor which sleeps has to answer in
SETTLED_NS = 500_000            # getting back to sleep after an answer takes less; a processor that works takes more
CPU_CLOCK_OF_THREAD = 6         # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED (include/linux/posix-timers.h)
UNINITIALIZED, INIT_RECEIVED, HALTED = 1, 2, 3      # KVM_MP_STATE_*
RFLAGS_IF = 1 << 9
ROUNDS = 2                      # answers in a row that must agree: the processors are not asked at the same instant


class _Watch:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ran = [0] * len(machine.vcpus)            # ns that the threads had run at the last look
        self._asked: set[int] = set()                   # processors that have not answered yet
        self._answers: dict[int, tuple[bool, int]] = {}     # processor: (sleeps for good, ns it had run then)
        self._rounds = 0
        self._period = PERIOD

    def look(self) -> None:
        """Judge what is known, ask whom it is worth to ask, and come again."""
        machine = self._machine
        if not machine.running():
            return
        now = [_run_ns(vcpu) for vcpu in machine.vcpus]
        quiet = True
        for index, ran in enumerate(now):
            _, then = answer = self._answers.get(index, (False, 0))
            quiet &= ran <= max(self._ran[index], then) + SETTLED_NS
            if ran > then + SETTLED_NS and self._answers.get(index) is answer:
                del self._answers[index]                # it has been awake since
        self._ran = now
        if not quiet:
            self._rounds, self._period = 0, PERIOD
        elif machine.pausing:
            self._rounds, self._period = 0, min(2 * self._period, LONGEST)
        elif unknown := [index for index in range(len(now)) if index not in self._answers]:
            if self._ask(unknown):
                self._later(AGAIN)
                return
        elif not all(asleep for asleep, _ in self._answers.values()):
            self._rounds, self._period = 0, min(2 * self._period, LONGEST)
        else:
            self._rounds += 1
            if self._rounds >= ROUNDS:
                machine.stop("halt", "every processor sleeps with interrupts off; nothing can wake the guest")
                return
            self._answers.clear()
            self._ask(list(range(len(now))))
            self._later(AGAIN)
            return
        self._later(self._period - monotonic() % self._period)

    def _later(self, seconds: float) -> None:
        self._machine.loop.call_later(seconds, self.look)

    def _ask(self, indices: list[int]) -> bool:
        """Have these processors answer; False where all have been asked before, and are busy with something else."""
        fresh = [index for index in indices if index not in self._asked]
        for index in fresh:
            self._asked.add(index)
            self._machine.run_on_vcpu(index, self._answer)
        return bool(fresh)

    def _answer(self, vcpu: Vcpu) -> None:
        state = vcpu.fd.get("MP_STATE").mp_state    # type: ignore[attr-defined]
        asleep = state in (UNINITIALIZED, INIT_RECEIVED) or (
            state == HALTED and not vcpu.fd.get_regs().rflags & RFLAGS_IF)
        self._asked.discard(vcpu.index)
        self._answers[vcpu.index] = asleep, thread_time_ns()


def _run_ns(vcpu: Vcpu) -> int:
    """How long the processor's thread has run; 0 where it has ended, or not begun."""
    try:
        return clock_gettime_ns(~vcpu.tid << 3 | CPU_CLOCK_OF_THREAD) if vcpu.tid else 0
    except OSError:
        return 0


def watch_for_halt(machine: Machine) -> None:
    """Watch `machine`'s processors from now on; stop it with reason "halt" when none can ever wake."""
    _Watch(machine).look()
