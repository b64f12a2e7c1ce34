"""A built machine: start, pause, resume, stop, and what it ended with. Driven by tests/kvm/test_machine.py."""

from __future__ import annotations

__all__ = ["Machine", "Outcome"]

import os
from _thread import allocate_lock
from time import perf_counter_ns

from hv.errors import StateError
from hv.kvm.const import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET,
)
from hv.kvm.run import FAIL_ENTRY_REASON, INTERNAL_SUBERROR, SYSTEM_EVENT_TYPE
from hv.linux.handoff import leave_to_kernel
from hv.machine.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Condition
    from typing import Protocol

    from hv.devices.base import Device
    from hv.devices.bus import MmioBus, PioBus
    from hv.devices.legacy.acpi_pm import AcpiPm
    from hv.devices.virtio.device import VirtioDevice
    from hv.kvm.system import Kvm
    from hv.kvm.vm import VmFd
    from hv.machine.config import MachineConfig
    from hv.machine.console import Console
    from hv.machine.control import Control
    from hv.machine.freeze import Clocks
    from hv.machine.iothread import IoThread
    from hv.machine.pciroot import PciRoot
    from hv.machine.pit import LazyPit
    from hv.machine.ramslots import RamSlots
    from hv.machine.share import Share
    from hv.machine.vcpu import Vcpu
    from hv.memory.dirty import PageSet
    from hv.memory.guest import GuestMemory
    from hv.softkvm.helper import SoftKvm

    class Tracker(Protocol):
        """What the room above leaves here."""

        base: tuple[str, str] | None

        def take(self) -> PageSet: ...
        def changed_again(self, first: int, end: int) -> None: ...
        def stop(self) -> None: ...

# Exit codes of `pyhv boot`, by reason. All even but SIGTERM's, since isa-debug-exit codes are odd.
EXIT_CODES = {
    "poweroff": 0, "reset": 0, "halt": 0, "crash": 134, "timeout": 124, "interrupted": 130, "terminated": 143,
    "hangup": 129, "quit": 0, "internal-error": 70,
}
HALT_WATCH_AFTER = 1.0          # seconds: short runs never load what watches for it


class Outcome:
    """Why a machine stopped: `reason` (a key of EXIT_CODES, or "debug-exit"), `detail`, exit `code`."""

    __slots__ = ("code", "detail", "error", "reason")

    def __init__(self, reason: str, detail: str = "", code: int | None = None,
                 error: BaseException | None = None) -> None:
        self.reason = reason
        self.detail = detail
        self.code = EXIT_CODES[reason] if code is None else code
        self.error = error

    def __repr__(self) -> str:
        return f"Outcome({self.reason!r}, {self.detail!r}, code={self.code})"


