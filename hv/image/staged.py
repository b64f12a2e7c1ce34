"""The members of an archive, read once from front to back, until it is known which of them an image needs.

An archive names its parts at its end, and may come from a pipe. So each member is hashed and kept: small ones in
memory, others as files in the store's tmp/, where they become blobs once a manifest has asked for them; the rest is
removed. Nothing is ever written by a member's name. Links are followed by name, among the members only.

Refused: names and links that lead outside, a name with two contents, sparse files, more members, or longer names, than
an archive of images has. An archive that is compressed may become hv/image/inflate.py's ratio times its size.
Driven by tests/unit/test_image_archive_hostile.py.
"""

from __future__ import annotations

__all__ = ["Member", "Staged"]

import os

from hv.errors import ImageError
from hv.image.files import reading
from hv.image.inflate import Limits, inflate
from hv.image.media import CONFIG_LIMIT, MANIFEST_LIMIT, Descriptor
from hv.image.reference import is_digest
from hv.image.store import Store
from hv.image.tarstream import TarStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

_SMALL = 128 << 10              # members of up to this many bytes are kept in memory,
_IN_MEMORY = 32 << 20           # up to this many in all
_NAMES = 16 << 20               # bytes of all names and links
_HOPS = 10                      # links from a name to its content
_TABLES = ("manifest.json", "index.json", "oci-layout", "repositories")
_BLOBS = "blobs/sha256/"        # image-layout.md
_CHUNK = 1 << 20


class Member:
    """What one member holds: in `data`, or in the file `path`, or (both None) it is a blob of the store already."""

    __slots__ = ("data", "digest", "head", "path", "size")

    def __init__(self, digest: str, size: int, head: bytes, data: bytes | None = None, path: str | None = None) -> None:
        self.digest, self.size, self.head, self.data, self.path = digest, size, head, data, path


