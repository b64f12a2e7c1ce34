"""Unpacked layers, each once however many images share it: what overlayfs and virtio-fs take as an image's files.

Driven by tests/unit/test_image_layers.py.
"""

from __future__ import annotations

__all__ = ["Layers"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hv.image.image import Image
    from hv.image.store import Store

    Progress = Callable[[str, int, int], None]      # diff ID, compressed bytes done, of how many


class Layers:
    """The folder `layers` of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def ensure(self, image: Image, progress: Progress | None = None) -> list[str]:
        """The folders of `image`'s layers, the uppermost first, unpacked where they were not yet. ImageError."""
        raise NotImplementedError

    def settle(self) -> None:
        """Have what was unpacked reach the disk. Until then a reboot (not a kill) makes it be unpacked again."""
        raise NotImplementedError

    def unused(self, images: Iterable[Image]) -> list[str]:
        """The names of layers that none of `images` has."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """Bytes on disk of an unpacked layer."""
        raise NotImplementedError

    def remove(self, names: Iterable[str]) -> int:
        """Remove unpacked layers and what killed unpackings left, with the store's lock held; the bytes given back."""
        raise NotImplementedError
