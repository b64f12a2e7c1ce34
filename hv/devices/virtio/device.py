"""What all virtio devices share: feature negotiation, the status machine, queues, interrupts (virtio 1.2, 2 and 3.1).

    vCPU threads    the transport's registers: select_features, set_status, enable_queue, read_config, write_config
    I/O thread      `notified(index)` for each queue the driver kicked

Both hold `lock`, so a device model needs none of its own, and a reset finds nothing half done. A model overrides what
stands under "the model". It never blocks for long in `notified`, and bounds what one call does: `requests` does that
for it. Driven by tests/unit/test_virtio_device.py and test_virtio_state.py there.
"""

from __future__ import annotations

__all__ = ["Interrupts", "Io", "VirtioDevice"]

from _thread import allocate_lock

from hv.devices.virtio import ids
from hv.devices.virtio.queue import Queue, QueueError
from hv.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Protocol

    from hv.devices.virtio.chain import Chain
    from hv.devices.virtio.console_port import GuestPort
    from hv.memory.guest import GuestMemory

    class Io(Protocol):
        """The I/O loop as a device sees it (hv/machine/loop.py): descriptors, timers, calls from other threads."""

        def add(self, fd: int, events: int, handler: Callable[[int], None]) -> bool: ...
        def modify(self, fd: int, events: int) -> None: ...
        def remove(self, fd: int) -> None: ...
        def call(self, function: Callable[[], None]) -> None: ...
        def call_later(self, seconds: float, function: Callable[[], None]) -> object: ...
        def cancel(self, timer: object) -> None: ...

    class Interrupts(Protocol):
        """How a transport tells the driver. Called with the device's lock held."""

        def queue_used(self, index: int) -> None: ...
        def config_changed(self) -> None: ...
        def state(self) -> dict[str, object]: ...
        def load(self, state: dict[str, object]) -> None: ...
else:
    Io = Interrupts = object

COMMON_FEATURES = ids.F_VERSION_1 | ids.F_INDIRECT_DESC | ids.F_EVENT_IDX | ids.F_RING_RESET
BATCH = 256             # requests served before other devices of the same thread get a turn
_FAULTS_KEPT = 8        # guest faults told in full; all are counted

STATE_VERSION = 1


