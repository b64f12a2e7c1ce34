"""A vCPU's thread: enter the guest, serve the exit, enter again.

The loop in `_serve` is the hottest code of pyhv: one dict lookup per port access, no object per exit.
Exits that the machine does not know go to `machine.exit_handlers` (software-KVM help, debuggers attach
there); an observer (tracing, statistics) replaces the plain loop by one that looks at every exit.
"""

from __future__ import annotations

__all__ = ["Vcpu"]

import _signal
from _thread import allocate_lock, get_ident, get_native_id, start_new_thread
from errno import EAGAIN, EINTR
from time import perf_counter_ns

from hv.errors import HvError
from hv.kvm.const import KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_MMIO
from hv.kvm.ioctl import KVM_RUN
from hv.kvm.run import (
    EXIT_REASON,
    IO_COUNT,
    IO_DATA_OFFSET,
    IO_DIRECTION,
    IO_PORT,
    IO_SIZE,
    MMIO_ADDR,
    MMIO_DATA,
    MMIO_IS_WRITE,
    MMIO_LEN,
)
from hv.kvm.vcpu import KICK_SIGNAL
from hv.linux.libc import get_errno, run_ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.kvm.vcpu import VcpuFd
    from hv.machine.machine import Machine

_ALL_SIGNALS = _signal.valid_signals()


