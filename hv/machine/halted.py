"""Noticing that a guest has stopped for good: every processor halted with interrupts off.

Linux without ACPI ends a power-off this way, small kernels their main function. With the interrupt controllers in
the kernel HLT makes no exit, so a processor has to be asked, in its own thread. Asking wakes it: a guest that sleeps
would wake for our sake. So the time that the threads have run is watched, which disturbs nobody:

    a thread has run since the last look    its processor is at work, or was: look again in a second
    none has                                whoever has run since he was asked last is asked, once
    all sleep with interrupts off           they are asked once more, since they did not answer at the same instant
    somebody can wake                       looks become rarer, and stay so while he does no more than a timer's work

A guest at rest so is looked at every LONGEST seconds, and believed to be able to wake for STALE seconds: where it halts
for good after less than BURST_NS of work, that is noticed so much later. Looks of all machines fall on the same
instants: a process with hundreds of sleeping guests wakes for them once. A processor that was never started waits for
another's INIT and counts as halted. Driven by tests/kvm/test_guests.py and tests/kvm/test_fleet.py.
"""

from __future__ import annotations

__all__ = ["LONGEST", "PERIOD", "watch_for_halt"]

from time import clock_gettime_ns, monotonic, thread_time_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine
    from hv.machine.vcpu import Vcpu

PERIOD = 1.0                    # seconds between two looks while the guest is at work
LONGEST = 10.0                  # and where it sleeps
SETTLED_NS = 500_000            # getting back to sleep after an answer takes less; a processor that works takes more
BURST_NS = 100_000_000          # one that can wake may do so much and is believed still: timers, ring 0 emulated
STALE = 60.0                    # seconds after which it is asked again if it has run at all
CPU_CLOCK_OF_THREAD = 6         # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED (include/linux/posix-timers.h)
UNINITIALIZED, INIT_RECEIVED, HALTED = 1, 2, 3      # KVM_MP_STATE_*
RFLAGS_IF = 1 << 9
ROUNDS = 2                      # answers in a row that must agree: the processors are not asked at the same instant


class _Watch:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ran = [0] * len(machine.vcpus)            # ns that the threads had run at the last look
        self._asked: set[int] = set()                   # processors that have not answered yet
        # processor: (sleeps for good, ns it had run when it said so, when that was)
        self._answers: dict[int, tuple[bool, int, float]] = {}
        self._rounds = 0
        self._period = PERIOD

    def look(self) -> None:
        """See who has run, ask whom it is worth to ask, and come again."""
        machine = self._machine
        if not machine.running():
            return
        now = [_run_ns(vcpu) for vcpu in machine.vcpus]
        quiet = True
        for index, (ran, seen) in enumerate(zip(now, self._ran, strict=True)):
            answer = self._answers.get(index)
            if answer is None:
                quiet &= ran <= seen + SETTLED_NS
                continue
            asleep, then, since = answer
            believed = not asleep and monotonic() < since + STALE
            if ran > then + (BURST_NS if believed else SETTLED_NS) and self._answers.get(index) is answer:
                del self._answers[index]                # it has been awake since
                quiet &= ran <= max(seen, then) + (SETTLED_NS if asleep else BURST_NS)
        self._ran = now
        if not quiet:
            self._rounds, self._period = 0, PERIOD
        else:
            self._period = min(2 * self._period, LONGEST)
            if not machine.pausing:
                self._ask([index for index in range(len(now)) if index not in self._answers])
        machine.loop.call_later(self._period - monotonic() % self._period, self.look)

    def _ask(self, indices: list[int]) -> None:
        for index in indices:
            if index not in self._asked:        # else it is busy with something that takes long
                self._asked.add(index)
                self._machine.run_on_vcpu(index, self._answer)

    def _answer(self, vcpu: Vcpu) -> None:
        state = vcpu.fd.get("MP_STATE").mp_state    # type: ignore[attr-defined]
        asleep = state in (UNINITIALIZED, INIT_RECEIVED) or (
            state == HALTED and not vcpu.fd.get_regs().rflags & RFLAGS_IF)
        self._asked.discard(vcpu.index)
        self._answers[vcpu.index] = asleep, thread_time_ns(), monotonic()
        if not asleep:
            self._rounds = 0
        elif len(self._answers) == len(self._ran):
            self._machine.loop.call(self._judge)

    def _judge(self) -> None:
        """All have answered, the last of them that it sleeps for good."""
        machine = self._machine
        if not all(asleep for asleep, _, _ in self._answers.values()) or machine.pausing or not machine.running():
            return
        self._rounds += 1
        if self._rounds >= ROUNDS:
            machine.stop("halt", "every processor sleeps with interrupts off; nothing can wake the guest")
        else:
            self._answers.clear()
            self._ask(list(range(len(self._ran))))


def _run_ns(vcpu: Vcpu) -> int:
    """How long the processor's thread has run; 0 where it has ended, or not begun."""
    try:
        return clock_gettime_ns(~vcpu.tid << 3 | CPU_CLOCK_OF_THREAD) if vcpu.tid else 0
    except OSError:
        return 0


def watch_for_halt(machine: Machine) -> None:
    """Watch `machine`'s processors from now on; stop it with reason "halt" when none can ever wake."""
    _Watch(machine).look()