class Staged:
    """The members by name. A context manager: what was not `keep`t is removed. Hold the store's lock shared."""

    def __init__(self, store: Store, label: str) -> None:
        self.store, self.label = store, label
        self._members: dict[str, Member] = {}
        self._links: dict[str, str] = {}
        self._memory = self._names = 0

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: Any) -> None:
        for member in self._members.values():
            if member.path and os.path.lexists(member.path):
                os.unlink(member.path)

    # -- reading -----------------------------------------------------------------------------------------------

    def read_archive(self, fd: int, progress: Callable[[int], object] | None = None) -> None:
        """Everything that comes from `fd`: a tar archive, plain or compressed. `progress`: bytes read."""
        stream = TarStream(_bounded(fd, self.label, progress), self.label)
        while (entry := stream.next()) is not None:
            if entry.kind == b"5":
                continue
            name = self._name(entry.name)
            if entry.kind == b"0" and entry.pieces is None:
                self._add(name, entry.size, stream.data())
            elif entry.kind in (b"1", b"2"):
                self._link(name, entry.link, symbolic=entry.kind == b"2")
            else:
                raise self.bad(name, "is neither a file, a folder nor a link")
        stream.drain()

    def read_folder(self, folder: str) -> None:
        """An OCI image layout on the disk."""
        names = [name for name in _TABLES if os.path.lexists(f"{folder}/{name}")]
        try:
            names += [_BLOBS + name for name in sorted(os.listdir(f"{folder}/{_BLOBS}"))]
        except OSError as error:
            raise ImageError(f"{self.label}: {_BLOBS}: {error.strerror}", "it is no OCI image layout") from None
        for name in names:
            try:
                fd = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                with open(fd, "rb", buffering=0) as file:
                    pieces = iter(lambda file=file: file.read(_CHUNK), b"")     # type: ignore[misc]
                    self._add(self._name(name.encode()), os.fstat(fd).st_size, pieces)
            except OSError as error:
                raise ImageError(f"{self.label}: {name}: {error.strerror}") from None

    def _name(self, raw: bytes) -> str:
        self._names += len(raw)
        if self._names > _NAMES:
            raise ImageError(f"{self.label}: the names of its members take more than {_NAMES} bytes")
        return self._normal(str(raw, "utf-8", "replace"), str(raw[:200], "utf-8", "replace"))

    def _normal(self, path: str, what: str) -> str:
        parts: list[str] = []
        for part in path.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part == ".." or "\0" in part:
                raise self.bad(what, "leads outside the archive")
            elif part not in ("", "."):
                parts.append(part)
        if path.startswith("/") or not parts:
            raise self.bad(what, "leads outside the archive")
        return "/".join(parts)

    def _link(self, name: str, target: bytes, symbolic: bool) -> None:
        folder = name.rpartition("/")[0] if symbolic else ""
        self._names += len(target)
        path = str(target, "utf-8", "replace")
        if path.startswith("/"):
            raise self.bad(name, "is a link that leads outside the archive")
        wanted = self._normal(f"{folder}/{path}".lstrip("/"), f"{name}: its link")
        if name in self._members or self._links.get(name, wanted) != wanted:
            raise self.bad(name, "stands in it twice")
        self._links[name] = wanted

    def _add(self, name: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
        if name in _TABLES and size > MANIFEST_LIMIT:
            raise self.bad(name, f"{size} bytes are more than {MANIFEST_LIMIT}")
        wanted = "sha256:" + name.removeprefix(_BLOBS) if name.startswith(_BLOBS) else ""
        if is_digest(wanted) and self.store.has(wanted, size):
            member = Member(wanted, size, b"")
        elif size <= _SMALL and self._memory + size <= _IN_MEMORY:
            from hashlib import sha256

            data = b"".join(pieces)
            self._memory += size
            member = Member("sha256:" + sha256(data).hexdigest(), len(data), data[:6], data)
        else:
            head = bytearray()
            path, digest, size = self.store.write(_heads(pieces, head))
            member = Member(digest, size, bytes(head), path=path)
        before = self._members.setdefault(name, member)
        if before is not member or name in self._links:
            if member.path:
                os.unlink(member.path)
            if before.digest != member.digest or name in self._links:
                raise self.bad(name, "stands in it twice")

    # -- using -------------------------------------------------------------------------------------------------

    def bad(self, name: str, why: str) -> ImageError:
        """An error about one member."""
        return ImageError(f"{self.label}: {name[:300]}: {why}")

    def has(self, name: str) -> bool:
        """Whether there is such a member."""
        return name in self._members

    def find(self, name: str, wanted_by: str) -> Member:
        """The member called so, its links followed."""
        path = self._normal(name, f"{wanted_by}: {name[:200]}")
        for _ in range(_HOPS):
            if path in self._members:
                return self._members[path]
            if path not in self._links:
                raise self.bad(wanted_by, f"{name[:200]} is not in the archive")
            path = self._links[path]
        raise self.bad(wanted_by, f"{name[:200]} is a link that leads nowhere")

    def table(self, name: str) -> bytes:
        """manifest.json, index.json."""
        return self.content(self.find(name, name), name, MANIFEST_LIMIT)

    def content(self, member: Member, name: str, limit: int = CONFIG_LIMIT) -> bytes:
        """A small member whole."""
        if member.size > limit:
            raise self.bad(name, f"{member.size} bytes are more than {limit}")
        if member.data is not None:
            return member.data
        if member.path is None:
            return self.store.read(member.digest, limit)
        return reading(member.path, limit) or b""

    def keep(self, member: Member, media_type: str) -> Descriptor:
        """Make the member a blob."""
        if member.data is not None:
            self.store.put_bytes(member.data)
            member.data = None
        elif member.path is not None:
            self.store.place(member.path, member.digest, member.size)
            member.path = None
        return Descriptor(media_type, member.digest, member.size)


class _Flowing(Limits):
    """For a pipe, whose size is not known before its end: `_bounded` counts."""

    def bytes_of(self, packed: int) -> int:
        return 1 << 62


def _bounded(fd: int, label: str, progress: Callable[[int], object] | None) -> Iterator[bytes]:
    """The plain bytes of `fd`; never more of them than a layer of the size read so far might become."""
    read = total = 0

    def done(so_far: int) -> None:
        nonlocal read
        read = so_far
        if progress:
            progress(so_far)

    limits = Limits()
    for piece in inflate(fd, label, _Flowing(), done):
        total += len(piece)
        if total > read and total > limits.bytes_of(read):
            raise ImageError(f"{label}: {read} bytes of it became more than {limits.bytes_of(read)}",
                             "if you trust it, decompress it first")
        yield piece


def _heads(pieces: Iterable[bytes | memoryview], head: bytearray) -> Iterator[bytes | memoryview]:
    """The pieces; their first bytes are put in `head`."""
    for piece in pieces:
        if len(head) < 6:
            head += piece[:6 - len(head)]
        yield piece

