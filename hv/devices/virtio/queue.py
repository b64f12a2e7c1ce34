"""A split virtqueue, the device's side of it (virtio 1.2, 2.7).

The driver makes requests available in one ring, the device returns them in the other. Everything in both rings and in
the descriptor table is the guest's and may change at any time, so every index, address and length is checked when it
is used; what can't be is a QueueError, on which the device asks to be reset (2.1.2).

`pop` and `push` are the hottest code of all devices, so they are written out, with structs packed at once; a request
of three descriptors costs about 4 us. Driven by tests/unit/test_virtio_queue.py and test_virtio_queue_model.py there.
"""

from __future__ import annotations

__all__ = ["Queue", "QueueError"]

from _thread import allocate_lock
from struct import Struct

from hv.devices.virtio.chain import Chain
from hv.devices.virtio.ids import (
    AVAIL_NO_INTERRUPT,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    QUEUE_SIZE_MAX,
    USED_NO_NOTIFY,
)
from hv.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.memory.guest import GuestMemory

_DESCRIPTOR = Struct("<QIHH")       # address, length, flags, next (2.7.5)
_read_descriptor = _DESCRIPTOR.unpack_from
_write_used = Struct("<II").pack_into       # id, length (2.7.8)
_DESCRIPTOR_SIZE, _USED_SIZE = 16, 8
_MOST_BYTES = 1 << 32               # 2.7.5.2: a chain is not longer than this
_WRAP = 0xFFFF                      # ring indices are 16 bits wide
_ADDRESS = (1 << 64) - 1


class QueueError(Exception):
    """The driver broke a rule of the ring; the text says which."""


