"""A memory file packed by zstd, any block of which can be read alone.

`memory.zst` stands in place of `memory`. It is in the "Zstandard Seekable Format" (version 0.1.0, of the zstd project,
contrib/seekable_format/zstd_seekable_compression_format.md): a frame for each BLOCK bytes of RAM, and at the end a
skippable frame with their sizes. So `zstd -d memory.zst` gives back the memory file, without its holes.

    frame ... frame | 0x184D2A5E | size | (compressed, decompressed) for each frame | number of frames | 0 | 0x8F92EAB1

The table is not trusted: all sizes must add up, each frame but the last hold BLOCK bytes, and say so; no more than that
is ever unpacked. memory.sums is of the plain content, as of any snapshot. To map it, a packed file is unpacked once,
into `memory.plain` beside it. Driven by tests/unit/test_pack.py.
"""

from __future__ import annotations

__all__ = ["PACKED", "PLAIN", "Packed", "pack", "pack_file", "plain_memory", "unpack"]

import os
from struct import Struct
from struct import error as StructError

from hv.errors import ConfigError, HvError, SnapshotError
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.format import DISKS, MEMORY, Snapshot, checksum, write_state
from hv.snapshot.memory import BLOCK as SUM_BLOCK
from hv.snapshot.memory import check_memory, data_runs, memory_stamp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PACKED, PLAIN = "memory.zst", "memory.plain"
BLOCK = 256 << 10               # of RAM in a frame: unpacked in 0.1 ms, packed nearly as small as all in one
LEVEL = 3
_SKIPPABLE, _SEEKABLE = 0x184D2A5E, 0x8F92EAB1
_HEADER, _ENTRY, _FOOTER = Struct("<II"), Struct("<II"), Struct("<IBI")
_BLOCK_MOST = 8 << 20
_FRAMES_MOST = 1 << 24
_HINT = "the file is damaged or hostile: take the snapshot again"


