"""The image store: an OCI image layout that skopeo and podman read as it stands, and what pyhv keeps beside it.

    oci-layout, index.json, blobs/sha256/HEX   opencontainers/image-spec v1.1, image-layout.md; in index.json an image
                                               has its full name as org.opencontainers.image.ref.name, or none
    partial/HEX                                interrupted downloads, kept to be resumed
    tmp/                                       files being written; whoever holds the lock alone removes all of them
    users/HEX/NAME                             the image with the ID HEX is used by instance NAME; holds the digest of
                                               its manifest (`use`, `unuse`)
    layers/sha256/HEX                          unpacked layers (hv/image/layers.py)
    lock, index.lock                           flock(2)ed

Locks. Whoever adds blobs, or needs blobs and layers to stay, holds `lock` shared: many do at once. Whoever removes
blobs or layers holds it alone, and so meets no half-done pull. `index.lock` is held for the moment in which index.json
is replaced; nobody waits for `lock` meanwhile. A killed process loses its locks and leaves at most files in tmp/ and
blobs that nothing names; both are removed by the next `prune` or `rm`.

A blob is in place only once it is whole, verified and on the disk. `resolve` is on the way of `pyhv run`: it takes no
lock, and nothing that is slow to load is imported. Driven by tests/unit/test_image_store.py.
"""

from __future__ import annotations

__all__ = ["LAYOUT", "REF_NAME", "Store"]

import os

from hv.errors import ImageError, ImageMissing
from hv.image.files import Lock, make_folders, reading, replace, said, sync_folder
from hv.image.image import Image
from hv.image.media import INDEX, MANIFEST_LIMIT, Descriptor, ImageConfig, Index, Manifest, choose, parse_manifest
from hv.image.reference import Reference, is_digest, is_hex
from hv.places import data_root
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    class Readable(Protocol):
        """What `put` reads from."""

        def read(self, size: int, /) -> bytes:
            """At most `size` bytes; none at the end."""

REF_NAME = "org.opencontainers.image.ref.name"      # image-spec annotations.md

LAYOUT = '{"imageLayoutVersion": "1.0.0"}'         # image-layout.md
_INDEX_LIMIT = 64 << 20
_CHUNK = 1 << 20
_ANEW = "`pyhv image fsck --repair` makes it anew"


