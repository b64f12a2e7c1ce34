"""An image in the store: its manifest, configuration and layers.

Driven by tests/unit/test_image_store.py.
"""

from __future__ import annotations

__all__ = ["Image"]

from hv.errors import ImageError
from hv.image.media import Descriptor, ImageConfig, Manifest, host_platform


class Image:
    """One image for one platform.

    `name` is "" where it has none; `digest` its manifest's, `id` its configuration's (what docker and podman call the
    image ID), `index` the digest of the index it was chosen from, or "".
    """

    __slots__ = ("config", "digest", "id", "index", "layers", "manifest", "name")

    def __init__(self, name: str, digest: str, manifest: Manifest, config: ImageConfig, index: str = "") -> None:
        self.name, self.digest, self.manifest, self.config, self.index = name, digest, manifest, config, index
        self.id = manifest.config.digest
        if len(manifest.layers) != len(config.diff_ids):
            raise ImageError(f"image {name or self.id}: rootfs.diff_ids: {len(config.diff_ids)} for "
                             f"{len(manifest.layers)} layers")
        self.layers: list[tuple[Descriptor, str]] = list(zip(manifest.layers, config.diff_ids, strict=True))

    @property
    def size(self) -> int:
        """Bytes in the store: the layers as they are kept (compressed or not), the configuration, the manifest."""
        return sum(layer.size for layer in self.manifest.layers) + self.manifest.config.size + len(self.manifest.raw)

    def check_platform(self) -> None:
        """Refuse an image of another architecture or system than this host's."""
        mine, its = host_platform().split("/"), self.config.platform.split("/")
        if its[1] and its[:2] != mine[:2] and its[:2] != ["linux", {"amd64": "386"}.get(mine[1], mine[1])]:
            raise ImageError(f"image {self.name or self.id}: is for {self.config.platform}, this host is "
                             f"{host_platform()}", f"pull it with --platform {host_platform()}")
