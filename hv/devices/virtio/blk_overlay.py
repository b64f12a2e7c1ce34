"""A copy-on-write overlay: what the guest writes goes to a file of its own, the base image stays as it is.

    overlay file    header (4 KiB) | bitmap, a bit for each cluster of 4 KiB | the clusters, each at its own place

The overlay is a sparse file: a cluster of the disk's offset X stands at `data + X`, its bit says whether it is there.
So nothing is ever allocated or moved, one request is one read or write, and blocks that the host's file system has not
given yet cost nothing. 4 KiB is what file systems write in, so that clusters are rarely copied.

A cluster's bit must not reach the disk before its content. Bits are kept in memory and written by `flush`: sync the
clusters, write the bits, sync again. A crash in between shows the base's content, as if the writes since the last flush
had never been: they were volatile (virtio 1.2, 5.2.6.2). A temporary overlay has no name, and its bits no file.

Overlays stack: those between the base and the one that is written are only read, and any number of machines share them
(snapshots: hv/snapshot/disks.py). A read asks from the top down, a bitmap in memory for each. An overlay that others
may stand on has a random name in its header's page; the header of one on top covers it, so that no other stack is taken
for its own.

Left out on purpose: sizes other than the base's, snapshots inside the file.
Driven by tests/unit/test_virtio_blk_overlay.py and tests/unit/test_snapshot_disks.py.
"""

from __future__ import annotations

__all__ = ["CLUSTER", "LAYERS_MOST", "Overlay", "base_identity", "open_overlay", "write_overlay"]

import errno
import mmap
import os
import stat
from binascii import crc32
from struct import Struct

from hv.devices.virtio.blk_file import DiskFile, lock
from hv.devices.virtio.chain import Reader
from hv.errors import ConfigError
from hv.linux.sparse import copy_sparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Views = list[memoryview]

MAGIC, VERSION = b"PYHVCOW\n", 1
CLUSTER, _SHIFT = 4096, 12
# magic, version, cluster size, base: size, modification time (ns; 0 of a device), checksum of its beginning;
# then a checksum of all that
_HEADER = Struct("<8sIIQQI")
_CHECKSUM = Struct("<I")
_HEADER_SIZE = 4096
_NAME_AT, _NAME_BYTES = 64, 16  # in the header's page: what tells one overlay from another of the same base
_BLOCK = 4096                   # the bitmap is written in these
_BLOCK_SHIFT = _SHIFT + 12 + 3  # bytes of disk that a block of the bitmap stands for, as a power of 2
_SAMPLE = 64 << 10              # bytes of the base that its checksum covers
LAYERS_MOST = 8                 # overlays that are only read; a lookup in each costs a read about 1 us