class Store:
    """Images by name and digest. Nothing is held open between calls; many processes use one folder at once."""

    def __init__(self, root: str = "") -> None:
        self.root = os.path.abspath(root) if root else data_root() + "/images"

    # -- locks -------------------------------------------------------------------------------------------------

    def lock(self, shared: bool, wait: float | None = None) -> Lock:
        """A context manager: shared to add or to use, alone to remove. After `wait` seconds: StateError."""
        return Lock(self._folder("lock"), shared, wait)

    def _folder(self, name: str) -> str:
        """`name` in the store, whose folders are made where they are missing."""
        make_folders(self.root, {"oci-layout": LAYOUT})
        return f"{self.root}/{name}"

    # -- blobs -------------------------------------------------------------------------------------------------

    def blob_path(self, digest: str) -> str:
        """Where the blob is, or would be."""
        return f"{self.root}/blobs/sha256/{_hex(digest)}"

    def has(self, digest: str, size: int = -1) -> bool:
        """Whether the blob is there (and of that size)."""
        try:
            status = os.lstat(self.blob_path(digest))
        except OSError:
            return False
        return size < 0 or status.st_size == size

    def put(self, stream: Readable, digest: str = "", size: int = -1, media_type: str = "") -> Descriptor:
        """Write what `stream` gives as a blob. ImageError where it is not as `digest` and `size` say, or the disk is
        full; then nothing is kept. Hold the lock shared until something names the blob.
        """
        with self.lock(shared=True):
            path, found, total = self.write(iter(lambda: stream.read(_CHUNK), b""), digest, size)
            self.place(path, found, total)
        return Descriptor(media_type, found, total)

    def write(self, pieces: Iterable[bytes | memoryview], digest: str = "", size: int = -1) -> tuple[str, str, int]:
        """`put` without making it a blob yet: a path in tmp/, the digest, the size. With the lock held shared."""
        from hashlib import sha256

        hasher, total, path = sha256(), 0, self._temporary()
        try:
            with open(path, "xb", buffering=0) as file:
                for piece in pieces:
                    total += len(piece)
                    if 0 <= size < total:
                        raise ImageError(f"blob {digest or 'of an image'}: has more than the {size} bytes it should "
                                         "have")
                    hasher.update(piece)
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view):]
            found = "sha256:" + hasher.hexdigest()
            _verify(digest or found, size, found, total)
        except BaseException as error:
            if os.path.lexists(path):
                os.unlink(path)
            if isinstance(error, OSError):
                raise said(error, f"writing blob {digest}".strip()) from None
            raise
        return path, found, total

    def place(self, path: str, digest: str, size: int) -> None:
        """Make the whole and verified file `path` the blob `digest`, on the disk; with the lock held shared."""
        try:
            if self.has(digest, size):
                os.unlink(path)
                return
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
            os.rename(path, self.blob_path(digest))
            sync_folder(f"{self.root}/blobs/sha256")
        except OSError as error:
            if os.path.lexists(path):
                os.unlink(path)
            raise said(error, f"keeping blob {digest}") from None

    def _temporary(self) -> str:
        return f"{self._folder('tmp')}/{os.urandom(12).hex()}"

    def put_bytes(self, data: bytes, media_type: str = "") -> Descriptor:
        """`put` for what is in memory: a manifest, a configuration."""
        from io import BytesIO

        return self.put(BytesIO(data), size=len(data), media_type=media_type)

    def partial(self, digest: str) -> str:
        """Where a download is collected: it outlives the process, so that the next one resumes it. Downloaders
        flock(2) the file; when it is whole, `adopt` it."""
        return f"{self._folder('partial')}/{_hex(digest)}"

    def adopt(self, descriptor: Descriptor, verified: bool = False) -> Descriptor:
        """Make the partial download of `descriptor` its blob; verified here unless the caller has done so while
        writing. What does not verify is removed: it can't become right by more bytes."""
        path, digest = self.partial(descriptor.digest), descriptor.digest
        with self.lock(shared=True):
            try:
                with open(path, "rb") as file:
                    size, found = os.fstat(file.fileno()).st_size, digest
                    if not verified:
                        from hashlib import file_digest

                        found = "sha256:" + file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise said(error, f"verifying blob {digest}") from None
            try:
                _verify(digest, descriptor.size, found, size)
            except ImageError:
                os.unlink(path)
                raise
            self.place(path, digest, size)
        return descriptor

    def read(self, digest: str, limit: int = MANIFEST_LIMIT) -> bytes:
        """A small blob whole: a manifest, a configuration."""
        data = reading(self.blob_path(digest), limit)
        if data is None:
            raise ImageError(f"image store: blob {digest} is missing", "`pyhv image fsck` says which images need it")
        return data

    # -- names -------------------------------------------------------------------------------------------------

    def entries(self) -> list[tuple[str, Descriptor]]:
        """Every image: its name, or "" for one that lost it, and its manifest or index."""
        return [(item.annotations.get(REF_NAME, ""), item) for item in self.index().manifests]

    def names(self) -> dict[str, Descriptor]:
        """The images that have a name."""
        return {name: item for name, item in self.entries() if name}

    def index(self) -> Index:
        """index.json as it is now."""
        raw = reading(f"{self.root}/index.json", _INDEX_LIMIT)
        if raw is None:
            return Index(b"", {"manifests": []}, "")
        return _index(raw, f"{self.root}/index.json")

    def tag(self, name: str | Reference, descriptor: Descriptor) -> None:
        """Give the manifest (or index) in the store a name. An image that had it before stays, without one."""
        name = str(name if isinstance(name, Reference) else Reference.parse(name)) if name else ""

        def change(entries: list[tuple[str, Descriptor]]) -> list[tuple[str, Descriptor]]:
            kept = [(other, item) for other, item in entries
                    if not (item.digest == descriptor.digest and other in ("", name))]
            named = {item.digest for other, item in kept if other != name}
            kept = [(other if other != name else "", item) for other, item in kept
                    if other != name or not name or item.digest not in named]
            if not name and descriptor.digest in named:
                return kept
            return [*kept, (name, descriptor)]

        self._change(change)

    def untag(self, name: str | Reference, keep: bool = False) -> Descriptor:
        """Take a name away; what it stood for. `keep`: the image stays listed, without a name, if this was its last."""
        name = str(name if isinstance(name, Reference) else Reference.parse(name))
        gone: list[Descriptor] = []

        def change(entries: list[tuple[str, Descriptor]]) -> list[tuple[str, Descriptor]]:
            gone.extend(item for other, item in entries if other == name)
            kept = [(other, item) for other, item in entries if other != name]
            if keep and gone and gone[0].digest not in {item.digest for _, item in kept}:
                kept.append(("", gone[0]))
            return kept

        self._change(change)
        if not gone:
            raise _missing(name)
        return gone[0]

    def forget(self, digest: str) -> list[str]:
        """Drop every entry of the manifest or index `digest`; the names it had. Its blobs go with the next sweep."""
        gone: list[str] = []

        def change(entries: list[tuple[str, Descriptor]]) -> list[tuple[str, Descriptor]]:
            gone.extend(name for name, item in entries if item.digest == digest)
            return [(name, item) for name, item in entries if item.digest != digest]

        self._change(change)
        return gone

    def _change(self, change: Callable[[list[tuple[str, Descriptor]]], list[tuple[str, Descriptor]]]) -> None:
        with Lock(self._folder("index.lock"), shared=False):
            manifests = []
            for name, item in change(self.entries()):
                item = Descriptor(item.media_type, item.digest, item.size, dict(item.annotations), item.platform)
                item.annotations.pop(REF_NAME, None)
                if name:
                    item.annotations[REF_NAME] = name
                manifests.append(item.json())
            text = dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, indent=2)
            replace(f"{self.root}/index.json", text.encode(), f"{self.root}/index.json.new")

    # -- images ------------------------------------------------------------------------------------------------

    def resolve(self, text: str, platform: str = "") -> Image:
        """The image called so: a name, name@digest, an image ID or the beginning of one, a manifest's digest.

        ImageMissing if there is none. Whoever goes on to run it calls `use`, which finds out what happened meanwhile.
        """
        entries = self.entries()
        wanted = text.removeprefix("sha256:")
        if not (is_hex(wanted) and (len(wanted) == 64 or text != wanted)):
            reference = Reference.parse(text)
            for name, item in self._by_name(entries, reference):
                return self.load(item, name, platform)
        if not is_hex(wanted):
            raise _missing(text)
        return self._by_id(entries, wanted, text, platform)

    def _by_name(self, entries: list[tuple[str, Descriptor]], reference: Reference) -> list[tuple[str, Descriptor]]:
        if reference.digest:
            start = reference.name
            exact = [(name, item) for name, item in entries
                     if item.digest == reference.digest and name.partition("@")[0].startswith(start)
                     and Reference.parse(name).name == start]
            return exact or [(name, item) for name, item in entries if name == str(reference)]
        wanted = [str(reference)]
        if reference.familiar_name() == reference.repository.removeprefix("library/"):
            wanted.append(f"localhost/{reference.familiar()}")      # as podman names what it builds
        return [entry for name in wanted for entry in entries if entry[0] == name]

    def _by_id(self, entries: list[tuple[str, Descriptor]], wanted: str, text: str, platform: str) -> Image:
        found: dict[str, Image] = {}
        for name, item in entries:
            try:
                image = self.load(item, name, platform, listed=not platform)
            except ImageError:
                if item.digest.startswith("sha256:" + wanted):
                    raise
                continue            # another one's damage
            if any(digest.startswith("sha256:" + wanted) for digest in (image.id, image.digest, item.digest)):
                found.setdefault(image.id, image)
        if len(found) > 1:
            raise ImageError(f"image {text}: {len(found)} images begin so", "give more digits of its ID")
        for image in found.values():
            return image
        raise _missing(text)

    def load(self, descriptor: Descriptor, name: str = "", platform: str = "", listed: bool = False) -> Image:
        """The image that a manifest's or an index's descriptor stands for; of an index, the one for `platform`.

        `listed`: for who lists or removes what there is, the first that is there if none is for this host.
        """
        label = f"image {name or descriptor.digest}"
        manifest, index = parse_manifest(self.read(descriptor.digest), f"{label}: manifest"), ""
        if isinstance(manifest, Index):
            index, there = descriptor.digest, [item for item in manifest.manifests if self.has(item.digest)]
            try:
                chosen = choose(manifest, platform, label)
            except ImageError:
                if not listed or not there:
                    raise
                chosen = there[0]
            if chosen not in there and listed and there:
                chosen = there[0]
            if chosen not in there:
                raise ImageMissing(f"{label}: its part for {chosen.platform} is not in the store",
                                   f"`pyhv image pull --platform {chosen.platform} {name}` fetches it")
            descriptor, manifest = chosen, parse_manifest(self.read(chosen.digest), f"{label}: manifest")
        if not isinstance(manifest, Manifest):
            raise ImageError(f"{label}: manifests: an index within an index is not taken")
        config = ImageConfig.parse(self.read(manifest.config.digest), f"{label}: config")
        if platform and not index and config.platform.split("/")[:2] != platform.split("/")[:2]:
            raise ImageMissing(f"{label}: is for {config.platform}, not {platform}",
                               f"`pyhv image pull --platform {platform} {name}` fetches it")
        return Image(name, descriptor.digest, manifest, config, index)

    # -- who uses what -----------------------------------------------------------------------------------------

    def use(self, image: Image, user: str) -> None:
        """Note that the instance `user` uses `image`: `rm` refuses it, `prune` keeps its blobs and layers.

        Call it before anything is started: if the image was removed since `resolve`, and its layers with it, this says
        so (ImageMissing). A second call changes nothing. `unuse` ends it.
        """
        from hv.image.users import note

        with self.lock(shared=True):
            if not self.has(image.digest):
                raise ImageMissing(f"image {image.name or image.id}: has been removed meanwhile",
                                   "pull or load it again")
            note(self.root, image.id, user, image.digest, self._temporary())

    def unuse(self, image_id: str, user: str) -> None:
        """`use`'s end; nothing happens if it is not noted."""
        from hv.image.users import forget

        forget(self.root, _hex(image_id), user)

    def users(self) -> dict[str, dict[str, str]]:
        """Image ID to {user: the manifest's digest, or "" if that is damaged}, for all that are in use."""
        from hv.image.users import listed

        return listed(self.root)


def _hex(digest: str) -> str:
    if not is_digest(digest):
        raise ImageError(f"digest {digest[:100]!r} is not sha256: and 64 hexadecimal digits")
    return digest[7:]


def _verify(digest: str, size: int, found: str, total: int) -> None:
    if 0 <= size != total:
        raise ImageError(f"blob {digest}: has {total} bytes, and should have {size}")
    if digest != found:
        raise ImageError(f"blob {digest}: its content has the digest {found}")


def _index(raw: bytes, where: str) -> Index:
    try:
        fields = loads(str(raw, "utf-8"))
    except ValueError as error:
        raise ImageError(f"{where}: is not JSON: {str(error)[:100]}", _ANEW) from None
    if not isinstance(fields, dict):
        raise ImageError(f"{where}: is not an object", _ANEW)
    return Index(raw, fields, where)


def _missing(text: str) -> ImageMissing:
    return ImageMissing(f"image {text}: is not in the store", f"`pyhv image pull {text}` fetches it")
