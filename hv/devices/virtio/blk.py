"""Block device: a disk (virtio 1.2, 5.2).

A request is a header, data, and a status byte, split over descriptors in any way (2.7.4.1); `_parts` is quick for the
usual way. It is served when it is taken, so nothing is ever in flight between two calls, and a reset, a pause or a
snapshot finds a disk at rest. The host's errors, a full file system among them, become the guest's I/O errors.

Left out on purpose: SIZE_MAX, GEOMETRY (nothing limits a segment; cylinders have no meaning), LIFETIME, SECURE_ERASE,
ZONED, SCSI commands (legacy). Driven by tests/unit/test_virtio_blk.py and tests/kvm/test_virtio_blk.py.
"""

from __future__ import annotations

__all__ = ["Block"]

from struct import Struct

from hv.devices.virtio import ids
from hv.devices.virtio.chain import Reader, Writer
from hv.devices.virtio.device import VirtioDevice
from hv.devices.virtio.rate import TokenBucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.blk_file import DiskFile
    from hv.devices.virtio.blk_overlay import Overlay
    from hv.devices.virtio.chain import Chain

    Buffer = bytes | memoryview
    Views = list[memoryview]

# features (5.2.3)
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14

# request types and status (5.2.6)
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
ID_BYTES = 20
_HEADER = Struct("<IIQ")            # type, reserved, sector
_HEADER_SIZE = 16
_read_header = _HEADER.unpack_from
_RANGE = Struct("<QII")             # sector, number of sectors, flags: of DISCARD and WRITE_ZEROES
UNMAP = 1

# configuration space (5.2.4): capacity, size_max, seg_max, geometry, blk_size, topology (4), writeback, unused,
# num_queues, discard (3), write_zeroes (2, may_unmap and 3 unused), secure erase (3)
_CONFIG = Struct("<QII4xIBBHIBxHIIIIIB3x12x")
WRITEBACK = 32                      # offset of writeback

_SHIFT = 9                          # a sector is 512 bytes, whatever blk_size says (5.2.4)
_SECTOR_MASK = 511
QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2            # header and status take a descriptor each
PHYSICAL = 4096                     # what the host's file systems and page cache work in
DISCARD_SECTORS = 1 << 30 >> _SHIFT     # for one range: quick, the host only forgets extents
ZEROES_SECTORS = 64 << 20 >> _SHIFT     # less: the host may have to write them
RANGES = 16
BYTES_A_TURN = 64 << 20             # of data moved before the thread looks whether it should end
_SOON = 64 << 10                    # a request as large as this is announced by itself: the driver can go on with it


class _Refused(Exception):
    """The request ends with a status other than OK; `fault`: because the driver broke a rule."""

    def __init__(self, status: int, fault: str = "") -> None:
        self.status = status
        self.fault = fault


