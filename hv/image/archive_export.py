"""`export`: an image's root file system, its layers laid over each other, as one tar archive.

Nothing is unpacked, so this needs no rights. The layers are read twice: first their names, from the uppermost down, to
know which entry of which layer remains; then their data, from the lowest up. A hard link whose file an upper layer
replaced or removed gets that file's data.

Source: opencontainers/image-spec v1.1 layer.md, "Whiteouts" and "Applying Changesets". Driven by
tests/unit/test_image_export.py.
"""

from __future__ import annotations

__all__ = ["export"]

import os

from hv.errors import ImageError
from hv.image.archive_write import Output
from hv.image.files import said
from hv.image.image import Image
from hv.image.inflate import Limits, inflate
from hv.image.media import Descriptor
from hv.image.store import Store
from hv.image.tarstream import Entry, TarStream
from hv.image.tarwrite import END, header, padding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_WHITEOUT, _OPAQUE, _AUFS = b".wh.", b".wh..wh..opq", b".wh..wh."       # layer.md
_FILE, _HARD, _FOLDER = b"0", b"1", b"5"
_MOST = 4_000_000               # entries of all layers: their names are in memory
_HOPS = 10
_ZEROS = bytes(1 << 16)


def export(store: Store, image: Image, output: Output) -> None:
    """Write the image's files to `output`. Hold the lock shared."""
    above = _Above()
    plans: list[_Plan] = []
    for layer, _ in reversed(image.layers):
        plan = _Plan()
        for number, entry, _stream in _entries(store, layer):
            above.note(plan, number, entry)
        above.close(plan)
        plans.append(plan)
    for (layer, _), plan in zip(image.layers, reversed(plans), strict=True):
        for number, entry, stream in _entries(store, layer):
            if number in plan.emitted:
                _emit(output, entry, stream, plan.emitted[number], plan.link.get(number))
    output.write(END)


class _Plan:
    """What remains of a layer: entry number to its name in the export, and hard links to where they lead."""

    def __init__(self) -> None:
        self.here: dict[bytes, tuple[int, bytes]] = {}      # path: entry number, kind
        self.files: dict[bytes, int] = {}                   # every file's last entry, hidden ones too
        self.hard: dict[bytes, bytes] = {}
        self.removed: set[bytes] = set()
        self.opaque: set[bytes] = set()
        self.emitted: dict[int, bytes] = {}
        self.link: dict[int, bytes] = {}


class _Above:
    """What the layers above the current one hide."""

    def __init__(self) -> None:
        self.there: set[bytes] = set()
        self.within: set[bytes] = set()         # folders that paths imply
        self.plain: set[bytes] = set()          # what is no folder, in any layer above: it ends the folder below
        self.removed: set[bytes] = set()
        self.opaque: set[bytes] = set()
        self.count = 0

    def note(self, plan: _Plan, number: int, entry: Entry) -> None:
        """Take down an entry of the current layer."""
        self.count += 1
        if self.count > _MOST:
            raise ImageError(f"image: has more than {_MOST} files")
        path = _normal(entry.name)
        parent, slash, name = path.rpartition(b"/")
        if name == _OPAQUE:
            plan.opaque.add(parent)
        elif name.startswith(_AUFS):
            pass
        elif name.startswith(_WHITEOUT):
            plan.removed.add(parent + slash + name[len(_WHITEOUT):])
        else:
            plan.files.pop(path, None)
            plan.hard.pop(path, None)
            if entry.kind == _HARD:
                plan.hard[path] = _normal(entry.link)
            elif entry.kind == _FILE:
                plan.files[path] = number
            plan.here[path] = (number, entry.kind)

    def close(self, plan: _Plan) -> None:
        """Every entry of the current layer is noted: decide which remain, and what they hide below."""
        names: dict[bytes, bytes] = {}          # a hidden file that links lead to: the name its data is given
        for path, (number, kind) in sorted(plan.here.items(), key=lambda item: item[1][0]):
            if self._hidden(path, kind):
                continue
            plan.emitted[number] = path
            if kind == _HARD:
                target = plan.hard[path]
                for _ in range(_HOPS):              # a link to a link
                    target = plan.hard.get(target, target)
                if target in plan.files and self._hidden(target, _FILE):
                    if target not in names:
                        names[target] = path
                        plan.emitted[plan.files[target]] = path
                        del plan.emitted[number]
                        continue
                    target = names[target]
                plan.link[number] = target
        for path, (_, kind) in plan.here.items():
            self.there.add(path)
            if kind != _FOLDER:
                self.plain.add(path)
            while (path := path.rpartition(b"/")[0]) and path not in self.within:
                self.within.add(path)
        self.removed |= plan.removed
        self.opaque |= plan.opaque
        plan.here, plan.files, plan.hard = {}, {}, {}

    def _hidden(self, path: bytes, kind: bytes) -> bool:
        if path in self.there or path in self.removed or (kind != _FOLDER and path in self.within):
            return True
        while path:
            path = path.rpartition(b"/")[0]
            if path in self.removed or path in self.opaque or path in self.plain:
                return True
        return False


def _entries(store: Store, layer: Descriptor) -> Iterator[tuple[int, Entry, TarStream]]:
    label = f"layer {layer.digest}"
    try:
        fd = os.open(store.blob_path(layer.digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise said(error, f"reading {label}") from None
    try:
        stream = TarStream(inflate(fd, label, Limits()), label)
        number = 0
        while (entry := stream.next()) is not None:
            yield number, entry, stream
            number += 1
    finally:
        os.close(fd)


def _normal(raw: bytes) -> bytes:
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ImageError(f"layer: the name {raw[:200]!r} leads outside the image")
    return b"/".join(parts)


def _emit(output: Output, entry: Entry, stream: TarStream, name: bytes, link: bytes | None) -> None:
    if not name:
        name = b"."
    kind = entry.kind if entry.kind != _HARD or link is not None else _FILE
    limit = Limits().most
    if entry.real > limit:
        raise ImageError(f"layer: {name[:200]!r} has {entry.real} bytes, more than {limit}")
    size = entry.real if kind == _FILE else 0
    output.write(header(name + b"/" if kind == _FOLDER else name, size, kind, entry.mode, entry.uid, entry.gid,
                        entry.mtime, entry.link if link is None else link, (entry.major, entry.minor), entry.xattrs))
    if kind != _FILE:
        return
    if entry.pieces is None:
        for piece in stream.data():
            output.write(piece)
    else:
        _expand(output, entry, stream)
    output.write(padding(size))


def _expand(output: Output, entry: Entry, stream: TarStream) -> None:
    """A sparse file with its holes as zeros."""
    data, have, at = stream.data(), memoryview(b""), 0
    for offset, length in entry.pieces or ():
        _zeros(output, offset - at)
        left = length
        while left:
            have = have or next(data)
            output.write(have[:left])
            left, have = left - len(have[:left]), have[left:]
        at = offset + length
    _zeros(output, entry.real - at)


def _zeros(output: Output, count: int) -> None:
    while count > 0:
        output.write(_ZEROS[:count])
        count -= len(_ZEROS)