class Machine:
    """One virtual machine. Made by `Machine(config)`; a context manager whose exit gives everything back.

    start() runs the vCPU threads; run() also serves the I/O loop until the guest ends. `pio`, `mmio`,
    `memory`, `vcpus` and `console` are there to be looked into and attached to before start().
    """

    def __init__(self, config: MachineConfig, loop: Loop | None = None,
                 build: Callable[[Machine], None] | None = None, io: IoThread | None = None) -> None:
        """`build` gives it its parts; by default a kernel is booted (hv/machine/builder.py).

        With `loop`, and `io` for its devices, it is one of many that these serve (hv/machine/fleet.py); they must
        outlive it.
        """
        self.created_ns = perf_counter_ns()
        self.config = config
        self.loop: Loop | Share
        self.io: Share | None = None            # the devices' part of a thread that serves many machines
        if loop is None:
            self.loop = Loop()
        else:
            from hv.machine.share import Share

            self.loop = Share(loop, self._handler_failed)
        if io is not None:
            from hv.machine.share import Share

            self.io = Share(io.loop, self.device_failed)
        self.phases: dict[str, int] = {}        # name -> perf_counter_ns when reached
        self.warnings: list[str] = []
        self.cmdline = b""
        self.softkvm: SoftKvm | None = None     # the help in use on a KVM that emulates ring 0
        self.measure = False                    # count and time exits (a little slower)
        self.observers: list[Callable[[Vcpu, int], None]] = []
        self.exit_handlers: dict[int, Callable[[Vcpu], bool]] = {}
        self.doorbells: dict[int, Callable[[Vcpu], None]] = {}
        self.vcpus: list[Vcpu] = []
        self.devices: dict[str, VirtioDevice] = {}      # by name: disk0, net0, ...
        self.io_threads: list[tuple[bool, IoThread]] = []   # (whether devices share it, thread)
        self.owned_fds: list[int] = []          # closed with the machine
        self.mmio_slots = 0                     # virtio-mmio devices placed so far
        self.pci: PciRoot | None = None         # the PCI bus, once a device is on it
        self.stopping = False
        self.pausing = False
        self.outcome: Outcome | None = None
        self.frozen: Clocks | None = None       # while frozen: what the guest's clocks showed
        self.late_ns = 0                        # how far the guest's time of day is behind, by pauses and restores
        self.freezing = allocate_lock()         # who holds it decides whether the machine is frozen
        self.saving = allocate_lock()           # held while its state is saved, or it moves away
        self.control: Control | None = None     # the control socket, where one was asked for
        self.at_start: list[Callable[[], None]] = []    # called by start(), before the processors run
        self.at_end: list[Callable[[], None]] = []      # called in the loop once the last processor is out
        self.transport = config.transport       # how the devices are attached: mmio or pci, once there is one
        self.tracker: Tracker | None = None     # which pages change, where somebody wants to know
        self.slots: RamSlots | None = None      # of RAM; None: one for each of its ranges
        self.booted = build is None             # its RAM was touched here or never
        self.restored_from: tuple[str, str] | None = None   # folder and id of the snapshot that it goes on from
        self._started = False
        self._closed = False
        self._alive = 0
        self._state = allocate_lock()
        self._parking: Condition | None = None  # made by the first pause()
        self._kick_tasks: dict[int, list[Callable[[Vcpu], None]]] = {}
        self.kvm: Kvm
        self.vm: VmFd
        self.memory: GuestMemory
        self.pio: PioBus
        self.mmio: MmioBus
        self.console: Console
        self.power: AcpiPm
        self.pit: LazyPit
        self.platform: dict[str, Device]        # the fixed devices by name, for a snapshot
        if build is None:
            from hv.machine.builder import build as boot

            build = boot
        try:
            build(self)
        except BaseException:
            self.close()
            raise

    # life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every vCPU's thread. StateError when already started or closed."""
        if self._started or self._closed:
            raise StateError("the machine has been started or closed", "make a new Machine for each run")
        self._started = True
        self._alive = len(self.vcpus)
        self.phases["first_entry"] = perf_counter_ns()
        for prepare in self.at_start:
            prepare()
        for vcpu in self.vcpus:         # first: what the others find is kept for them
            vcpu.start()
        for _, thread in self.io_threads:
            thread.start()
        if self.config.timeout is not None:
            self.loop.call_later(self.config.timeout, lambda: self.stop("timeout", f"{self.config.timeout:g} s"))
        self.loop.call_later(HALT_WATCH_AFTER, self._watch_for_halt)

    def _watch_for_halt(self) -> None:
        from hv.machine.halted import watch_for_halt

        watch_for_halt(self)

    def run(self) -> Outcome:
        """start(), serve the I/O loop until the guest has ended, and say how."""
        if not self._started:
            self.start()
        self.loop.run_until(self.ended)
        self.phases["end"] = perf_counter_ns()
        if self.control is not None:
            self.loop.run_there(self.control.end)
        assert self.outcome is not None
        return self.outcome

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Serve the I/O loop until the guest has ended or `timeout` seconds passed (then None)."""
        if not self.loop.run_until(self.ended, timeout):
            return None
        if self.control is not None:
            self.loop.run_there(self.control.end)
        return self.outcome

    def running(self) -> bool:
        """True from start() until something asked it to stop."""
        return self._started and not self.stopping

    def ended(self) -> bool:
        """True once every vCPU's thread is out."""
        return self._started and not self._alive

    def stop(self, reason: str = "quit", detail: str = "", error: BaseException | None = None,
             code: int | None = None) -> None:
        """Ask all vCPUs to end. The first reason counts. Safe from any thread."""
        with self._state:
            if self.outcome is None:
                if reason == "reset" and getattr(self, "console", None) is not None and self.console.panicked:
                    reason, detail = "crash", "the guest's kernel panicked"
                self.outcome = Outcome(reason, detail, code, error)
        self.stopping = True
        self.resume()
        for vcpu in self.vcpus:
            vcpu.kick()

    def vcpu_ended(self) -> None:
        """A vCPU's thread is about to return."""
        with self._state:
            self._alive -= 1
        if self._parking is not None:
            with self._parking:
                self._parking.notify_all()
        if self.outcome is None:
            self.stop("internal-error", "a vCPU thread ended by itself")
        if not self._alive:
            self.loop.call(self._tell_end)

    def _tell_end(self) -> None:
        for tell in self.at_end:
            tell()

    def device_failed(self, error: Exception) -> None:
        """What no handler of a device's caught: a bug of ours."""
        self.stop("internal-error", f"a device: {type(error).__name__}: {error}", error)

    def _handler_failed(self, error: Exception) -> None:
        self.stop("internal-error", f"{type(error).__name__}: {error}", error)

    def pause(self) -> None:
        """Bring every vCPU out of the guest and hold it; returns when all are held. Safe from any thread but theirs."""
        with self._state:
            if self._parking is None:
                from threading import Condition

                self._parking = Condition()
        with self._parking:
            if not self.running():
                return
            self.pausing = True
            for vcpu in self.vcpus:
                vcpu.kick()
            self._parking.wait_for(lambda: not self.pausing or self.stopping or all(v.parked for v in self.vcpus))

    def resume(self) -> None:
        """Let the vCPUs go on. Nothing happens where the machine is not paused."""
        if self._parking is not None:
            with self._parking:
                self.pausing = False
                self._parking.notify_all()

    def freeze(self) -> None:
        """pause(), and hold the devices and the guest's clocks too; returns when nothing moves. See freeze.py."""
        from hv.machine.freeze import freeze

        with self.freezing:
            freeze(self)

    def thaw(self) -> None:
        """Go on after freeze() or pause(), as if no time had passed."""
        from hv.machine.freeze import thaw

        with self.freezing:
            thaw(self)

    def serve_control(self, path: str, commands: dict[str, str] | None = None) -> None:
        """Let other programs look after this machine by a Unix socket at `path` (docs/control.md), until close().

        `commands` adds to the built-in ones: name -> "module:function", loaded when it is first used.
        """
        from hv.machine.control import Control

        self.control = Control(self, path, commands)

    def park(self, vcpu: Vcpu) -> None:
        """A vCPU's thread waits here while the machine is paused."""
        assert self._parking is not None
        with self._parking:
            vcpu.parked = True
            self._parking.notify_all()
            self._parking.wait_for(lambda: not self.pausing or self.stopping)
            vcpu.parked = False

    def run_on_vcpu(self, index: int, task: Callable[[Vcpu], None]) -> None:
        """Have vCPU `index` call task(vcpu) in its own thread, between two entries into the guest."""
        with self._state:
            self._kick_tasks.setdefault(index, []).append(task)
        self.vcpus[index].kick()

    def take_kick_tasks(self, index: int) -> list[Callable[[Vcpu], None]]:
        """The tasks waiting for vCPU `index`."""
        if not self._kick_tasks:
            return []
        with self._state:
            return self._kick_tasks.pop(index, [])

    def own_fd(self, fd: int) -> int:
        """Close `fd` with the machine; returns it."""
        self.owned_fds.append(fd)
        return fd

    # exits that mean something for the whole machine ----------------------------------------------

    def unhandled_exit(self, vcpu: Vcpu, reason: int) -> None:
        """An exit that no device, helper or debugger took."""
        view = vcpu.fd
        if reason in (KVM_EXIT_INTR, KVM_EXIT_HLT):
            return
        if reason == KVM_EXIT_SHUTDOWN:
            self.stop("crash", f"triple fault on vCPU {vcpu.index}")
        elif reason == KVM_EXIT_SYSTEM_EVENT:
            kind = view.run_u32[SYSTEM_EVENT_TYPE // 4]
            if kind == KVM_SYSTEM_EVENT_CRASH:
                self.stop("crash", "the guest reported a crash")
            else:
                self.stop("reset" if kind == KVM_SYSTEM_EVENT_RESET else "poweroff", "KVM system event")
        elif reason == KVM_EXIT_FAIL_ENTRY:
            self.stop("internal-error", f"the processor refused to enter the guest: hardware reason "
                      f"{view.run_u64[FAIL_ENTRY_REASON // 8]:#x}")
        elif reason == KVM_EXIT_INTERNAL_ERROR:
            suberror = view.run_u32[INTERNAL_SUBERROR // 4]
            self.stop("crash", f"KVM gave up (internal error, suberror {suberror}) at RIP {view.get_regs().rip:#x}")
        else:
            self.stop("internal-error", f"unexpected KVM exit {reason} on vCPU {vcpu.index}")

    # end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop, join the threads, close every descriptor, unmap the RAM. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._started:
            self.stop()
            self.resume()
            for vcpu in self.vcpus:
                vcpu.kick()
                vcpu.join()
            with self.freezing:     # who saves it looks into it still
                pass
        if self.control is not None:
            self.loop.run_there(self.control.end)
        if self.devices or self.owned_fds:
            from hv.machine.attach import close_devices

            close_devices(self)
        vm = getattr(self, "vm", None)
        ring = -1 if vm is None else leave_to_kernel([vm.fd, *(vcpu.fd.fd for vcpu in self.vcpus)])
        for vcpu in self.vcpus:
            vcpu.fd.close()
        for name in ("vm", "kvm", "memory"):
            part = getattr(self, name, None)
            if part is not None:
                part.close()
        if ring >= 0:
            os.close(ring)      # now the VM ends, without us: that takes the kernel up to 20 ms
        self.exit_handlers.clear()
        self.doorbells.clear()
        if self.control is not None:
            self.loop.run_there(self.control.close)
        self.loop.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
