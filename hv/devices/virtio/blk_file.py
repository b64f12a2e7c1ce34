"""A disk's bytes in a file or a block device of the host, as they are: "raw".

    DiskFile        through the page cache
    DirectFile      past it (O_DIRECT); what is not aligned goes by a buffer that is

Data moves between the file and guest RAM by preadv(2) and pwritev(2), without a copy of ours. `flush` is fdatasync(2).
Every open disk is locked by flock(2): readers share it, a writer has it alone. The lock is advisory and goes with the
descriptor, so a killed process leaves none behind.

Left out on purpose: several requests at once (io_uring, threads). One disk's requests are served one after the other
by its own thread; where more is wanted, a vhost-user back end does it. Driven by tests/unit/test_virtio_blk_file.py.
"""

from __future__ import annotations

__all__ = ["SECTOR", "DirectFile", "DiskFile", "lock", "open_disk"]

import errno
import fcntl
import mmap
import os
import stat

from hv.devices.virtio.chain import Reader, Writer
from hv.errors import ConfigError
from hv.linux.files import fallocate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Views = list[memoryview]

SECTOR = 512                    # 5.2.4: capacity and positions count these, whatever the block size
_BLKSSZGET = 0x1268             # include/uapi/linux/fs.h: the block size that a block device is addressed by
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10      # include/uapi/linux/falloc.h
_ALIGNMENTS = (512, 4096)       # of direct I/O, on all file systems and devices in use
_BOUNCE = 1 << 20               # bytes of the aligned buffer
_ZEROS = 256 << 10              # bytes written at once where the file system can't make zeros by itself
_NOT_TO_BE_HAD = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FOREIGN = ((b"QFI\xfb", "a qcow2 image", "convert it: qemu-img convert -O raw IMAGE DISK"),
            (b"KDMV", "a VMDK image", "convert it: qemu-img convert -O raw IMAGE DISK"),
            (b"PYHVCOW\n", "an overlay", "name its base, and the overlay as an option: --disk BASE,overlay=FILE"))


