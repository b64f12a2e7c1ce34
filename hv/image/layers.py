"""Unpacked layers, each once however many images share it: what overlayfs and virtio-fs take as an image's files.

    layers/sha256/HEX/diff      a layer's files (hv/image/unpack.py), HEX its diff ID; or the chain ID where folders
                                that the layer does not name are as lower layers have them (hv/image/unpacking.py)
    layers/sha256/HEX/info      what is known of it, with the boot it was unpacked in
    layers/sha256/HEX/settled   it is on the disk for certain
    layers/images/HEX           an image's layers, by its ID: the boot, then names, the uppermost first
    layers/tmp/HEX              being unpacked, flock(2)ed by who does it; renamed when whole

`ensure` is on the way of `pyhv run`: for an unpacked image it reads one file, and looks whether the folders are there.
Nothing is flushed meanwhile. What was unpacked counts until the next boot; from then on only what `settle` has made
certain, the rest is unpacked again: a crash of the host leaves no layer with holes.

Driven by tests/unit/test_image_layers.py.
"""

from __future__ import annotations

__all__ = ["Layers", "boot_id"]

import os

from hv.errors import ImageError
from hv.image.files import reading
from hv.image.reference import is_digest, is_hex
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from hv.image.image import Image
    from hv.image.store import Store

    Progress = Callable[[str, int, int], None]      # diff ID, compressed bytes done, of how many; from any thread

_INFO_MOST = 32 << 20


def boot_id() -> str:
    """This boot of the host (proc_sys_kernel(5), random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id", "rb", 0) as file:
        return str(file.read(64), "ascii").strip()


class Layers:
    """The folder `layers` of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.root = store.root + "/layers"

    def ensure(self, image: Image, progress: Progress | None = None) -> list[str]:
        """The folders of `image`'s layers, the uppermost first, unpacked where they were not yet. ImageError.

        A layer that hides all below it is the last. No layer stands twice: overlayfs would refuse it, and the upper of
        two has all that the lower one has.
        """
        if not is_digest(image.id) or not all(is_digest(diff_id) for _, diff_id in image.layers):
            raise ImageError(f"image {image.name or image.id}: its layers have bad digests")
        folders = self._ready(image.id[7:])
        if folders is None:
            from hv.image.unpacking import Unpacking

            names = Unpacking(self, progress).image(image)
            folders = [self.folder(name) for name in names]
        return folders

    def _ready(self, name: str) -> list[str] | None:
        record = reading(f"{self.root}/images/{name}", _INFO_MOST)
        if record is None:
            return None
        boot, *names = str(record, "ascii", "replace").split()
        folders = [self.folder(name) for name in names]
        if boot != boot_id() or not all(map(os.path.isdir, folders)):
            return None
        return folders

    def folder(self, name: str) -> str:
        """Where the files of a layer are."""
        return f"{self.root}/sha256/{name}/diff"

    def info(self, name: str) -> dict[str, Any] | None:
        """What is known of an unpacked layer; None if it is not there, or not for certain."""
        try:
            raw = reading(f"{self.root}/sha256/{name}/info", _INFO_MOST)
            fields = loads(str(raw or b"", "utf-8"))
        except ValueError:
            return None
        if not isinstance(fields, dict) or not os.path.isdir(self.folder(name)):
            return None
        if fields.get("boot") != boot_id() and not os.path.exists(f"{self.root}/sha256/{name}/settled"):
            return None
        return fields

    def names(self) -> list[str]:
        """All that are unpacked."""
        try:
            return sorted(name for name in os.listdir(f"{self.root}/sha256") if is_hex(name))
        except FileNotFoundError:
            return []

    def unsettled(self) -> list[str]:
        """Those of which nobody knows whether they have reached the disk: they are unpacked again after a reboot."""
        return [name for name in self.names()
                if self.info(name) is not None and not os.path.exists(f"{self.root}/sha256/{name}/settled")]

    def settle(self) -> None:
        """Have what was unpacked reach the disk: seconds, after a large image. For who has time."""
        from hv.linux.files import sync_filesystem

        missing = self.unsettled()
        if not missing:
            return
        fd = os.open(f"{self.root}/sha256", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_filesystem(fd)
        finally:
            os.close(fd)
        for name in missing:
            try:
                os.close(os.open(f"{self.root}/sha256/{name}/settled", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            except FileNotFoundError:
                pass        # removed meanwhile

    def unused(self, images: Iterable[Image]) -> list[str]:
        """The names of layers that none of `images` has."""
        from hv.image.unpacking import chain_ids

        used: set[str] = set()
        for image in images:
            diff_ids = [diff_id for _, diff_id in image.layers]
            used.update(digest[7:] for digest in (*diff_ids, *chain_ids(diff_ids)))
        return [name for name in self.names() if name not in used]

    def size(self, name: str) -> int:
        """Bytes of files in an unpacked layer."""
        size = (self.info(name) or {}).get("size")
        return size if isinstance(size, int) else 0

    def remove(self, names: Iterable[str]) -> int:
        """Remove unpacked layers and what killed unpackings left, with the store's lock held; the bytes given back."""
        from hv.image.unpacking import discard, sweep

        gone, freed = set(names), 0
        for name in gone:
            freed += self.size(name)
            discard(self.root, name)
        sweep(self.root)
        folder = f"{self.root}/images"
        for image in os.listdir(folder) if os.path.isdir(folder) else ():
            record = reading(f"{folder}/{image}", _INFO_MOST)
            if record is not None and not gone.isdisjoint(str(record, "ascii", "replace").split()):
                os.unlink(f"{folder}/{image}")
        return freed
