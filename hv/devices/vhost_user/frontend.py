"""A virtio device whose queues another process serves: what block, network and share have in common.

    driver kicks            -> KVM_IOEVENTFD -> the eventfd that the back end waits for
    back end has used       -> eventfd -> our I/O thread -> the transport's interrupt, or straight to KVM_IRQFD where
                               the transport has such a descriptor (virtio-pci with MSI-X)

so requests and their data never pass through Python. Here are the status machine, the configuration space, and what
happens when the other program fails: the connection is cut, tried again with growing pauses, and the rings go on where
they stood, while the guest waits as for a slow disk. Each device has an I/O thread of its own, so that a back end that
hangs holds up nobody else.

Where the rings stood is known exactly when they were stopped (GET_VRING_BASE). When the back end dies it is what the
used ring says: right when nothing was in flight or all was used in order. Where the rings show another order, going on
could run a request twice or lose one, so the device asks for a reset instead (virtio 1.2, 2.1.2).

Left out: INFLIGHT_SHMFD, which would make that exact with the back ends that have it. Driven by
tests/unit/test_vhost_user.py, test_vhost_user_failures.py there and tests/kvm/test_vhost_user.py.
"""

from __future__ import annotations

__all__ = ["VhostUserDevice"]

import os
from select import EPOLLET, EPOLLIN, EPOLLRDHUP
from time import monotonic, sleep

from hv.devices.vhost_user.backend import BackEnd, Ring
from hv.devices.vhost_user.protocol import BACKEND_CONFIG_CHANGE, MOST_REGIONS, VhostUserError
from hv.devices.virtio import ids
from hv.devices.virtio.device import VirtioDevice
from hv.errors import ConfigError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import Interrupts, Io
    from hv.devices.virtio.queue import Queue
    from hv.memory.guest import GuestMemory

PASSED = ids.F_INDIRECT_DESC | ids.F_EVENT_IDX      # features of the ring, which the back end serves
START_WAIT = 1.0            # seconds for a back end that was started together with us
DRAIN = 1.0                 # seconds for requests in flight when the rings are to stop
RETRY_FIRST, RETRY_MOST, RETRY_BUDGET = 0.1, 5.0, 2.0      # seconds between attempts to get one back, and for each