class Packed:
    """The packed file `fd`, of `size` bytes of RAM. SnapshotError where its table is not as it must be."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size
        frames = _table(fd)
        self.block = frames[0][1]
        if not PAGE_SIZE <= self.block <= _BLOCK_MOST or self.block % PAGE_SIZE:
            raise SnapshotError(PACKED, f"has blocks of {self.block} bytes", _HINT)
        if len(frames) != -(-size // self.block):
            raise SnapshotError(PACKED, f"has {len(frames)} blocks of {self.block} bytes, guest RAM is {size}", _HINT)
        self._starts = [0]
        for number, (packed, plain) in enumerate(frames):
            if plain != self.length(number) or not packed:
                raise SnapshotError(PACKED, f"block {number}: {packed} bytes for {plain}", _HINT)
            self._starts.append(self._starts[-1] + packed)
        if self._starts[-1] != os.fstat(fd).st_size - _table_size(len(frames)):
            raise SnapshotError(PACKED, "the sizes of its blocks do not add up to its own", _HINT)
        self._reader: Any = None

    def length(self, number: int) -> int:
        """Bytes of RAM in block `number`."""
        return min(self.block, self.size - number * self.block)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, number: int) -> bytes:
        """The content of block `number`. SnapshotError where it is damaged."""
        zstandard = _library()
        if self._reader is None:
            self._reader = zstandard.ZstdDecompressor(max_window_size=_BLOCK_MOST)
        start, length = self._starts[number], self.length(number)
        data = os.pread(self._fd, self._starts[number + 1] - start, start)
        try:
            if zstandard.get_frame_parameters(data).content_size != length:     # before any memory is taken for it
                raise SnapshotError(PACKED, f"block {number} does not say that it holds {length} bytes", _HINT)
            content: bytes = self._reader.decompress(data)
        except zstandard.ZstdError as error:
            raise SnapshotError(PACKED, f"block {number}: {error}", _HINT) from None
        if len(content) != length:
            raise SnapshotError(PACKED, f"block {number} holds {len(content)} bytes, not {length}", _HINT)
        return content


def _library() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise HvError(f"packed memory: no zstd ({error})", "pip install pyhv again") from None
    return zstandard


def _table_size(frames: int) -> int:
    return _HEADER.size + frames * _ENTRY.size + _FOOTER.size


def _table(fd: int) -> list[tuple[int, int]]:
    """(compressed, decompressed) of each frame."""
    size = os.fstat(fd).st_size
    try:
        count, descriptor, magic = _FOOTER.unpack(os.pread(fd, _FOOTER.size, max(0, size - _FOOTER.size)))
        length = _table_size(count)
        if magic != _SEEKABLE or descriptor or not 0 < count <= _FRAMES_MOST or length > size:
            raise ValueError
        data = os.pread(fd, length, size - length)
        if _HEADER.unpack_from(data) != (_SKIPPABLE, length - _HEADER.size):
            raise ValueError
        return list(_ENTRY.iter_unpack(data[_HEADER.size:-_FOOTER.size]))
    except (ValueError, OSError, StructError):
        raise SnapshotError(PACKED, "does not end in a table of its blocks", _HINT) from None


def pack_file(source: int, target: int, level: int = LEVEL) -> int:
    """The memory file `source` packed into the empty file `target`; its bytes."""
    zstandard = _library()
    size = os.fstat(source).st_size
    writer = zstandard.ZstdCompressor(level=level, write_checksum=True)
    blocks: set[int] = set()
    for first, end in data_runs(source, 0, size):
        blocks.update(range(first // BLOCK, -(-end // BLOCK)))
    zeros: dict[int, bytes] = {}
    table = []
    with open(target, "wb", closefd=False) as out:
        for number in range(-(-size // BLOCK)):
            length = min(BLOCK, size - number * BLOCK)
            if number in blocks:
                content = os.pread(source, length, number * BLOCK)
                if len(content) != length:
                    raise SnapshotError(MEMORY, "has become shorter while it was read", "the file was cut, or swapped")
                packed = writer.compress(content)
            else:
                packed = zeros.get(length) or zeros.setdefault(length, writer.compress(bytes(length)))
            out.write(packed)
            table.append(_ENTRY.pack(len(packed), length))
        out.write(_HEADER.pack(_SKIPPABLE, _table_size(len(table)) - _HEADER.size) + b"".join(table)
                  + _FOOTER.pack(len(table), 0, _SEEKABLE))
    return os.fstat(target).st_size


def unpack_file(packed: Packed, target: int) -> None:
    """The plain memory file, with holes for pages of zeros, into the empty file `target`."""
    os.ftruncate(target, packed.size)
    zeros = bytes(PAGE_SIZE)
    for number in range(len(packed)):
        content = memoryview(packed.read(number))
        at = 0
        while at < len(content):
            stop = at
            while stop < len(content) and content[stop:stop + PAGE_SIZE] != zeros:
                stop += PAGE_SIZE
            start = number * packed.block + at
            while at < stop:
                done = os.pwrite(target, content[at:stop], start)
                at, start = at + done, start + done
            at += PAGE_SIZE


def is_packed(snapshot: Snapshot) -> bool:
    """Whether its memory is packed."""
    return bool(snapshot.part("memory").get("packed"))


def open_packed(snapshot: Snapshot, size: int) -> tuple[int, Packed]:
    """A descriptor of its packed memory, which is the one that was written, and what reads it."""
    try:
        fd = os.open(f"{snapshot.folder}/{PACKED}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(PACKED, f"{snapshot.folder}/{PACKED}: {os.strerror(error.errno or 0)}",
                            "the snapshot is incomplete") from None
    try:
        return fd, Packed(fd, size)
    except BaseException:
        os.close(fd)
        raise


def open_checked_packed(snapshot: Snapshot, size: int, verify: bool) -> int:
    """A descriptor of it, held to what was noted when it was written, and to the checksums where that differs."""
    fd, packed = open_packed(snapshot, size)
    try:
        noted = dict(snapshot.part("memory"))
        sums = noted.pop("sums", None)
        if verify or memory_stamp(fd) | {"packed": True} != noted:
            check_memory(snapshot.folder, str(sums), _sums(packed))
    except BaseException:
        os.close(fd)
        raise
    return fd


def check(snapshot: Snapshot) -> None:
    """Compare its own memory to the checksums, packed or not. SnapshotError says where it differs."""
    if is_packed(snapshot):
        size = snapshot.number("config", "memory", low=PAGE_SIZE, high=1 << 52)
        os.close(open_checked_packed(snapshot, size, True))
    else:
        check_memory(snapshot.folder, snapshot.part("memory", "sums", kind=str))


def _sums(packed: Packed) -> Iterator[tuple[int, str]]:
    """The number and checksum of each block of memory.sums."""
    content = b""
    for number in range(len(packed)):
        content += packed.read(number)
        while len(content) >= SUM_BLOCK or (content and number == len(packed) - 1):
            piece, content = content[:SUM_BLOCK], content[SUM_BLOCK:]
            start = number * packed.block + packed.length(number) - len(content) - len(piece)
            yield start // SUM_BLOCK, "-" if piece.count(0) == len(piece) else checksum(piece)


def plain_memory(snapshot: Snapshot) -> str:
    """The path of its plain memory file; one that is packed is unpacked now, unless it was before."""
    if not is_packed(snapshot):
        return snapshot.memory_path
    path, note = f"{snapshot.folder}/{PLAIN}", f"{snapshot.folder}/{PLAIN}.of"
    fd, packed = open_packed(snapshot, snapshot.number("config", "memory", low=PAGE_SIZE, high=1 << 52))
    fresh = f"{path}.{os.getpid()}"
    try:
        wanted = repr(memory_stamp(fd))
        try:
            with open(note) as file, open(path, "rb", 0) as plain:
                if file.read() == f"{wanted} {memory_stamp(plain.fileno())}":
                    return path
        except OSError:
            pass
        with open(fresh, "wb", 0) as out:
            unpack_file(packed, out.fileno())
            os.fchmod(out.fileno(), 0o400)
            text = f"{wanted} {memory_stamp(out.fileno())}"
        os.rename(fresh, path)
        with open(f"{note}.{os.getpid()}", "w") as file:
            file.write(text)
        os.rename(f"{note}.{os.getpid()}", note)
    except BaseException as error:
        try:
            os.unlink(fresh)
        except OSError:
            pass
        if isinstance(error, OSError):
            raise SnapshotError(PACKED, f"unpacking it to {path}: {os.strerror(error.errno or 0)}",
                                "make room, or restore with --memory-backend uffd, which needs none") from None
        raise
    finally:
        os.close(fd)
    return path


def pack(snapshot: Snapshot) -> tuple[int, int]:
    """Pack the memory of `snapshot` in place; bytes on disk before and after. ConfigError where it is packed."""
    if is_packed(snapshot):
        raise ConfigError(f"{snapshot.folder} is packed already")
    before = os.stat(snapshot.memory_path).st_blocks * 512

    def write(folder: str) -> dict[str, Any]:
        return write_packed(snapshot.memory_path, folder)

    _replace(snapshot, write)
    return before, os.stat(f"{snapshot.folder}/{PACKED}").st_blocks * 512


def unpack(snapshot: Snapshot) -> None:
    """The way back."""
    if not is_packed(snapshot):
        raise ConfigError(f"{snapshot.folder} is not packed")

    def write(folder: str) -> dict[str, Any]:
        fd, packed = open_packed(snapshot, snapshot.number("config", "memory", low=PAGE_SIZE, high=1 << 52))
        try:
            with open(f"{folder}/{MEMORY}", "xb", 0) as out:
                unpack_file(packed, out.fileno())
                os.fsync(out.fileno())
                os.fchmod(out.fileno(), 0o400)
                return memory_stamp(out.fileno())
        finally:
            os.close(fd)

    _replace(snapshot, write)


def write_packed(memory: str, folder: str) -> dict[str, Any]:
    """Pack the file at `memory` into `folder`; what the state notes of it."""
    with open(memory, "rb", 0) as source, open(f"{folder}/{PACKED}", "xb", 0) as out:
        pack_file(source.fileno(), out.fileno())
        os.fsync(out.fileno())
        os.fchmod(out.fileno(), 0o400)
        return memory_stamp(out.fileno()) | {"packed": True}


def _replace(snapshot: Snapshot, write: Any) -> None:
    """The folder anew with another memory file: it is the old one or the new one, whatever happens."""
    from hv.linux.files import RENAME_EXCHANGE, rename
    from hv.snapshot.save import discard, fresh_folder, sync_folder
    from hv.snapshot.working_set import WORKING_SET

    folder = snapshot.folder
    fresh = fresh_folder(folder)
    try:
        sums = snapshot.part("memory", "sums", kind=str)
        state = dict(snapshot.state)
        state["memory"] = write(fresh) | {"sums": sums}
        for name in ("memory.sums", WORKING_SET):
            if os.path.exists(f"{folder}/{name}"):
                os.link(f"{folder}/{name}", f"{fresh}/{name}")
        if os.path.isdir(f"{folder}/{DISKS}"):
            os.mkdir(f"{fresh}/{DISKS}", 0o700)
            for name in os.listdir(f"{folder}/{DISKS}"):
                os.link(f"{folder}/{DISKS}/{name}", f"{fresh}/{DISKS}/{name}")
        write_state(fresh, state)
        sync_folder(fresh)
        rename(-100, os.fsencode(fresh), -100, os.fsencode(folder), RENAME_EXCHANGE)       # AT_FDCWD
        sync_folder(os.path.dirname(folder))
    except OSError as error:
        raise HvError(f"{folder}: {os.strerror(error.errno or 0)}", "it is as it was: make room, or copy it to a file "
                      "system that can exchange two folders (renameat2)") from None
    finally:
        discard(fresh)          # what was there before, or what did not come to be
    snapshot.state = state
