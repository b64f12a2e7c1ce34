"""An image of the store to a registry: blobs that it lacks, side by side, then the manifest, then its name.

Blobs that another repository of the same registry has (we know it from the names in our store) are mounted there, not
sent. An index is pushed whole if all its parts are in the store, else the part for this host alone. Manifests go as
they are, so that the digest stays. Left out on purpose: converting between docker's and OCI's forms, compressing.

Driven by tests/root/test_registry.py and tests/unit/test_image_registry_push.py.
"""

from __future__ import annotations

__all__ = ["push"]

from hv.errors import ConfigError, HvError, ImageError
from hv.image.media import Descriptor, Index, Manifest, parse_manifest
from hv.image.reference import Reference
from hv.image.registry import Registry
from hv.image.registry_reach import Access
from hv.image.store import Store
from hv.image.transfer import Report, at_once

_JOBS = 3


def push(store: Store, name: str, destination: Reference, access: Access | None = None, platform: str = "",
         jobs: int = _JOBS, report: Report = lambda what, blob, done: None) -> str:
    """Send the image called `name`; the digest under which the registry has it."""
    if destination.digest:
        raise ConfigError(f"push to {destination.familiar()}: a destination has a tag, not a digest")
    with store.lock(shared=True):
        image = store.resolve(name, platform)
        index, manifests = _parts(store, image.digest, "" if platform else image.index)
        registry = Registry(destination.registry, destination.repository, access or Access(), push=True)
        try:
            sources = _sources(store, destination)
            blobs = {blob.digest: blob for part in manifests for blob in (part.config, *part.layers)}
            at_once([lambda blob=blob: _send(store, registry, blob, sources, report)    # type: ignore[misc]
                     for blob in blobs.values()], max(1, min(jobs, len(blobs))), registry.session.abort)
            for part in manifests:
                digest = registry.put_manifest(_digest(part) if index else destination.tag, part.raw, part.media_type)
            return registry.put_manifest(destination.tag, index.raw, index.media_type) if index else digest
        finally:
            registry.close()


def _parts(store: Store, digest: str, index_digest: str) -> tuple[Index | None, list[Manifest]]:
    """What to push: an index with all its manifests, or one manifest."""
    if index_digest:
        index = parse_manifest(store.read(index_digest), f"index {index_digest}")
        if isinstance(index, Index) and all(store.has(item.digest) for item in index.manifests):
            return index, [_load(store, item.digest) for item in index.manifests]
    return None, [_load(store, digest)]


def _load(store: Store, digest: str) -> Manifest:
    manifest = parse_manifest(store.read(digest), f"manifest {digest}")
    if not isinstance(manifest, Manifest):
        raise ImageError(f"manifest {digest}: manifests: an index within an index is not taken")
    return manifest


def _digest(manifest: Manifest) -> str:
    from hashlib import sha256

    return f"sha256:{sha256(manifest.raw).hexdigest()}"


def _sources(store: Store, destination: Reference) -> dict[str, str]:
    """Blob to another repository of the registry that should have it."""
    found: dict[str, str] = {}
    for name, descriptor in store.names().items():
        try:
            other = Reference.parse(name)
            if other.registry != destination.registry or other.repository == destination.repository:
                continue
            manifest = store.load(descriptor).manifest
        except HvError:
            continue        # a damaged image is not what this is about
        for blob in (manifest.config, *manifest.layers):
            found.setdefault(blob.digest, other.repository)
    return found


def _send(store: Store, registry: Registry, blob: Descriptor, sources: dict[str, str], report: Report) -> None:
    if registry.has_blob(blob):
        report("there", blob, blob.size)
        return
    if not store.has(blob.digest, blob.size):
        raise ImageError(f"image store: blob {blob.digest} is missing", "`pyhv image fsck` says which images need it")
    sent = registry.put_blob(blob, store.blob_path(blob.digest), sources.get(blob.digest, ""),
                             lambda done: report("bytes", blob, done))
    report("done" if sent else "there", blob, blob.size)