class Queue:
    """One virtqueue. The driver sets `size` (entries), `desc`, `avail`, `used` (GPAs), then it is enabled."""

    __slots__ = ("_avail", "_fence", "_limit", "_mask", "_memory", "_next", "_ram", "_signalled", "_table", "_used",
                 "_used_index", "_used_ring", "avail", "desc", "event_idx", "index", "indirect", "max_size", "ready",
                 "size", "used")

    def __init__(self, memory: GuestMemory, index: int, max_size: int) -> None:
        self._memory = memory
        self._fence = allocate_lock()
        self.index = index
        self.max_size = max_size
        self.event_idx = self.indirect = False      # what the driver took of EVENT_IDX and INDIRECT_DESC
        self.reset()

    def reset(self) -> None:
        """As at power-on: nothing set, not enabled."""
        self.size = self.max_size
        self.desc = self.avail = self.used = 0
        self.disable()

    def disable(self) -> None:
        """Stop using the rings. A driver that enables them again has zeroed them before (4.2.3.2, step 4)."""
        self.ready = False
        self._next = self._used_index = self._signalled = 0
        empty = memoryview(b"")
        self._table = self._ram = empty
        self._avail = self._used_ring = self._used = empty
        self._limit = 0

    def enable(self) -> None:
        """Start using the rings where the driver says they are. QueueError where they can't be there."""
        size = self.size
        if not 0 < size <= min(self.max_size, QUEUE_SIZE_MAX) or size & (size - 1):
            raise QueueError(f"queue {self.index}: a size of {size}, at most {self.max_size} and a power of 2 (2.7)")
        # 2.7: alignments of the three parts, and their sizes with the event index behind each ring
        for name, address, alignment in (("descriptor table", self.desc, 16), ("available ring", self.avail, 2),
                                         ("used ring", self.used, 4)):
            if address & (alignment - 1):
                raise QueueError(f"queue {self.index}: the {name} at {address:#x} is not aligned to {alignment} (2.7)")
        try:
            view = self._memory.view
            self._table = view(self.desc, _DESCRIPTOR_SIZE * size)
            self._avail = view(self.avail, 6 + 2 * size).cast("H")
            self._used_ring = view(self.used, 6 + _USED_SIZE * size)
            self._used = self._used_ring[:6 + _USED_SIZE * size].cast("H")
        except GuestError as error:
            self.disable()
            raise QueueError(f"queue {self.index}: {error}") from None
        self._mask = size - 1
        # Nearly all guests have one range of RAM, and it starts at 0: a view of it saves a search per descriptor.
        region = self._memory.regions[0]
        self._ram, self._limit = region.view, region.size if self._memory.first_use is None else 0
        self.ready = True

    # the available ring ---------------------------------------------------------------------------

    def pending(self) -> int:
        """How many requests wait. QueueError where the index jumped."""
        count = (self._avail[1] - self._next) & _WRAP
        if count > self.size:
            raise QueueError(f"queue {self.index}: the available index jumped by {count} in a ring of {self.size}")
        return count

    def pop(self) -> Chain | None:
        """The next request, None where there is none. QueueError where its chain is not one."""
        avail, position = self._avail, self._next
        waiting = (avail[1] - position) & _WRAP
        if not waiting:
            return None
        if waiting > self.size:
            raise QueueError(f"queue {self.index}: the available index jumped by {waiting} in a ring of {self.size}")
        head = avail[2 + (position & self._mask)]
        self._next = (position + 1) & _WRAP
        return self._walk(head)

    def again(self, head: int) -> Chain:
        """The chain of a request that was popped before a snapshot and not pushed yet. QueueError as in pop()."""
        if not self.ready:
            raise QueueError(f"queue {self.index}: a request in flight, but the queue is not in use")
        return self._walk(head)

    def unpop(self) -> None:
        """Take the last pop() back: the device had no use for it yet."""
        self._next = (self._next - 1) & _WRAP

    def _walk(self, head: int) -> Chain:
        table, count, at = self._table, self.size, head
        ram, limit = self._ram, self._limit
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        total = steps = 0
        indirect = False
        while True:
            if at >= count:
                raise QueueError(f"queue {self.index}: descriptor {at} of {count}")
            address, length, flags, following = _read_descriptor(table, at * _DESCRIPTOR_SIZE)
            if flags & DESC_INDIRECT:
                self._check_indirect(length, flags, indirect)
                end = address + length
                table = ram[address:end] if end <= limit else self._elsewhere(address, length)
                count, at, indirect = length >> 4, 0, True
                continue
            steps += 1
            if steps > self.size:       # 2.7.5.3.1: no chain is longer than the queue; a loop is
                raise QueueError(f"queue {self.index}: a chain of more than {self.size} descriptors from {head}")
            total += length
            if length:
                end = address + length
                view = ram[address:end] if end <= limit else self._elsewhere(address, length)
                if flags & DESC_WRITE:
                    writable.append(view)
                elif writable:
                    raise QueueError(f"queue {self.index}: a readable descriptor behind a writable one (2.7.4.2)")
                else:
                    readable.append(view)
            if not flags & DESC_NEXT:
                break
            at = following
        if total > _MOST_BYTES:
            raise QueueError(f"queue {self.index}: a chain of {total} bytes (2.7.5.2)")
        if self._memory.dirty is not None:
            self._memory.written(writable)
        return Chain(head, readable, writable)

    def _check_indirect(self, length: int, flags: int, nested: bool) -> None:
        """Whether a descriptor may stand for a table (2.7.5.3)."""
        if not self.indirect:
            raise QueueError(f"queue {self.index}: an indirect descriptor without INDIRECT_DESC (2.7.5.3.1)")
        if nested or flags & DESC_NEXT:
            raise QueueError(f"queue {self.index}: an indirect descriptor inside a table, or with NEXT (2.7.5.3.1)")
        if not length or length % _DESCRIPTOR_SIZE or length > _DESCRIPTOR_SIZE * self.size:
            raise QueueError(f"queue {self.index}: an indirect table of {length} bytes (2.7.5.3.1)")

    def _elsewhere(self, address: int, length: int) -> memoryview:
        try:
            return self._memory.view(address, length)
        except GuestError as error:
            raise QueueError(f"queue {self.index}: {error}") from None

    # the used ring --------------------------------------------------------------------------------

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give `chain` back, `written` bytes of its writable part used. The driver learns of it by an interrupt."""
        used = self._used_index
        _write_used(self._used_ring, 4 + _USED_SIZE * (used & self._mask), chain.head, written)
        if self._memory.dirty is not None:
            self._memory.written(chain.writable)    # it may have been popped before the tracking began
        # x86 keeps stores in order, so the entry is there before the index says so (2.7.8.2).
        self._used_index = used = (used + 1) & _WRAP
        self._used[1] = used

    def push_all(self, used: list[tuple[Chain, int]]) -> None:
        """`push` for several chains of which the driver must see all or none (5.1.6.4, mergeable buffers)."""
        index = self._used_index
        for chain, written in used:
            _write_used(self._used_ring, 4 + _USED_SIZE * (index & self._mask), chain.head, written)
            if self._memory.dirty is not None:
                self._memory.written(chain.writable)
            index = (index + 1) & _WRAP
        self._used_index = index
        self._used[1] = index

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (2.7.7, 2.7.10)."""
        new, old = self._used_index, self._signalled
        if new == old:
            return False
        self._signalled = new
        self._barrier()
        if self.event_idx:
            event = self._avail[2 + self.size]
            return ((new - event - 1) & _WRAP) < ((new - old) & _WRAP)
        return not self._avail[0] & AVAIL_NO_INTERRUPT

    def unseen(self) -> bool:
        """Whether the driver has yet to look at what was pushed, as far as its event index tells; else it may."""
        if self.event_idx:
            return bool(self._avail[2 + self.size] != self._used_index)
        return not self._avail[0] & AVAIL_NO_INTERRUPT

    def quiet(self) -> None:
        """Ask not to be notified while the device looks by itself (2.7.10); a hint. With EVENT_IDX nothing to do."""
        if not self.event_idx:
            self._used[0] = USED_NO_NOTIFY

    def listen(self) -> bool:
        """Ask to be notified of the next request. True where one came before that was asked: look again."""
        if self.event_idx:
            self._used[2 + 4 * self.size] = self._next
        else:
            self._used[0] = 0
        self._barrier()
        return bool(self.pending())

    def _barrier(self) -> None:
        """A full memory barrier: our store must be seen before our next load (2.7.7.1). A lock's is one on x86."""
        self._fence.acquire(False)
        self._fence.release()

    # state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Where it is and how far it got."""
        return {"size": self.size, "ready": self.ready, "desc": self.desc, "avail": self.avail, "used": self.used,
                "next": self._next, "used_index": self._used_index, "signalled": self._signalled}

    def load(self, state: dict[str, object]) -> None:
        """Take over what `state` returned. Untrusted: QueueError where it can't be."""
        values = {name: int(state[name]) for name in state}  # type: ignore[call-overload]
        self.disable()
        self.size = values["size"] & 0xFFFF
        self.desc, self.avail, self.used = (values[name] & _ADDRESS for name in ("desc", "avail", "used"))
        self._next, self._used_index = values["next"] & _WRAP, values["used_index"] & _WRAP
        self._signalled = values["signalled"] & _WRAP
        if values["ready"]:
            self.enable()