class VirtioDevice:
    """A device behind a transport. `attach` gives it guest RAM, its I/O loop and its transport's interrupts."""

    # the model: constants
    ID = 0
    NAME = "virtio"
    KIND = "device"                     # the machine calls its devices disk0, net0, net1 ...
    QUEUES: tuple[int, ...] = ()        # the largest size of each queue
    FEATURES = 0                        # beyond COMMON_FEATURES
    DRIVER = ""                         # what a guest lacks that never drove it: option and module
    PCI_CLASS = 0xFF0000                # class code (PCI 3.0, appendix D): unassigned
    OWN_THREAD = False                  # True where requests wait for the host's disks: a thread of its own
    OUTSIDE = False                     # True where another process serves the queues: nobody here waits for kicks
    guest_console: GuestPort | None = None      # a console device's port that is the guest's console

    def __init__(self) -> None:
        self.name = self.KIND           # with a number, once the machine has it
        self.lock = allocate_lock()
        self.queues: list[Queue] = []
        self.status = 0
        self.features = 0               # what the driver took
        self.generation = 0             # of the configuration space (2.5.1)
        self.driven = False             # whether a driver ever set DRIVER_OK
        self.paused = False
        self.faults = 0                 # rules the guest broke
        self.fault_texts: list[str] = []
        self.warnings: list[str] = []   # what the user should know of the host's side, said when the guest has ended
        self._coming_back: set[int] = set()     # queues that the loop was asked to serve once more
        self.kick_fds: list[int] = []   # an eventfd for each queue, signalled by the driver's notifications
        self.memory: GuestMemory
        self.io: Io
        self.interrupts: Interrupts

    def attach(self, memory: GuestMemory, io: Io, interrupts: Interrupts) -> None:
        """Before the guest starts."""
        self.memory, self.io, self.interrupts = memory, io, interrupts
        self.queues = [Queue(memory, index, size) for index, size in enumerate(self.QUEUES)]

    # the model: what a device overrides ------------------------------------------------------------

    @property
    def offered(self) -> int:
        """The features offered to the driver."""
        return COMMON_FEATURES | self.FEATURES

    def accepts(self, features: int) -> bool:
        """Whether the device can work with `features`, a subset of those offered (3.1.1, step 5)."""
        return True

    def config(self) -> bytes:
        """The configuration space now (2.5)."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space, within its length. Most devices ignore it."""

    def activate(self) -> None:
        """The driver is ready: DRIVER_OK. Called with the lock held."""

    def notified(self, index: int) -> None:
        """The driver may have put requests into queue `index`. In the I/O thread, with the lock held."""

    def drop(self) -> None:
        """A reset: forget all that is in flight; nothing of it may touch guest memory any more."""

    def drop_queue(self, index: int) -> None:
        """One queue was reset (2.6.1): forget what of it is in flight. By default nothing ever is."""

    def pause(self) -> None:
        """Finish or put off what is in flight, so that the state stands still. With the lock held."""

    def wake(self) -> None:
        """Go on after pause() or load(). With the lock held; every queue is notified behind it."""

    def close(self) -> None:
        """Give back what was opened. The threads have ended."""

    def model_state(self) -> dict[str, object]:
        """What the model must keep for a snapshot, beyond queues and status; plain data."""
        return {}

    def load_model(self, state: dict[str, object]) -> None:
        """Take it over. Untrusted."""

    # for the model to use --------------------------------------------------------------------------

    def requests(self, index: int, most: int = BATCH) -> Iterator[Chain]:
        """The requests of queue `index`, up to `most`; with more waiting the loop comes back to them.

        The model pushes each, and `used(index)` afterwards.
        """
        queue = self.queues[index]
        queue.quiet()
        for _ in range(most):
            chain = queue.pop()
            if chain is None:
                if not queue.listen():
                    return
                queue.quiet()       # something came in between
                continue
            yield chain
        if index not in self._coming_back:
            self._coming_back.add(index)
            self.io.call(lambda: self._come_back(index))

    def _come_back(self, index: int) -> None:
        self._coming_back.discard(index)
        self.serve(index)

    def used(self, index: int) -> None:
        """Tell the driver of what was pushed, if it wants to know."""
        if self.queues[index].needs_interrupt():
            self.interrupts.queue_used(index)

    def has(self, feature: int) -> bool:
        """Whether the driver took `feature`."""
        return bool(self.features & feature)

    @property
    def running(self) -> bool:
        """Whether requests may be served now."""
        return self.status & (ids.DRIVER_OK | ids.NEEDS_RESET | ids.FAILED) == ids.DRIVER_OK and not self.paused

    def config_changed(self) -> None:
        """The configuration space has changed: a new generation, and an interrupt (2.5.1, 4.2.2.1)."""
        self.generation = (self.generation + 1) & 0xFF
        if self.status & ids.DRIVER_OK:
            self.interrupts.config_changed()

    def fault(self, text: str) -> None:
        """The guest broke a rule, without harm: counted."""
        self.faults += 1
        if len(self.fault_texts) < _FAULTS_KEPT:
            self.fault_texts.append(text)

    def warn(self, text: str) -> None:
        """Something on the host's side went wrong, of which the user should know."""
        if len(self.warnings) < _FAULTS_KEPT:
            self.warnings.append(text)

    def broken(self, text: str) -> None:
        """The guest broke a rule that leaves no way on: ask for a reset (2.1.2)."""
        self.fault(text)
        self.status |= ids.NEEDS_RESET
        if self.status & ids.DRIVER_OK:
            self.interrupts.config_changed()

    def serve(self, index: int) -> None:
        """`notified`, from the I/O thread: with the lock, and with the guest's mistakes caught."""
        with self.lock:
            self.serve_locked(index)

    def serve_locked(self, index: int) -> None:
        """`serve` for who holds the lock."""
        if not self.running or not self.queues[index].ready:
            return
        try:
            self.notified(index)
        except (QueueError, GuestError) as error:
            self.broken(str(error))

    # for the transport -----------------------------------------------------------------------------

    def set_status(self, value: int) -> None:
        """The driver writes the status: 0 resets, else bits are added in the order of 3.1.1."""
        with self.lock:
            if value == 0:
                self._reset()
                return
            added = value & ~self.status
            if self.status & ~value & ~ids.NEEDS_RESET:
                self.fault(f"status {self.status:#x} -> {value:#x} clears bits (2.1.1)")
                return
            if added & ids.FAILED:
                self.status |= ids.FAILED       # the driver has given up
            if added and self.status & ids.FAILED:
                return                          # only a reset leads on (2.1.1)
            # Each step needs the ones before it; several may come in one write.
            for bit, before in ((ids.ACKNOWLEDGE, 0), (ids.DRIVER, ids.ACKNOWLEDGE),
                                (ids.FEATURES_OK, ids.ACKNOWLEDGE | ids.DRIVER),
                                (ids.DRIVER_OK, ids.ACKNOWLEDGE | ids.DRIVER | ids.FEATURES_OK)):
                if added & bit:
                    if self.status & before != before:
                        self.fault(f"status {self.status:#x} -> {value:#x} skips a step (3.1.1)")
                        return
                    self._advance(bit)

    def _advance(self, bit: int) -> None:
        if bit == ids.FEATURES_OK:
            if not self._acceptable(self.features):
                self.fault(f"features {self.features:#x} refused")     # the bit stays clear, the driver sees it (3.1.1)
                return
            self._tell_queues()
        self.status |= bit
        if bit == ids.DRIVER_OK:
            self.driven = True
            if self.status & ids.NEEDS_RESET:   # a queue could not be enabled: now there is somebody to be told (2.1.2)
                self.interrupts.config_changed()
                return
            try:
                self.activate()
            except (QueueError, GuestError) as error:
                self.broken(str(error))
            # Requests made before DRIVER_OK may have been notified too early.
            self.io.call(self._serve_all)

    def _acceptable(self, features: int) -> bool:
        return not features & ~self.offered and bool(features & ids.F_VERSION_1) and self.accepts(features)

    def _tell_queues(self) -> None:
        for queue in self.queues:
            queue.event_idx = self.has(ids.F_EVENT_IDX)
            queue.indirect = self.has(ids.F_INDIRECT_DESC)

    def _serve_all(self) -> None:
        for index in range(len(self.queues)):
            self.serve(index)

    def select_features(self, low: bool, value: int) -> None:
        """The driver takes 32 of the features; too late once FEATURES_OK is set (3.1.1)."""
        with self.lock:
            if self.status & ids.FEATURES_OK:
                self.fault("features chosen after FEATURES_OK")
                return
            shift = 0 if low else 32
            self.features = self.features & ~(0xFFFFFFFF << shift) | (value & 0xFFFFFFFF) << shift

    def enable_queue(self, index: int, on: bool) -> None:
        """The driver says that a queue's rings are in place, or takes them back."""
        with self.lock:
            queue = self.queues[index]
            if not on:
                if queue.ready:
                    self.drop_queue(index)
                queue.disable()
                return
            if queue.ready:
                return
            if not self.status & ids.FEATURES_OK:
                self.fault(f"queue {index} enabled before FEATURES_OK (3.1.1)")
                return
            try:
                queue.enable()
            except QueueError as error:
                self.broken(str(error))

    def reset_queue(self, index: int) -> None:
        """One queue back to its beginnings (2.6.1)."""
        with self.lock:
            if not self.has(ids.F_RING_RESET):
                self.fault("a queue reset without RING_RESET")
                return
            self.drop_queue(index)
            self.queues[index].reset()

    def read_config(self, offset: int, size: int) -> int:
        """`size` bytes of the configuration space; beyond its end it reads 0."""
        with self.lock:
            return int.from_bytes(self.config()[offset:offset + size], "little")

    def put_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes to the configuration space; beyond its end nothing happens."""
        with self.lock:
            if offset + size > len(self.config()):
                self.fault(f"a write to the configuration space at {offset:#x}")
                return
            self.write_config(offset, value.to_bytes(size, "little"))

    def _reset(self) -> None:
        self.drop()
        self.status = self.features = 0
        self._tell_queues()
        for queue in self.queues:
            queue.reset()

    # state -----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stand still, for a snapshot; the vCPUs are paused already."""
        with self.lock:
            if not self.paused:
                self.pause()
                self.paused = True

    def resume(self) -> None:
        """Go on, and look at every queue."""
        with self.lock:
            if not self.paused:
                return
            self.paused = False
            if self.running:
                try:
                    self.wake()
                except (QueueError, GuestError) as error:
                    self.broken(str(error))
        self.io.call(self._serve_all)

    def state(self) -> dict[str, object]:
        """All that a snapshot must keep, as plain data; the device must be stopped."""
        with self.lock:
            return {"version": STATE_VERSION, "device": self.NAME, "status": self.status, "features": self.features,
                    "generation": self.generation, "queues": [queue.state() for queue in self.queues],
                    "model": self.model_state()}

    def load(self, state: dict[str, object]) -> None:
        """Take over what `state` returned, perhaps of another process. Untrusted: ValueError where it can't be.

        Guest memory must be loaded already. The device stands still until resume(); after an error it is as reset.
        """
        with self.lock:
            self.paused = True
            try:
                self._load(state)
            except (QueueError, GuestError, LookupError, TypeError, AttributeError, OverflowError) as error:
                self._reset()
                raise ValueError(f"state of {self.name}: {type(error).__name__}: {error}") from None
            except ValueError:
                self._reset()
                raise

    def _load(self, state: dict[str, Any]) -> None:
        if state["version"] != STATE_VERSION or state["device"] != self.NAME:
            raise ValueError(f"state of {state['device']!r}, version {state['version']!r}, not of a {self.NAME}")
        status, features = int(state["status"]) & 0xFF, int(state["features"]) & 0xFFFFFFFFFFFFFFFF
        if status & ids.FEATURES_OK:
            if not self._acceptable(features):
                raise ValueError(f"features {features:#x}, offered are {self.offered:#x}")
        elif status & ids.DRIVER_OK:
            raise ValueError(f"status {status:#x}")
        saved = state["queues"]
        if len(saved) != len(self.queues):
            raise ValueError(f"{len(saved)} queues, not {len(self.queues)}")
        self.status, self.features = status, features
        self.generation = int(state["generation"]) & 0xFF
        self.driven = bool(status & ids.DRIVER_OK)
        self._tell_queues()
        for queue, values in zip(self.queues, saved, strict=True):
            queue.load(values)
            if queue.ready and not status & ids.FEATURES_OK:
                raise ValueError(f"queue {queue.index} enabled before FEATURES_OK")
        self.load_model(state["model"])