class Vcpu:
    """One processor of a running machine. `fd` is its KVM handle; its ioctls belong to its thread."""

    def __init__(self, machine: Machine, fd: VcpuFd) -> None:
        self.machine = machine
        self.fd = fd
        self.index = fd.index
        self.first_entry_ns = 0
        self.exits: dict[int, list[int]] = {}   # reason -> [count, ns until the next entry], when measured
        # a byte-wide port access, as kvm_run has it -> (device's read or write, offset, whether it is an OUT)
        self._known_ports: dict[int, tuple[Callable[..., Any], int, int]] = {}
        self.inside_ns = 0                      # time within KVM_RUN, when measured
        self._thread = 0
        self.tid = 0                            # of the thread, as the kernel counts them
        self.parked = False                     # out of the guest and waiting for resume(), or ended
        self._ended = allocate_lock()           # held from start() until the thread has ended

    def start(self) -> None:
        """Start the thread."""
        self._ended.acquire()
        start_new_thread(self._main, ())

    def kick(self) -> None:
        """Make KVM_RUN return soon. Safe from any thread; a kick before KVM_RUN is not lost."""
        if self._thread and self._ended.locked():
            try:
                _signal.pthread_kill(self._thread, KICK_SIGNAL)
            except ProcessLookupError:
                pass

    def join(self, timeout: float = -1) -> bool:
        """Wait for the thread to end."""
        if self._ended.acquire(True, timeout):
            self._ended.release()
            return True
        return False

    # the thread -----------------------------------------------------------------------------------

    def _main(self) -> None:
        machine = self.machine
        try:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, _ALL_SIGNALS)
            self._thread, self.tid = get_ident(), get_native_id()
            self.fd.set_signal_mask()
            self._do_tasks()            # those that came before there was a thread to kick
            self.first_entry_ns = perf_counter_ns()
            if machine.observers or machine.measure:
                self._serve_observed()
            else:
                self._serve()
        except HvError as error:
            machine.stop("internal-error", str(error))
        except Exception as error:      # a bug of ours must stop the VM with a reason, not hang it
            machine.stop("internal-error", f"{type(error).__name__}: {error}", error)
        finally:
            self.parked = True
            try:
                machine.vcpu_ended()
            finally:
                self._ended.release()       # behind it nothing of the machine is touched: close() waits for this

    def _serve(self) -> None:
        machine, view = self.machine, self.fd
        u8, u32, u64 = view.run_u8, view.run_u32, view.run_u64
        known = self._known_ports.get
        # Locals are found three times as fast as a module's names.
        run, fd, request, port_io, mmio = run_ioctl, view.fd, KVM_RUN, KVM_EXIT_IO, KVM_EXIT_MMIO
        at_reason, at_access, at_data = EXIT_REASON // 4, IO_DIRECTION // 8, IO_DATA_OFFSET // 8
        while not machine.stopping:
            while run(fd, request, 0) >= 0:     # stop() kicks, and a kick ends this loop
                reason = u32[at_reason]
                if reason == port_io:
                    # direction, size, port and count lie side by side: one number tells the whole access
                    access = known(u64[at_access])
                    if access is None:
                        self._port_io()
                    elif access[2]:
                        access[0](access[1], 1, u8[u64[at_data]])
                    else:
                        u8[u64[at_data]] = access[0](access[1], 1) & 0xFF
                elif reason == mmio:
                    self._mmio()
                else:
                    self._other(reason)
            self._interrupted()

    def _serve_observed(self) -> None:
        """As _serve, with every exit counted, timed and shown to the observers.

        Observers see port and memory accesses once served, when the value read is known, all others before.
        """
        machine, view, exits = self.machine, self.fd, self.exits
        observers: list[Callable[[Vcpu, int], None]] = machine.observers
        now = perf_counter_ns()
        while not machine.stopping:
            entered = now
            result = run_ioctl(view.fd, KVM_RUN, 0)
            left = perf_counter_ns()
            self.inside_ns += left - entered
            reason = view.run_u32[EXIT_REASON // 4] if result >= 0 else KVM_EXIT_INTR
            if result >= 0 and reason == KVM_EXIT_IO:
                self._port_io()
            elif result >= 0 and reason == KVM_EXIT_MMIO:
                self._mmio()
            for observer in observers:
                observer(self, reason)
            if result < 0:
                self._interrupted()
            elif reason not in (KVM_EXIT_IO, KVM_EXIT_MMIO):
                self._other(reason)
            now = perf_counter_ns()
            entry = exits.get(reason)
            if entry is None:
                entry = exits[reason] = [0, 0]
            entry[0] += 1
            entry[1] += now - left

    def _interrupted(self) -> None:
        error = get_errno()
        if error == EINTR:
            _signal.sigtimedwait((KICK_SIGNAL,), 0)     # take the kick, or every KVM_RUN would return at once
            self._do_tasks()
        elif error != EAGAIN:
            self.machine.stop("internal-error", f"KVM_RUN on vCPU {self.index}: errno {error}")

    def _do_tasks(self) -> None:
        machine = self.machine
        for task in machine.take_kick_tasks(self.index):
            task(self)
        if machine.pausing and not machine.stopping:
            machine.park(self)

    def _port_io(self) -> None:
        """Any port access: 1, 2 or 4 bytes, string instructions with a count, unclaimed ports.

        Plain accesses of a byte to a device are noted for _serve, which does the next ones of their kind itself.
        """
        view, bus = self.fd, self.machine.pio
        u8 = view.run_u8
        port, size, count = view.run_u16[IO_PORT // 2], u8[IO_SIZE], view.run_u32[IO_COUNT // 4]
        start = view.run_u64[IO_DATA_OFFSET // 8]
        outward = u8[IO_DIRECTION]
        if size == count == 1 and (entry := bus.ports.get(port)) is not None:
            self._known_ports[view.run_u64[IO_DIRECTION // 8]] = entry[1] if outward else entry[0], entry[2], outward
        for at in range(start, start + size * count, size):
            if outward:
                bus.write(port, size, int.from_bytes(u8[at:at + size], "little"))
            else:
                u8[at:at + size] = (bus.read(port, size) & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def _mmio(self) -> None:
        view = self.fd
        u8 = view.run_u8
        address, size = view.run_u64[MMIO_ADDR // 8], view.run_u32[MMIO_LEN // 4]
        if u8[MMIO_IS_WRITE]:
            doorbell = self.machine.doorbells.get(address)
            if doorbell is not None:
                doorbell(self)
            else:
                self.machine.mmio.write(address, size, int.from_bytes(u8[MMIO_DATA:MMIO_DATA + size], "little"))
        else:
            value = self.machine.mmio.read(address, size)
            u8[MMIO_DATA:MMIO_DATA + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def _other(self, reason: int) -> None:
        handler = self.machine.exit_handlers.get(reason)
        if handler is None or not handler(self):
            self.machine.unhandled_exit(self, reason)
