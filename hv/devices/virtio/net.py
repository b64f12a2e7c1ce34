"""Network device: frames between two queues and a backend (virtio 1.2, 5.1).

    sent        driver -> TX queue -> notified -> _transmit -> backend.send(views of guest RAM)
    received    backend's descriptor is readable, and buffers wait in the RX queue -> _receive

What a frame may leave undone (checksums, segments) is between the backend and the driver: backends offer features, and
the 12 bytes in front of each frame travel through. Left out on purpose: several queue pairs, the control queue (all
frames of a cable that has one card at its end are for that card), receive-side scaling and coalescing.

Driven by tests/unit/test_virtio_net.py and tests/kvm/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["Net"]

from struct import Struct

from hv.devices.virtio import ids
from hv.devices.virtio import net_ids as net
from hv.devices.virtio.device import BATCH, COMMON_FEATURES, VirtioDevice
from hv.devices.virtio.net_backend import scatter
from hv.devices.virtio.rate import TokenBucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.chain import Chain
    from hv.devices.virtio.device import Interrupts, Io
    from hv.devices.virtio.net_backend import Backend
    from hv.memory.guest import GuestMemory

EPOLLIN, EPOLLOUT = 1, 4            # include/uapi/linux/eventpoll.h
IOV_MAX = 1024                      # man 2 readv
PATIENCE = 0.2                      # seconds for which sending waits for a peer that takes nothing; then frames drop
_put_num_buffers = Struct("<H").pack_into
_CONFIG = Struct("<6sHHH")          # mac, status, max_virtqueue_pairs, mtu (5.1.4)


class Net(VirtioDevice):
    """virtio-net. `rate` is in bytes a second for each direction, 0 for no limit; `mtu` 0 leaves it to the driver."""

    ID = ids.NET
    NAME = "virtio-net"
    KIND = "net"
    QUEUES = (256, 256)
    DRIVER = "CONFIG_VIRTIO_NET (module virtio_net)"
    PCI_CLASS = 0x020000            # Ethernet controller

    def __init__(self, backend: Backend, mac: bytes = b"", rate: int = 0, mtu: int = 0) -> None:
        super().__init__()
        self.backend = backend
        self.mac = self.guest_mac = mac     # what a driver reads, and what the one there is has read
        self._own_mac = bool(mac)
        self.mtu = mtu
        self.link = True
        self._told = backend.carrier
        self.lost = ""                  # why the backend is gone
        self.sent = self.received = self.dropped = self.longest_sent = 0        # frames, but for the last: bytes
        self._limits = (TokenBucket(rate), TokenBucket(rate)) if rate else None
        self._timers = [False, False]           # by queue: the loop will call us to go on
        self._spill = memoryview(bytearray(net.LONGEST))    # what did not fit the buffers laid out for a frame
        self._held: list[Chain] = []            # taken from the RX queue, not used yet
        self._span = 1                          # how many of them are laid out: what the last frame took
        self._late = b""                        # a frame that waits for buffers
        self._full = self._deaf = False         # the backend takes nothing now; it did not for too long
        self._stalls = 0
        self._watched, self._events = -1, 0

    # the model -------------------------------------------------------------------------------------

    def attach(self, memory: GuestMemory, io: Io, interrupts: Interrupts) -> None:
        """Also the backend learns of the loop; the name is known now, and with it the MAC address."""
        super().attach(memory, io, interrupts)
        if not self.mac:
            from hv.devices.virtio.net_config import derive_mac

            self.mac = self.guest_mac = derive_mac(self.backend.identity, self.name)
        self.backend.attach(io, self.mac, self._change)

    @property
    def offered(self) -> int:
        """What the backend can, and what we do ourselves."""
        return (COMMON_FEATURES | net.F_MAC | net.F_STATUS | net.F_MRG_RXBUF | self.backend.features
                | (net.F_MTU if self.mtu else 0))

    def accepts(self, features: int) -> bool:
        """5.1.3.1: some features need others."""
        return all(not features & feature or features & needed for feature, needed in net.NEEDS)

    def config(self) -> bytes:
        """5.1.4."""
        return _CONFIG.pack(self.mac, net.S_LINK_UP if self._up else 0, 1, self.mtu)

    def activate(self) -> None:
        """Offloads as the driver took them."""
        self.backend.negotiated(self.features)

    def notified(self, index: int) -> None:
        """Buffers to fill, or frames to send."""
        if index == net.TX:
            if not self._full:
                self._transmit()
        elif not self._events & EPOLLIN:
            self._receive()         # else the loop calls when something is there

    def drop(self) -> None:
        """Nothing that was taken will be used; a frame that waited is lost, as on a card that is reset."""
        self._forget()
        self._late = b""
        self.backend.negotiated(0)

    def drop_queue(self, index: int) -> None:
        """Buffers taken from the RX queue are the driver's again."""
        if index == net.RX:
            self._forget()

    def _forget(self) -> None:
        self._held.clear()
        self._span = 1
        self._full = False
        self._watch(0)

    def pause(self) -> None:
        """Buffers taken go back into the queue."""
        for _ in self._held:
            self.queues[net.RX].unpop()
        self._forget()

    def close(self) -> None:
        """The backend's end."""
        self._held.clear()
        self.backend.close()

    # for the user -----------------------------------------------------------------------------------

    @property
    def _up(self) -> bool:
        return self.link and self.backend.carrier

    def set_link(self, up: bool) -> None:
        """Plug the cable or pull it; the driver is told if it can be (VIRTIO_NET_F_STATUS). From any thread."""
        with self.lock:
            if up == self.link:
                return
            self.link = up
            self.backend.link(up)
            self._announce()
        self.io.call(self._go_on)

    def _announce(self) -> None:
        """Tell the driver if the link is another than we told last."""
        if self._up != self._told:
            self._told = self._up
            self.config_changed()

    def _go_on(self) -> None:
        with self.lock:
            self._full = False
            self._watch(0)
        for index in (net.RX, net.TX):
            self.serve(index)

    def _change(self, function: Callable[[], None]) -> None:
        """Another descriptor, or another carrier, by `function`. In the I/O thread, or before the guest starts."""
        with self.lock:
            function()
            self._announce()
        self._go_on()

    # driver to backend -----------------------------------------------------------------------------

    def _transmit(self) -> None:
        queue, send, up = self.queues[net.TX], self.backend.send, self._up
        limit = self._limits[net.TX] if self._limits else None
        for chain in self.requests(net.TX):
            parts = chain.readable
            size = sum(map(len, parts))
            if not net.SHORTEST <= size <= net.LONGEST:
                self.fault(f"a frame of {size - net.HEADER_SIZE} bytes")
                self.dropped += 1
            elif not up:
                self.dropped += 1
            else:
                if limit is not None:
                    delay = limit.delay()
                    if delay:
                        queue.unpop()
                        self._later(net.TX, delay)
                        break
                    limit.spend(size - net.HEADER_SIZE)
                try:
                    if send(parts):
                        self.sent += 1
                        self._deaf = False
                        if size > self.longest_sent:
                            self.longest_sent = size
                    elif self._deaf:
                        self.dropped += 1
                    else:
                        queue.unpop()
                        self._stall()
                        break
                except OSError:
                    self.dropped += 1       # the host would not have it: a bad header, an interface that is down
            queue.push(chain)
        self.used(net.TX)

    def _stall(self) -> None:
        """The backend is full: wait until it is not, but not for ever."""
        self._full = True
        self._stalls += 1
        stall = self._stalls
        self._watch(self._events | EPOLLOUT)

        def give_up() -> None:
            with self.lock:
                if not self._full or stall != self._stalls:
                    return
                self._full, self._deaf = False, True
                self._watch(self._events & ~EPOLLOUT)
            self.serve(net.TX)

        self.io.call_later(PATIENCE, give_up)

    # backend to driver -----------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        """The backend's descriptor has something for us, or room again."""
        with self.lock:
            if not self.running:
                self._watch(0)
                return
            if events & EPOLLOUT:
                self._full = False
                self._watch(self._events & ~EPOLLOUT)
                self.serve_locked(net.TX)
            if events & ~EPOLLOUT and self.running:
                self._watch(self._events & ~EPOLLIN)
                self.serve_locked(net.RX)

    def _receive(self) -> None:
        """Frames into buffers until there is no frame (then wait for one) or no buffer (then for the driver)."""
        watch = 0
        try:
            for _ in range(BATCH):
                if not self._one():
                    break
            else:
                self.io.call(lambda: self.serve(net.RX))
        except BlockingIOError:
            watch = EPOLLIN
        except OSError as error:
            self._lost(error)
        self.used(net.RX)
        self._watch(self._events & EPOLLOUT | watch)

    def _one(self) -> bool:
        """One frame. False where the driver or a timer will have us go on."""
        held, spill = self._held, self._spill
        if not self._up:
            self.backend.receive([spill])       # the cable is pulled: what is on it is lost
            self.dropped += 1
            return True
        if self._limits and (delay := self._limits[net.RX].delay()):
            self._later(net.RX, delay)
            return False
        if self._late:
            if self._place(len(self._late), 0, self._late):
                self._late = b""
                return True
            return False
        span = self._span
        if len(held) < span and not self._take(span):
            return False
        if span == 1:
            views = [*held[0].writable, spill]
        else:
            views = [view for chain in held[:span] for view in chain.writable]
            if len(views) >= IOV_MAX:       # many small buffers: copy, rather than have the host refuse them
                span, views = 0, []
            views.append(spill)
        size = self.backend.receive(views)
        if self._limits:
            self._limits[net.RX].spend(size - net.HEADER_SIZE)
        first = views[0]
        if span == 1 and net.HEADER_SIZE <= size <= len(first) and first is not spill:
            _put_num_buffers(first, net.NUM_BUFFERS, 1)         # nearly all frames
            self.queues[net.RX].push(held.pop(0), size)
            self.received += 1
            return True
        laid = sum(map(len, views)) - len(spill)
        if self._place(size, min(span, len(held)), spill[:max(0, size - laid)]):
            return True
        self._late = b"".join(views)[:size]
        return False

    def _take(self, wanted: int) -> bool:
        """Hold `wanted` of the driver's buffers, or fewer: whether there is one. Ask to hear of more if not enough."""
        queue, held = self.queues[net.RX], self._held
        while len(held) < wanted:
            chain = queue.pop()
            if chain is not None:
                held.append(chain)
            elif not queue.listen():
                break
        return bool(held)

    def _place(self, size: int, laid: int, rest: bytes | memoryview) -> bool:
        """Give the driver a frame of `size` bytes; the first `laid` buffers held have their part already, `rest` is
        what comes behind. False where there are not enough buffers yet."""
        held, queue = self._held, self.queues[net.RX]
        needed = room = 0
        while room < size:
            if (needed and not self.has(net.F_MRG_RXBUF)) or needed >= queue.size:
                self.dropped += 1       # without MRG_RXBUF a frame must fit one buffer
                return True
            if needed == len(held):
                self._take(needed + 1)
                if needed == len(held):
                    return False
            room += held[needed].writable_bytes
            needed += 1
        used, self._held[:needed] = held[:needed], []
        if needed > laid:
            scatter(rest, [view for chain in used[laid:] for view in chain.writable])
        head = used[0].writer()
        head.room(net.NUM_BUFFERS)
        # Split over buffers or not: a header cut in two is the guest's wish, and may leave no room for the number.
        head.write(needed.to_bytes(2, "little"))
        lengths = [chain.writable_bytes for chain in used]
        lengths[-1] -= room - size
        queue.push_all(list(zip(used, lengths, strict=True)))
        self._span = needed
        self.received += 1
        return True

    def _lost(self, error: OSError) -> None:
        """The backend is gone for good: an interface that was deleted, a program that ended."""
        self.lost = str(error)
        self.backend.carrier = False
        self._announce()

    # the loop --------------------------------------------------------------------------------------

    def _later(self, index: int, delay: float) -> None:
        if self._timers[index]:
            return

        def go_on() -> None:
            with self.lock:
                self._timers[index] = False
                self.serve_locked(index)

        self._timers[index] = True
        self.io.call_later(max(delay, 0.001), go_on)

    def _watch(self, events: int) -> None:
        """Wait for `events` of the backend's descriptor. Who closes a descriptor takes it out of the loop before."""
        fd = self.backend.fd
        if fd != self._watched:
            self._watched, self._events = fd, 0
        if fd < 0 or events == self._events:
            return
        if not events:
            self.io.remove(fd)
        elif self._events:
            self.io.modify(fd, events)
        else:
            self.io.add(fd, events, self._ready)
        self._events = events

    # state -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """The backend may be another one now."""
        self.backend.negotiated(self.features)
        self.backend.link(self.link)
        self._announce()

    def model_state(self) -> dict[str, object]:
        """What the driver knows of us. A frame that waits is not kept: networks lose frames."""
        return {"mac": self.guest_mac.hex(), "link": self.link, "told": self._told}

    def load_model(self, state: dict[str, object]) -> None:
        """Untrusted. An address that was asked for stays: a clone's is not the one that its driver knows."""
        mac = bytes.fromhex(str(state["mac"]))
        if len(mac) != 6:
            raise ValueError(f"a MAC address of {len(mac)} bytes")
        self.guest_mac, self.link, self._told = mac, bool(state["link"]), bool(state["told"])
        if not self._own_mac:
            self.mac = mac