class VhostUserDevice(VirtioDevice):
    """Connects when made. ConfigError where the back end is not there or can't be used."""

    OUTSIDE = True
    OWN_THREAD = True
    OFFERS = 0              # the device type's features that may be passed on to the driver
    OWN = 0                 # features that are served here, whatever the back end says
    CONFIG_SIZE = 0         # bytes of configuration space to get from the back end; 0 where it is served here
    DRAINED: tuple[int, ...] = ()       # queues whose requests all come back by themselves

    def __init__(self, socket_path: str) -> None:
        super().__init__()
        self.path = socket_path
        self.back_end: BackEnd | None = None
        self._call_fds: list[int] = []
        self._started: set[int] = set()         # rings that the back end serves now
        self._signalled: dict[int, int] = {}    # where the used rings stood when we last looked
        self._pause_before_retry = RETRY_FIRST
        try:
            self.back_end = back_end = BackEnd(socket_path, self.CONFIG_SIZE, START_WAIT)
        except VhostUserError as error:
            raise ConfigError(f"vhost-user: {error}", f"is a {self.KIND} back end listening there? start it first, "
                              "see docs/vhost-user.md") from None
        self._config = back_end.config          # as last seen
        self._offered = ids.F_VERSION_1 | back_end.features & (PASSED | self.OFFERS) | self.OWN
        if text := self._unfit(back_end):
            self.close()
            raise ConfigError(f"vhost-user: the back end at {socket_path!r} {text}", "give it more, or ask for fewer")

    def _unfit(self, back_end: BackEnd) -> str:
        """Why the device can't be had from this back end."""
        if missing := self._offered & ~(back_end.features | self.OWN):
            return f"lacks features {missing:#x}"
        if back_end.queues and back_end.queues < len(self.QUEUES):
            return f"has {back_end.queues} queues, {len(self.QUEUES)} are needed"
        return ""

    def attach(self, memory: GuestMemory, io: Io, interrupts: Interrupts) -> None:
        """The back end gets RAM as descriptors, so it must have some (MachineConfig sees to that)."""
        if any(region.fd < 0 for region in memory.regions) or len(memory.regions) > MOST_REGIONS:
            raise ConfigError("vhost-user: guest memory can't be shared with another process", "use --backing memfd")
        super().attach(memory, io, interrupts)
        self._call_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.queues]
        for index, fd in enumerate(self._call_fds):
            io.add(fd, EPOLLIN | EPOLLET, self._caller(index))
        self._watch()

    @property
    def offered(self) -> int:
        """What the back end can do of what the device type knows."""
        return self._offered

    @property
    def connected(self) -> bool:
        """Whether there is a back end."""
        return self.back_end is not None

    def config(self) -> bytes:
        """The back end's, as last seen."""
        return self._config

    # the driver's side -------------------------------------------------------------------------------

    def activate(self) -> None:
        """DRIVER_OK: give the rings away."""
        self._start(resumed=False)

    def notified(self, index: int) -> None:
        """The driver does not come this way, but a wake-up does: look at your ring."""
        if index in self._started:
            os.eventfd_write(self.kick_fds[index], 1)

    def drop(self) -> None:
        """A reset: the back end lets go of the rings, and with them of guest memory."""
        self._stop(sorted(self._started))

    def drop_queue(self, index: int) -> None:
        """The driver takes one ring back."""
        if index in self._started:
            self._stop([index])

    def pause(self) -> None:
        """Take the rings back; they know how far the back end came."""
        self._stop(sorted(self._started))

    def wake(self) -> None:
        """Give them away again."""
        self._start(resumed=True)

    def close(self) -> None:
        """Cut the connection, on which the back end forgets the guest's memory."""
        if self.back_end is not None:
            self.back_end.close()
            self.back_end = None
        for fd in self._call_fds:
            os.close(fd)
        self._call_fds = []

    # rings ---------------------------------------------------------------------------------------------

    def _start(self, resumed: bool) -> None:
        if self.back_end is None:
            return          # once it is back, _reconnected() does this
        ready = [queue for queue in self.queues if queue.ready]
        try:
            self.back_end.start(self.features, self.memory, [self._ring(queue) for queue in ready])
        except VhostUserError as error:
            self._lost(str(error))
            return
        for queue in ready:
            self._started.add(queue.index)
            # What was asked for or done while nobody listened: both sides look once without need rather than never.
            os.eventfd_write(self.kick_fds[queue.index], 1)
            self._signalled[queue.index] = _position(queue)
            if resumed and (queue.event_idx or not self.memory.u16(queue.avail) & ids.AVAIL_NO_INTERRUPT):
                self.interrupts.queue_used(queue.index)

    def _ring(self, queue: Queue) -> Ring:
        # queue.enable() has checked where they are (virtio 1.2, 2.7: sizes of the three parts).
        address, size = self.memory.host_address, queue.size
        direct: Callable[[int], int | None] | None = getattr(self.interrupts, "queue_fd", None)
        call = direct(queue.index) if direct else None
        return Ring(queue.index, size, _position(queue), address(queue.desc, 16 * size),
                    address(queue.avail, 6 + 2 * size), address(queue.used, 6 + 8 * size), self.kick_fds[queue.index],
                    self._call_fds[queue.index] if call is None else call)

    def _stop(self, indices: list[int]) -> None:
        """Stop rings and note where they stood. What can't be stopped in time loses its connection."""
        self._wait(lambda: all(self._available(self.queues[i]) == self._used(self.queues[i])
                               for i in indices if i in self.DRAINED))
        try:
            for index in indices:
                if self.back_end is not None:
                    _place(self.queues[index], self.back_end.stop(index))
                    self._started.discard(index)
        except VhostUserError as error:
            self._lost(str(error))
            return
        stopped = [self.queues[index] for index in indices]
        if self.back_end is not None and not self._wait(
                lambda: all(self._used(queue) == _position(queue) for queue in stopped)):
            for queue in stopped:
                _place(queue, self._used(queue))
            self._lost("requests were still in flight when the rings had stopped")

    def _wait(self, done: Callable[[], bool]) -> bool:
        end = monotonic() + DRAIN
        try:
            while not done():
                if monotonic() > end:
                    return False
                sleep(0.001)
        except GuestError:
            return False
        return True

    def _available(self, queue: Queue) -> int:
        return self.memory.u16(queue.avail + 2)     # 2.7.6: flags, index

    def _used(self, queue: Queue) -> int:
        return self.memory.u16(queue.used + 2)      # 2.7.8: flags, index

    def _wants_interrupt(self, queue: Queue) -> bool:
        """Whether the driver asked to hear of what was used since the last look (2.7.7, 2.7.10).

        Back ends look too, but signal once too often in the beginning, for fear that one was lost.
        """
        memory, new = self.memory, self._used(queue)
        old, self._signalled[queue.index] = self._signalled[queue.index], new
        if queue.event_idx:
            event = memory.u16(queue.avail + 4 + 2 * queue.size)
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return new != old and not memory.u16(queue.avail) & ids.AVAIL_NO_INTERRUPT

    def _in_order(self, queue: Queue) -> bool:
        """Whether all that was used came back in the order it was made available, as far as the rings go back."""
        memory, size, used = self.memory, queue.size, self._used(queue)
        in_flight = (self._available(queue) - used) & 0xFFFF
        if not in_flight:
            return True
        return all(memory.u16(queue.avail + 4 + 2 * (at % size)) == memory.u32(queue.used + 4 + 8 * (at % size))
                   for at in ((used - back) & 0xFFFF for back in range(1, size - in_flight + 1)))

    # the other program's side -----------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self.back_end is not None
        line, *channel = self.back_end.fds
        self.io.add(line, EPOLLIN | EPOLLRDHUP, self._line_event)
        for fd in channel:
            self.io.add(fd, EPOLLIN, self._channel_event)

    def _caller(self, index: int) -> Callable[[int], None]:
        def called(events: int) -> None:
            with self.lock:
                if index in self._started and self.running and self._wants_interrupt(self.queues[index]):
                    self.interrupts.queue_used(index)

        return called

    def _line_event(self, events: int) -> None:
        """Outside conversations the back end has nothing to say: it has gone, or a reply has been read meanwhile."""
        with self.lock:
            if self.back_end is not None and (text := self.back_end.gone()):
                self._lost(text)

    def _channel_event(self, events: int) -> None:
        back_end = self.back_end        # read without the lock: who holds it may wait for our answer's effect
        if back_end is None:
            return
        try:
            requests = back_end.channel_requests()
            with self.lock:
                if back_end is self.back_end and BACKEND_CONFIG_CHANGE in requests:
                    before, self._config = self._config, back_end.get_config(self.CONFIG_SIZE)
                    if before != self._config:
                        self.config_changed()
        except VhostUserError as error:
            with self.lock:
                if back_end is self.back_end:
                    self._lost(str(error))

    def _lost(self, text: str) -> None:
        """The back end is of no more use. With the lock held."""
        back_end = self.back_end
        if back_end is None:
            return
        for fd in back_end.fds:
            self.io.remove(fd)
        back_end.close()
        self.back_end = None
        self.warn(text)
        self.connection_changed()
        for index in sorted(self._started):
            queue = self.queues[index]
            if not self._in_order(queue):
                self._ask_for_reset("requests were in flight out of order, which no other back end can take over")
            _place(queue, self._used(queue))
        self._started.clear()
        self._retry()

    def connection_changed(self) -> None:
        """The back end has gone or come back (`connected`). A network device's link follows."""

    def _retry(self) -> None:
        pause = self._pause_before_retry
        self._pause_before_retry = min(2 * pause, RETRY_MOST)

        def later() -> None:
            self.io.call_later(pause, self._reconnect)

        self.io.call(later)     # timers belong to the loop's thread; this may be a vCPU's

    def _reconnect(self) -> None:
        """In the I/O thread. The back end is met without the lock, so that the guest does not wait for it."""
        try:
            back_end = BackEnd(self.path, self.CONFIG_SIZE, budget=RETRY_BUDGET)
        except VhostUserError:
            self._retry()
            return
        with self.lock:
            if text := self._unfit(back_end):
                back_end.close()
                if self.warnings[-1:] != [told := f"the back end that came back {text}"]:
                    self.warn(told)
                self._retry()
                return
            before, self._config = self._config, back_end.config
            self.back_end = back_end
            self._watch()
            self.warn("the back end is back")
            self.connection_changed()
            if before != self._config:
                self.config_changed()
            if self.running:
                self._start(resumed=True)
            if self.connected:
                self._pause_before_retry = RETRY_FIRST

    def _ask_for_reset(self, text: str) -> None:
        """As broken(), but it is not the guest's fault."""
        self.warn(text)
        self.status |= ids.NEEDS_RESET
        if self.status & ids.DRIVER_OK:
            self.interrupts.config_changed()


def _position(queue: Queue) -> int:
    """Where in the available ring the next request is to be found."""
    return int(queue.state()["next"])  # type: ignore[call-overload, no-any-return]


def _place(queue: Queue, position: int) -> None:
    """Note where a ring has come to; everything before is used."""
    state = queue.state()
    queue.load({**state, "next": position, "used_index": position, "signalled": position})