class Block(VirtioDevice):
    """virtio-blk on `disk`, which it owns. `serial`: at most 20 bytes."""

    ID = ids.BLOCK
    NAME = "virtio-blk"
    KIND = "disk"
    DRIVER = "CONFIG_VIRTIO_BLK (module virtio_blk)"
    PCI_CLASS = 0x018000            # mass storage, other (PCI 3.0, appendix D)
    OWN_THREAD = True

    def __init__(self, disk: DiskFile | Overlay, *, readonly: bool = False, serial: bytes = b"", queues: int = 1,
                 iops: int = 0, bps: int = 0) -> None:
        super().__init__()
        self.QUEUES = (QUEUE_SIZE,) * queues
        self.FEATURES = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES
        if readonly:
            self.FEATURES = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_RO
        if queues > 1:
            self.FEATURES |= F_MQ
        self.disk = disk
        self._end = disk.size
        self.readonly = readonly
        self.serial = serial
        self.writeback = True
        self._requests = TokenBucket(iops) if iops else None
        self._bytes = TokenBucket(bps) if bps else None
        self._limited = bool(iops or bps)
        self._waiting: set[int] = set()     # queues that a timer will serve
        self.errors = 0                     # requests that the host failed

    # configuration ---------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Capacity, limits, topology, cache mode (5.2.4)."""
        block = self.disk.block_size
        change = not self.readonly
        return _CONFIG.pack(
            self.disk.size >> _SHIFT, 0, SEG_MAX, block,
            max(0, (PHYSICAL // block).bit_length() - 1), 0, max(1, PHYSICAL // block), 0,
            self.writeback, len(self.QUEUES),
            DISCARD_SECTORS * change, RANGES * change, (PHYSICAL >> _SHIFT) * change,
            ZEROES_SECTORS * change, change, change)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver chooses the cache mode (5.2.5, 5.2.6.2): nothing else can be written."""
        if offset == WRITEBACK and len(data) == 1 and self.has(F_CONFIG_WCE) and data[0] <= 1:
            self.writeback = bool(data[0])
            if not self.writeback:
                self._flush_quietly()       # writes from now on are stable; those before should not be worse off
        else:
            self.fault(f"a write of {len(data)} bytes to the configuration space at {offset:#x}")

    def activate(self) -> None:
        """5.2.5.2: with CONFIG_WCE and without FLUSH, writeback starts as 0."""
        if self.has(F_CONFIG_WCE) and not self.has(F_FLUSH):
            self.writeback = False

    def _stable(self) -> bool:
        """Whether a write must be on the disk when it completes (5.2.6.2)."""
        return not self.writeback if self.has(F_CONFIG_WCE) else not self.has(F_FLUSH)

    # requests --------------------------------------------------------------------------------------

    def notified(self, index: int) -> None:
        """Serve the requests (5.2.6)."""
        queue, limited = self.queues[index], self._limited
        left = BYTES_A_TURN
        if limited and self._must_wait(index):
            return
        for chain in self.requests(index):
            written, moved = self._request(chain)
            queue.push(chain, written)
            if moved >= _SOON:
                self.used(index)
            left -= moved
            if limited and self._must_wait(index, moved):
                break
            if left < 0:
                self.io.call(lambda: self.serve(index))
                break
        self.used(index)

    def _request(self, chain: Chain) -> tuple[int, int]:
        """Do what `chain` asks, and set its status: (bytes written to it from its start, bytes of data moved)."""
        # The usual way first: header and status in descriptors of their own.
        readable, writable = chain.readable, chain.writable
        if readable and len(readable[0]) == _HEADER_SIZE and writable and len(writable[-1]) == 1:
            header: Buffer = readable[0]
            data, room, status = readable[1:], writable[:-1], writable[-1]
        else:
            parts = _split(chain)
            if parts is None:
                self.fault(f"a request of {chain.readable_bytes} bytes to read, {chain.writable_bytes} to write")
                return 0, 0
            header, data, room, status = parts
        kind, _, sector = _read_header(header)
        try:
            if kind == IN:
                moved = wrote = self._check(room, sector)
                if moved:
                    self.disk.read(room, sector << _SHIFT, moved)
            elif kind == OUT:
                moved, wrote = self._check(data, sector), 0
                if self.readonly:
                    raise _Refused(IOERR, "a write to a read-only disk (5.2.6.2)")
                if moved:
                    self.disk.write(data, sector << _SHIFT, moved, self._stable())
            else:
                moved, wrote = self._rare(kind, data, room)
        except _Refused as refused:
            if refused.fault:
                self.fault(refused.fault)
            status[0] = refused.status
            return not room, 0
        except OSError as error:
            self._failed(error)
            status[0] = IOERR
            return not room, 0
        status[0] = OK
        return wrote + (not room or wrote == sum(map(len, room))), moved

    def _check(self, views: Views, sector: int) -> int:
        """The length of `views`, which must be whole sectors of the disk."""
        length = len(views[0]) if len(views) == 1 else sum(map(len, views))
        if length & _SECTOR_MASK or (sector << _SHIFT) + length > self._end:
            raise _Refused(IOERR, f"{length} bytes at sector {sector} of {self._end >> _SHIFT} (5.2.6.1)")
        return length

    def _rare(self, kind: int, data: Views, room: Views) -> tuple[int, int]:
        """All requests but reads and writes: (what they count for in a turn, bytes written into `room`)."""
        if kind == FLUSH:
            self.disk.flush()
        elif kind == GET_ID:
            serial = self.serial.ljust(ID_BYTES, b"\0")    # no NUL behind 20 bytes (5.2.6)
            return 0, Writer(room).write(serial)
        elif kind in (DISCARD, WRITE_ZEROES) and self.has(F_DISCARD if kind == DISCARD else F_WRITE_ZEROES):
            return self._change(kind, data), 0
        else:
            raise _Refused(UNSUPP)
        return 0, 0

    def _change(self, kind: int, data: Views) -> int:
        """DISCARD and WRITE_ZEROES: the ranges in `data`, all checked before the first is touched."""
        most, longest = (RANGES, DISCARD_SECTORS) if kind == DISCARD else (1, ZEROES_SECTORS)
        table = Reader(data).read(most * _RANGE.size + 1)
        if not table or len(table) % _RANGE.size:
            raise _Refused(IOERR, f"{len(table)} bytes or more of ranges, not 1 to {most} (5.2.6.1)")
        ranges = []
        for sector, count, flags in _RANGE.iter_unpack(table):
            if flags & ~(UNMAP if kind == WRITE_ZEROES else 0):
                raise _Refused(UNSUPP, f"flags {flags:#x} of a range (5.2.6.2)")
            if count > longest or (sector + count) << _SHIFT > self._end:
                raise _Refused(IOERR, f"a range of {count} sectors from {sector} (5.2.6.1)")
            if count:
                ranges.append((sector << _SHIFT, count << _SHIFT, bool(flags & UNMAP)))
        moved = 0
        for offset, length, unmap in ranges:
            if kind == DISCARD:
                self.disk.discard(offset, length)
            else:
                self.disk.zero(offset, length, unmap)
                moved += length
        if moved and self._stable():
            self.disk.flush()
        return moved

    # rates -----------------------------------------------------------------------------------------

    def _must_wait(self, index: int, moved: int | None = None) -> bool:
        """Whether the queue has to wait, after a request that moved so much; a timer goes on then."""
        seconds = 0.0
        for bucket, amount in ((self._requests, 1), (self._bytes, moved)):
            if bucket is not None:
                if moved is not None:
                    bucket.spend(amount or 0)
                seconds = max(seconds, bucket.delay())
        if not seconds:
            return False
        if index not in self._waiting:
            self._waiting.add(index)
            self.io.call_later(seconds, lambda: self._go_on(index))
        return True

    def _go_on(self, index: int) -> None:
        self._waiting.discard(index)
        self.serve(index)

    # life and state --------------------------------------------------------------------------------

    def drop(self) -> None:
        """A reset: nothing is in flight; the cache mode starts anew."""
        self.writeback = True

    def pause(self) -> None:
        """Have all that completed in the files, for who copies them."""
        self._flush_quietly()

    def _flush_quietly(self) -> None:
        try:
            self.disk.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """The host failed a request: the guest gets an I/O error, the user a line at the end."""
        self.errors += 1
        reason = self.warnings[0].partition("first: ")[2] if self.warnings else error.strerror or str(error)
        self.warnings[:] = [f"the host failed {self.errors} requests, first: {reason}"]

    def close(self) -> None:
        """Close the files."""
        self.disk.close()

    def model_state(self) -> dict[str, object]:
        """The cache mode, and how large the disk must be. Its content is the files'."""
        return {"writeback": self.writeback, "size": self.disk.size}

    def load_model(self, state: dict[str, object]) -> None:
        """Take it over. ValueError where the disk is another."""
        if state["size"] != self.disk.size:
            raise ValueError(f"state of a disk of {state['size']!r} bytes, not {self.disk.size}")
        self.writeback = bool(state["writeback"])


def _split(chain: Chain) -> tuple[bytes, Views, Views, memoryview] | None:
    """(header, data to write, room for data, status byte) of a chain split in any way; None where one is missing."""
    reader = chain.reader()
    header = reader.read(_HEADER_SIZE)
    if not chain.writable:
        return None
    last = chain.writable[-1]
    status = last[-1:]
    if len(header) < _HEADER_SIZE:
        status[0] = IOERR
        return None
    room = chain.writable[:-1]
    if len(last) > 1:
        room.append(last[:-1])
    return header, reader.take(reader.left), room, status