class DiskFile:
    """`fd` as a disk of `size` bytes, a whole number of blocks of `block_size`; owns the descriptor."""

    def __init__(self, fd: int, size: int, *, readonly: bool, block_size: int = SECTOR) -> None:
        self.fd = fd
        self.size = size
        self.readonly = readonly
        self.block_size = block_size
        self._lost = 0          # errno of a flush that failed: what was written before may be gone
        self._can_punch = self._can_zero = True

    def read(self, views: Views, offset: int, length: int) -> None:
        """Fill `views`, `length` bytes together. OSError."""
        done = os.preadv(self.fd, views, offset)
        while done < length:
            more = os.preadv(self.fd, _behind(views, done), offset + done)
            if not more:
                raise OSError(errno.EIO, "the file has become shorter")
            done += more

    def write(self, views: Views, offset: int, length: int, stable: bool = False) -> None:
        """Write `views`, `length` bytes together; `stable`: they are on the disk on return. OSError."""
        flags = os.RWF_DSYNC if stable else 0
        done = os.pwritev(self.fd, views, offset, flags)
        while done < length:
            more = os.pwritev(self.fd, _behind(views, done), offset + done, flags)
            if not more:
                raise OSError(errno.EIO, "nothing was written")
            done += more

    def flush(self) -> None:
        """All that was written is on the disk on return. OSError, and from then on always.

        After a failed fdatasync(2) the kernel takes the pages for clean, and the next one succeeds though their
        content is lost (man 2 fsync, ERRORS). A guest must not be told that its data is safe then.
        """
        if self.readonly:
            return
        if self._lost:
            raise OSError(self._lost, os.strerror(self._lost))
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._lost = error.errno or errno.EIO
            raise

    def discard(self, offset: int, length: int) -> None:
        """The guest does not need the range any more: give its blocks back, if the host can. OSError."""
        if self._can_punch:
            self._can_punch = self._try(_PUNCH_HOLE, offset, length)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range zeros; with `unmap` its blocks may go. OSError."""
        if unmap and self._can_punch:
            self._can_punch = self._try(_PUNCH_HOLE, offset, length)
            if self._can_punch:
                return
        if self._can_zero:
            self._can_zero = self._try(_ZERO_RANGE, offset, length)
            if self._can_zero:
                return
        block = memoryview(bytes(min(_ZEROS, length)))
        for at in range(offset, offset + length, _ZEROS):
            piece = block[:min(_ZEROS, offset + length - at)]
            self.write([piece], at, len(piece))

    def _try(self, mode: int, offset: int, length: int) -> bool:
        """Whether the file system, or the device, can do that at all."""
        try:
            fallocate(self.fd, mode | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _NOT_TO_BE_HAD:
                raise
            return False
        return True

    def close(self) -> None:
        """Close the descriptor, and with it give up the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DirectFile(DiskFile):
    """A DiskFile whose descriptor is O_DIRECT: addresses, lengths and positions must be aligned to `alignment`.

    Guest buffers mostly are. The kernel says so itself (EINVAL, man 2 open, NOTES), so nothing is computed before.
    """

    def __init__(self, fd: int, size: int, *, readonly: bool, block_size: int = SECTOR,
                 alignment: int = SECTOR) -> None:
        super().__init__(fd, size - size % alignment, readonly=readonly, block_size=block_size)
        self._alignment = alignment
        self._map = mmap.mmap(-1, _BOUNCE)
        self._bounce = memoryview(self._map)

    def read(self, views: Views, offset: int, length: int) -> None:
        """As DiskFile's."""
        try:
            super().read(views, offset, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            writer = Writer(views)
            for at, start, end, size in self._pieces(offset, length):
                super().read([self._bounce[:end - start]], start, end - start)
                writer.write(self._bounce[at - start:at - start + size])

    def write(self, views: Views, offset: int, length: int, stable: bool = False) -> None:
        """As DiskFile's. Blocks that are written in part are read first."""
        try:
            super().write(views, offset, length, stable)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            reader = Reader(views)
            for at, start, end, size in self._pieces(offset, length):
                if size != end - start:
                    super().read([self._bounce[:end - start]], start, end - start)
                self._bounce[at - start:at - start + size] = reader.read(size)
                super().write([self._bounce[:end - start]], start, end - start, stable)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(position, aligned start and end around it, bytes of the request) for each filling of the buffer."""
        align, at, stop = self._alignment, offset, offset + length
        while at < stop:
            start = at - at % align
            size = min(start + _BOUNCE, stop) - at
            yield at, start, at + size + -(at + size) % align, size
            at += size

    def close(self) -> None:
        """As DiskFile's."""
        super().close()
        self._bounce.release()
        self._map.close()


def _behind(views: Views, done: int) -> Views:
    """What is left of `views` once `done` bytes have been moved."""
    reader = Reader(views)
    reader.take(done)
    return reader.take(reader.left)


def open_disk(path: str, *, readonly: bool, direct: bool) -> DiskFile:
    """The disk in the file or block device `path`, locked. ConfigError where it can't be one."""
    kind = "read" if readonly else "write"
    try:
        mode = os.stat(path).st_mode    # before open: that would wait for the other end of a FIFO
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"disk {path}: neither a file nor a block device", "name a raw disk image")
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC
        fd = os.open(path, flags)
    except OSError as error:
        hint = {errno.ENOENT: f"make one: truncate -s 1G {path}",
                errno.EACCES: "add readonly, or change its permissions", errno.EROFS: "add readonly"}
        raise ConfigError(f"disk {path}: can't open it to {kind}: {error.strerror}",
                          hint.get(error.errno or 0, "name a raw disk image")) from None
    try:
        lock(fd, path, shared=readonly)
        return _as_disk(fd, path, readonly, direct, stat.S_ISBLK(mode))
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise ConfigError(f"disk {path}: {error.strerror}") from None
        raise


def lock(fd: int, path: str, *, shared: bool) -> None:
    """Lock the file for reading or for writing. ConfigError where another has it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        who = "somebody writes to it" if shared else "another machine uses it"
        raise ConfigError(f"disk {path}: {who}", "end the other machine; to share a disk, let all use it with readonly "
                          "or overlay=temp|FILE") from None
    except OSError:
        pass    # a file system without locks: its user must see to it


def _as_disk(fd: int, path: str, readonly: bool, direct: bool, device: bool) -> DiskFile:
    head = os.pread(fd, 16, 0)
    for magic, name, hint in _FOREIGN:
        if head.startswith(magic):
            raise ConfigError(f"disk {path}: {name}, not a raw disk image", hint)
    size, block = os.lseek(fd, 0, os.SEEK_END), SECTOR
    if device:
        block = int.from_bytes(fcntl.ioctl(fd, _BLKSSZGET, bytes(4)), "little")
    size -= size % block
    if not size:
        raise ConfigError(f"disk {path}: smaller than a sector of {block} bytes",
                          f"make it larger: truncate -s 1G {path}")
    if not direct:
        return DiskFile(fd, size, readonly=readonly, block_size=block)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        alignment = _alignment(fd)
    except OSError:
        raise ConfigError(f"disk {path}: its file system has no direct I/O", "leave out direct") from None
    return DirectFile(fd, size, readonly=readonly, block_size=block, alignment=alignment)


def _alignment(fd: int) -> int:
    """What the descriptor's direct I/O must be aligned to. OSError where nothing helps."""
    with mmap.mmap(-1, _ALIGNMENTS[-1]) as buffer, memoryview(buffer) as view:
        for alignment in _ALIGNMENTS:
            with view[:alignment] as part:
                try:
                    os.preadv(fd, [part], alignment)    # not at 0: on 4096, 512 must fail
                    return alignment
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