class Overlay:
    """`top`, with what it lacks taken from `base`, perhaps an overlay itself; owns both.

    `top`'s clusters begin at `data`, its bitmap at `bitmap_at`; None where no bitmap is kept.
    """

    def __init__(self, base: DiskFile | Overlay, top: DiskFile, data: int, bitmap_at: int | None) -> None:
        self.size: int = base.size
        self.block_size: int = base.block_size
        self.readonly = top.readonly
        self._base, self._top, self._data, self._bitmap_at = base, top, data, bitmap_at
        self._clusters = -(-base.size // CLUSTER)
        # Anonymous memory: what is never set costs none.
        self._map = mmap.mmap(-1, _bitmap_bytes(base.size))
        self._bits = memoryview(self._map)
        self._dirty: set[int] = set()       # blocks of the bitmap that the file does not have yet
        if bitmap_at is not None:
            self._load(bitmap_at)

    def _load(self, at: int) -> None:
        for start in range(0, len(self._bits), 1 << 20):
            piece = os.pread(self._top.fd, min(1 << 20, len(self._bits) - start), at + start)
            if piece != bytes(len(piece)):
                self._bits[start:start + len(piece)] = piece
        if int.from_bytes(self._bits[self._clusters >> 3:], "little") >> (self._clusters & 7):
            raise ValueError("its bitmap names clusters behind the end of the disk")

    @property
    def base(self) -> DiskFile | Overlay:
        """What it stands on."""
        return self._base

    @property
    def fd(self) -> int:
        """The descriptor of its own file."""
        return self._top.fd

    def identity(self) -> tuple[int, int]:
        """(time of change of the file below all, checksum of all that it and those below it are)."""
        changed, checksum = base_identity(self._base)
        return changed, crc32(self._bits, crc32(self.name, checksum))

    @property
    def name(self) -> bytes:
        """The random name of one that was written as a whole; zeros, or nothing of a temporary one."""
        return b"" if self._bitmap_at is None else os.pread(self._top.fd, _NAME_BYTES, _NAME_AT)

    def _present(self, offset: int, length: int) -> tuple[int, int]:
        """(the bits of the clusters that the range touches, how many clusters these are)."""
        first, last = offset >> _SHIFT, (offset + length - 1) >> _SHIFT
        count = last - first + 1
        bits = int.from_bytes(self._bits[first >> 3:(last >> 3) + 1], "little") >> (first & 7)
        return bits & ((1 << count) - 1), count

    def _runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
        """(whether the overlay has it, offset, length) for each part of the range."""
        bits, count = self._present(offset, length)
        at, end, cluster = offset, offset + length, offset >> _SHIFT
        while count:
            there = bits & 1
            run = _ones(bits if there else ~bits, count)
            cluster += run
            until = min(cluster << _SHIFT, end)
            yield bool(there), at, until - at
            at, count, bits = until, count - run, bits >> run

    def read(self, views: Views, offset: int, length: int) -> None:
        """As DiskFile's."""
        bits, count = self._present(offset, length)
        if not bits:
            self._base.read(views, offset, length)
        elif bits == (1 << count) - 1:
            self._top.read(views, self._data + offset, length)
        else:
            rest = Reader(views)
            for there, at, size in self._runs(offset, length):
                part = rest.take(size)
                if there:
                    self._top.read(part, self._data + at, size)
                else:
                    self._base.read(part, at, size)

    def write(self, views: Views, offset: int, length: int, stable: bool = False) -> None:
        """As DiskFile's. Clusters written in part are copied from the base first."""
        bits, count = self._present(offset, length)
        if bits != (1 << count) - 1:
            if offset & (CLUSTER - 1) and not bits & 1:
                self._copy(offset >> _SHIFT)
            end = offset + length
            if end & (CLUSTER - 1) and end != self.size and not bits >> (count - 1) \
                    and not (count == 1 and offset & (CLUSTER - 1)):
                self._copy((end - 1) >> _SHIFT)
            self._top.write(views, self._data + offset, length)
            self._mark(offset >> _SHIFT, count)
        else:
            self._top.write(views, self._data + offset, length)
        if stable:
            self.flush()

    def _copy(self, cluster: int) -> None:
        start = cluster << _SHIFT
        size = min(CLUSTER, self.size - start)
        buffer = memoryview(bytearray(size))
        self._base.read([buffer], start, size)
        self._top.write([buffer], self._data + start, size)

    def _mark(self, first: int, count: int) -> None:
        """The overlay has these clusters now."""
        start, end = first >> 3, (first + count + 7) >> 3
        bits = int.from_bytes(self._bits[start:end], "little") | ((1 << count) - 1) << (first & 7)
        self._bits[start:end] = bits.to_bytes(end - start, "little")
        if self._bitmap_at is not None:
            self._dirty.update(range(start // _BLOCK, (end - 1) // _BLOCK + 1))

    def flush(self) -> None:
        """As DiskFile's. The clusters first, then the bits that say so."""
        if self._bitmap_at is None:
            return      # nothing of a temporary overlay outlives us
        self._top.flush()
        if self._dirty:
            for block in sorted(self._dirty):
                part = self._bits[block * _BLOCK:(block + 1) * _BLOCK]
                self._top.write([part], self._bitmap_at + block * _BLOCK, len(part))
            self._top.flush()
            self._dirty.clear()

    def discard(self, offset: int, length: int) -> None:
        """As DiskFile's. The base's blocks stay, so only whole clusters of the overlay's own are given back."""
        start, end = self._whole(offset, length)
        if start < end:
            self._top.discard(self._data + start, end - start)      # holes where the overlay has none

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """As DiskFile's. Whole clusters become the overlay's, and holes in it with `unmap`."""
        start, end = self._whole(offset, length)
        if start >= end:
            self.write([memoryview(bytes(length))], offset, length)
            return
        for at, stop in ((offset, start), (end, offset + length)):
            if at < stop:
                self.write([memoryview(bytes(stop - at))], at, stop - at)
        self._top.zero(self._data + start, end - start, unmap)
        self._mark(start >> _SHIFT, -(-(end - start) // CLUSTER))

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The part of the range that is whole clusters; the last of the disk may be a short one."""
        end = offset + length
        return -(-offset // CLUSTER) * CLUSTER, end if end == self.size else end & -CLUSTER

    def close(self) -> None:
        """As DiskFile's; what is still in memory is written first, as after a flush."""
        try:
            if self._dirty and self._top.fd >= 0:
                self.flush()
        except OSError:
            pass        # the guest heard of it when it flushed, or never asked
        self._base.close()
        self._top.close()
        self._bits.release()
        self._map.close()


def _ones(bits: int, most: int) -> int:
    """How many of the lowest bits are 1, at most `most`."""
    clear = ~bits & ((1 << most) - 1)
    return (clear & -clear).bit_length() - 1 if clear else most


def _bitmap_bytes(size: int) -> int:
    """Whole blocks with a bit for each cluster of `size` bytes."""
    return -(-size >> _BLOCK_SHIFT) * _BLOCK


def open_overlay(base: DiskFile, base_path: str, path: str, layers: tuple[str, ...] = ()) -> Overlay:
    """`base` under the overlay in file `path`, made if it is missing or empty; "temp": in none. ConfigError.

    `layers` are overlays between the two, only read, the lowest first. Takes `base` over in any case: it is closed
    where there is an error.
    """
    fd = -1
    under: DiskFile | Overlay = base
    try:
        if len(layers) > LAYERS_MOST:
            raise ConfigError(f"disk {base_path}: {len(layers)} overlays, one on the other",
                              f"possible are {LAYERS_MOST}")
        for layer in layers:
            under = _open_layer(under, base_path, layer)
        if path == "temp":
            data, bitmap_at = 0, None
            fd = _nameless()
        else:
            data, bitmap_at = _HEADER_SIZE + _bitmap_bytes(base.size), _HEADER_SIZE
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _check(fd, path, under, base_path, shared=False)
        # Also where a crash came between header and size: what is missing reads as zeros, "not here".
        if os.fstat(fd).st_size < data + base.size:
            os.ftruncate(fd, data + base.size)
        return Overlay(under, DiskFile(fd, data + base.size, readonly=False), data, bitmap_at)
    except BaseException as error:
        under.close()
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError):
            raise ConfigError(f"overlay {path}: {error.strerror}",
                              "name a file in a folder with room, or temp") from None
        if isinstance(error, ValueError):
            raise ConfigError(f"overlay {path}: {error}", "restore it from a copy, or remove it") from None
        raise


def _open_layer(under: DiskFile | Overlay, base_path: str, path: str) -> Overlay:
    """The overlay in `path` on `under`, only read. ConfigError; `under` stays open then."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)      # a FIFO must not hang us
    except (OSError, ValueError) as error:
        raise ConfigError(f"overlay {path}: {getattr(error, 'strerror', None) or error}",
                          "it is a part of the disk") from None
    try:
        _check(fd, path, under, base_path, shared=True)
        data = _HEADER_SIZE + _bitmap_bytes(under.size)
        if os.fstat(fd).st_size < data + under.size:
            raise ValueError("it has been cut short")
        return Overlay(under, DiskFile(fd, data + under.size, readonly=True), data, _HEADER_SIZE)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, (OSError, ValueError)):
            raise ConfigError(f"overlay {path}: {getattr(error, 'strerror', None) or error}",
                              "restore it from a copy") from None
        raise


def _nameless() -> int:
    """A file without a name, where large temporary files belong (file-hierarchy(7)): in TMPDIR, or /var/tmp."""
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:     # of file systems that can't; there the name lives for a moment
            raise ConfigError(f"overlay=temp: no file in {folder}: {error.strerror}",
                              "set TMPDIR to a folder with room") from None
    name = f"{folder}/pyhv-overlay-{os.getpid()}-{os.urandom(8).hex()}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(name)
    return fd


def _check(fd: int, path: str, base: DiskFile | Overlay, base_path: str, *, shared: bool) -> None:
    """Lock the overlay; write its header if it is new. ConfigError where it is not one, or not one for `base`."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ConfigError(f"overlay {path}: not a file", "name a file; it is made if it is missing")
    lock(fd, path, shared=shared)
    wanted = _header(base)
    found = os.pread(fd, len(wanted), 0)
    if not found and not shared:
        os.pwrite(fd, wanted.ljust(_HEADER_SIZE, b"\0"), 0)
        os.fdatasync(fd)
        _sync_folder(path)
        return
    if found == wanted:
        return
    magic, version, cluster, size, _, _ = _HEADER.unpack(found[:_HEADER.size].ljust(_HEADER.size, b"\0"))
    if magic != MAGIC:
        raise ConfigError(f"overlay {path}: a file, but not an overlay of pyhv", "name another; it is made if missing")
    if len(found) < len(wanted) or _CHECKSUM.unpack_from(found, _HEADER.size)[0] != crc32(found[:_HEADER.size]):
        raise ConfigError(f"overlay {path}: its header is damaged", "restore it from a copy, or remove it")
    if version != VERSION or cluster != CLUSTER:
        raise ConfigError(f"overlay {path}: of version {version}, not {VERSION}", "use the pyhv that made it")
    what = f"is for a base of {size} bytes, {base_path} has {base.size}" if size != base.size else \
        f"does not fit: {base_path} has changed since, or is another base, or there are other overlays between them"
    raise ConfigError(f"overlay {path}: {what}", "name the base it was made for, with its time of change (cp -p), or "
                      "remove the overlay")


def _header(base: DiskFile | Overlay) -> bytes:
    """What the header of an overlay on `base` must be."""
    header = _HEADER.pack(MAGIC, VERSION, CLUSTER, base.size, *base_identity(base))
    return header + _CHECKSUM.pack(crc32(header))


def base_identity(base: DiskFile | Overlay) -> tuple[int, int]:
    """(time of change in ns, 0 of a device; checksum) by which a base is known again."""
    if isinstance(base, Overlay):
        return base.identity()
    status = os.fstat(base.fd)
    sample = memoryview(bytearray(min(_SAMPLE, base.size)))
    base.read([sample], 0, len(sample))
    changed = max(0, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else 0     # before 1970: as in 1970
    return changed, crc32(sample)


def write_overlay(parts: list[Overlay], fd: int) -> None:
    """An overlay file of what `parts` hold together, one on the other, the lowest first; nothing is synced. OSError.

    A part that is only read keeps its name when it is copied alone: overlays on it go on fitting. Blocks are shared
    with the parts' files where the host's file system can.
    """
    lowest = parts[0]
    name = lowest.name if lowest.readonly and len(parts) == 1 else os.urandom(_NAME_BYTES)
    bits = lowest._bits if len(parts) == 1 else _union(parts)
    data = _HEADER_SIZE + len(bits)
    os.ftruncate(fd, data + lowest.size)
    os.pwrite(fd, (_header(lowest.base).ljust(_NAME_AT, b"\0") + name).ljust(_HEADER_SIZE, b"\0"), 0)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start:start + _BLOCK]
        if block != bytes(len(block)):
            os.pwrite(fd, block, _HEADER_SIZE + start)
    copy_sparse(lowest.fd, lowest._data, fd, data, lowest.size)
    step = 1 << _BLOCK_SHIFT
    for part in parts[1:]:
        for start in range(0, part.size, step):
            for there, at, length in part._runs(start, min(step, part.size - start)):
                if there:
                    copy_sparse(part.fd, part._data + at, fd, data + at, length, over=True)


def _union(parts: list[Overlay]) -> memoryview:
    number = 0
    for part in parts:
        number |= int.from_bytes(part._bits, "little")
    return memoryview(number.to_bytes(len(parts[0]._bits), "little"))


def _sync_folder(path: str) -> None:
    """The new name is on the disk on return."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
