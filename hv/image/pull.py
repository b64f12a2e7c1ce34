"""An image from a registry into the store: manifest, the part for a platform, configuration, layers side by side.

Nothing is named before all of it is there, verified and on the disk; what is there is not fetched again. No printing:
`report` hears of every blob. Left out on purpose: layers from addresses in the manifest (`urls`), all parts of an index
at once. Driven by tests/root/test_registry.py and tests/unit/test_image_pull.py.
"""

from __future__ import annotations

__all__ = ["check_platform", "pull"]

import os

from hv.errors import ConfigError, ImageError
from hv.image.image import Image
from hv.image.media import (
    CONFIG,
    CONFIG_LIMIT,
    DOCKER_CONFIG,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    choose,
    host_platform,
    parse_manifest,
)
from hv.image.reference import Reference
from hv.image.registry import Registry
from hv.image.registry_reach import Access
from hv.image.store import Store
from hv.image.transfer import Report, at_once, fetch

_JOBS = 3
_SPARE = 16 << 20           # bytes of the disk that a pull leaves free


def pull(store: Store, reference: Reference, access: Access | None = None, platform: str = "", jobs: int = _JOBS,
         report: Report = lambda what, blob, done: None) -> Image:
    """Fetch an image and give it its name; ImageError (RegistryError) says what stood in the way."""
    check_platform(platform)
    registry = Registry(reference.registry, reference.repository, access or Access())
    try:
        with store.lock(shared=True):
            return _pull(store, reference, registry, platform, jobs, report)
    finally:
        registry.close()


def _pull(store: Store, reference: Reference, registry: Registry, platform: str, jobs: int, report: Report) -> Image:
    label = f"image {reference.familiar()}"
    top, raw = _manifest(store, registry, reference.digest or reference.tag, -1)
    found, chosen, chosen_raw = parse_manifest(raw, label), top, raw
    if isinstance(found, Index):
        wanted = choose(found, platform, label)
        chosen, chosen_raw = _manifest(store, registry, wanted.digest, wanted.size)
        found = parse_manifest(chosen_raw, f"{label}: {wanted.platform}")
    if not isinstance(found, Manifest):
        raise ImageError(f"{label}: manifests: an index within an index is not taken")
    _check_space(store, [found.config, *found.layers], label)
    _check_config(store, registry, found, label, platform if chosen is top else "any", report)
    layers = {layer.digest: layer for layer in found.layers}
    for other in found.layers:
        if other.size != layers[other.digest].size:
            raise ImageError(f"{label}: layers: {other.digest} has two sizes")
    at_once([lambda layer=layer: fetch(store, registry, layer, report)  # type: ignore[misc]
             for layer in layers.values()], max(1, min(jobs, len(layers))), registry.session.abort)
    for descriptor, content in ((chosen, chosen_raw), (top, raw)):
        if not store.has(descriptor.digest, descriptor.size):
            store.put_bytes(content)
    # an index stands for this host's image; asked for another platform, the name is that image's
    named = top if platform in ("", host_platform()) else chosen
    image = store.load(named, str(reference))       # refuses what could not be used before it has a name
    store.tag(Reference(reference.registry, reference.repository, "" if reference.digest else reference.tag,
                        reference.digest), named)
    return image


def _manifest(store: Store, registry: Registry, wanted: str, size: int) -> tuple[Descriptor, bytes]:
    """By digest from the store if it is there, else from the registry."""
    if ":" in wanted and store.has(wanted, size):
        raw = store.read(wanted)
        return Descriptor(parse_manifest(raw, wanted).media_type, wanted, len(raw)), raw
    found, raw = registry.manifest(wanted, size)
    found.media_type = parse_manifest(raw, f"{registry.label}: manifest {wanted}").media_type
    return found, raw


def _check_config(store: Store, registry: Registry, manifest: Manifest, label: str, platform: str,
                  report: Report) -> None:
    """Fetch the configuration before the layers: it tells an image for another machine, and what is no image."""
    if manifest.config.media_type not in (CONFIG, DOCKER_CONFIG):
        raise ImageError(f"{label}: config.mediaType: {manifest.config.media_type[:100]!r} is not a container image's")
    fetch(store, registry, manifest.config, report)
    config = ImageConfig.parse(store.read(manifest.config.digest, CONFIG_LIMIT), f"{label}: config")
    if len(config.diff_ids) != len(manifest.layers):
        raise ImageError(f"{label}: rootfs.diff_ids: {len(config.diff_ids)} for {len(manifest.layers)} layers")
    wanted = platform or host_platform()
    if wanted != "any" and config.architecture and config.platform.split("/")[:2] != wanted.split("/")[:2]:
        raise ImageError(f"{label}: is for {config.platform}, not {wanted}",
                         f"--platform {config.platform} takes it nevertheless")


def _check_space(store: Store, blobs: list[Descriptor], label: str) -> None:
    sizes = {blob.digest: blob.size for blob in blobs if not store.has(blob.digest, blob.size)}
    kept = 0
    for digest in sizes:
        try:
            kept += os.stat(store.partial(digest)).st_size
        except OSError:
            pass
    disk = os.statvfs(store.root)
    free, needed = disk.f_bavail * disk.f_frsize, sum(sizes.values()) - kept
    if needed > 0 and needed + _SPARE > free:
        raise ImageError(f"{label}: needs {needed >> 20} MiB, {store.root} has {free >> 20} MiB free",
                         "`pyhv image prune` frees what no image uses")


def check_platform(platform: str) -> None:
    """ConfigError unless it is os/architecture[/variant], or ""."""
    parts = platform.split("/")
    if platform and (len(parts) not in (2, 3) or not all(part.isascii() and part.isalnum() for part in parts)):
        raise ConfigError(f"--platform {platform[:80]!r}: not OS/ARCHITECTURE[/VARIANT]", "for example linux/arm64")
