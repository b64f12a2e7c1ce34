"""`load`: images from an archive or a folder into the store.

docker-archive (docker save, podman save, skopeo: manifest.json, image-spec of moby v1.2), oci-archive and OCI layouts
(index.json; docker save of version 25 and later writes both). Layers are kept as they come, compressed or not. Names
are given last, once every image of the archive is whole: what is refused, or killed, leaves the store as it was.

Source: moby image/spec/spec.md; opencontainers/image-spec v1.1 image-layout.md. Left out: archives from before docker
1.10 (`repositories` only). Diff IDs of compressed layers are verified when they are unpacked (hv/image/layers.py).
Driven by tests/unit/test_image_archive.py.
"""

from __future__ import annotations

__all__ = ["Loaded", "load", "open_source"]

import os
import stat

from hv.errors import ConfigError, ImageError, ImageMissing
from hv.image.image import Image
from hv.image.media import (
    CONFIG,
    LAYER,
    LAYER_GZIP,
    LAYER_ZSTD,
    MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    parse_manifest,
)
from hv.image.reference import Reference
from hv.image.staged import Member, Staged
from hv.image.store import REF_NAME, Store
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CONTAINERD_NAME = "io.containerd.image.name"       # what docker and containerd write; REF_NAME is the tag alone there
_IMAGES = 1000
_MAGIC = ((b"\x1f\x8b", LAYER_GZIP), (b"\x28\xb5\x2f\xfd", LAYER_ZSTD))
_OTHERS = ((b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"))


class Loaded:
    """One image of an archive: its names (perhaps none), its ID, its manifest's digest."""

    __slots__ = ("digest", "id", "names")

    def __init__(self, names: list[str], image_id: str, digest: str) -> None:
        self.names, self.id, self.digest = names, image_id, digest


def open_source(path: str) -> int:
    """A descriptor of the archive `path` ("-": standard input); -1 if it is a folder."""
    if path == "-":
        return os.dup(0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        return -1
    return fd


def load(store: Store, path: str, progress: Callable[[int], object] | None = None) -> list[Loaded]:
    """Put every image of the archive `path` ("-": standard input) into the store, and name them."""
    label = "archive" if path == "-" else path
    with store.lock(shared=True), Staged(store, label) as staged:
        fd = open_source(path)
        try:
            if fd < 0:
                staged.read_folder(path)
            else:
                staged.read_archive(fd, progress)
        finally:
            if fd >= 0:
                os.close(fd)
        found = _oci(staged) if staged.has("index.json") else _docker(staged)
        for names, item, _ in found:
            for name in names or [""]:
                store.tag(name, item)
    return [Loaded(names, image_id, item.digest) for names, item, image_id in found]


Found = list[tuple[list[str], Descriptor, str]]     # names, manifest or index, image ID


def _docker(staged: Staged) -> Found:
    """manifest.json: [{"Config": NAME, "RepoTags": [...], "Layers": [NAME...]}]."""
    if not staged.has("manifest.json"):
        raise ImageError(f"{staged.label}: has neither manifest.json nor index.json",
                         "a root file system is taken by `pyhv image import`")
    found: Found = []
    for n, item in enumerate(_list_of_objects(staged, "manifest.json", staged.table("manifest.json"))):
        where = f"manifest.json: [{n}]"
        names = [_reference(name, staged, f"{where}.RepoTags")
                 for name in _strings(staged, item.get("RepoTags"), f"{where}.RepoTags")]
        config_name = item.get("Config")
        if not isinstance(config_name, str):
            raise staged.bad(f"{where}.Config", "is no string")
        config = staged.find(config_name, f"{where}.Config")
        parsed = ImageConfig.parse(staged.content(config, config_name), f"{staged.label}: {config_name[:100]}")
        layers = [staged.find(name, f"{where}.Layers")
                  for name in _strings(staged, item.get("Layers"), f"{where}.Layers")]
        if len(layers) != len(parsed.diff_ids):
            raise staged.bad(f"{where}.Layers", f"{len(layers)} layers, and {len(parsed.diff_ids)} in rootfs.diff_ids")
        kinds = []
        for layer, diff_id in zip(layers, parsed.diff_ids, strict=True):
            kinds.append(_layer_type(staged, layer, f"{where}.Layers"))
            if kinds[-1] == LAYER and layer.digest != diff_id:
                raise staged.bad(f"{where}.Layers", f"{layer.digest} is not the layer {diff_id} of rootfs.diff_ids")
        manifest = dumps({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": staged.keep(config, CONFIG).json(),
            "layers": [staged.keep(layer, kind).json() for layer, kind in zip(layers, kinds, strict=True)]}).encode()
        parse_manifest(manifest, f"{staged.label}: {where}")
        found.append((names, staged.store.put_bytes(manifest, MANIFEST), config.digest))
    return found


def _layer_type(staged: Staged, layer: Member, where: str) -> str:
    head = layer.head
    if not head and layer.size:             # it was in the store already
        with open(staged.store.blob_path(layer.digest), "rb") as file:
            head = file.read(6)
    for magic, name in _OTHERS:
        if head.startswith(magic):
            raise staged.bad(where, f"a layer is compressed with {name}: gzip, zstd and plain layers are taken")
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), LAYER)


def _oci(staged: Staged) -> Found:
    """index.json: an index whose manifests are the images."""
    index = parse_manifest(staged.table("index.json"), f"{staged.label}: index.json")
    if not isinstance(index, Index):
        raise staged.bad("index.json", "is no index")
    if len(index.manifests) > _IMAGES:
        raise staged.bad("index.json", f"{len(index.manifests)} images are more than {_IMAGES}")
    tags = _repo_tags(staged)
    found: dict[str, tuple[list[str], Descriptor, str]] = {}
    for n, item in enumerate(index.manifests):
        where = f"index.json: manifests[{n}]"
        kept, image = _walk(staged, item, where, depth=0)
        names = [_reference(name, staged, where) for name in _names(item)]
        if not names and image:
            names = [_reference(name, staged, "manifest.json: RepoTags") for name in tags.get(image.id, [])]
        before = found.setdefault(item.digest, (names, kept, image.id if image else ""))
        before[0].extend(name for name in names if name not in before[0])
    if not found:
        raise staged.bad("index.json", "has no image")
    return list(found.values())


def _walk(staged: Staged, item: Descriptor, where: str, depth: int) -> tuple[Descriptor, Image | None]:
    """Keep the blobs of a manifest or an index; the image for this host, if there is one."""
    member = _blob(staged, item, f"{where}.digest")
    manifest = parse_manifest(staged.content(member, item.digest), f"{staged.label}: {item.digest}")
    kept = staged.keep(member, manifest.media_type)
    kept.platform = item.platform
    if isinstance(manifest, Manifest):
        for part, name in [(manifest.config, "config"), *((layer, f"layers[{n}]")
                                                          for n, layer in enumerate(manifest.layers))]:
            staged.keep(_blob(staged, part, f"{item.digest}: {name}"), part.media_type)
        return kept, staged.store.load(kept) if depth == 0 else None
    if depth:
        raise staged.bad(where, "an index within an index is not taken")
    there = [part for part in manifest.manifests if staged.has("blobs/sha256/" + part.digest[7:])]
    if not there:
        raise staged.bad(where, "none of the index's manifests is in the archive")
    for part in there:
        _walk(staged, part, f"{item.digest}: manifests", depth + 1)
    try:
        return kept, staged.store.load(kept)
    except ImageMissing:
        return kept, None           # images for other hosts
    except ImageError:
        if any(part.platform for part in there):
            return kept, None
        raise


def _blob(staged: Staged, item: Descriptor, where: str) -> Member:
    member = staged.find("blobs/sha256/" + item.digest[7:], where)
    if member.digest != item.digest:
        raise staged.bad(where, f"blobs/sha256/{item.digest[7:]} has the digest {member.digest}")
    if member.size != item.size:
        raise staged.bad(where, f"{item.digest} has {member.size} bytes, and should have {item.size}")
    return member


def _names(item: Descriptor) -> list[str]:
    """What the annotations call an image: a full name, or a tag alone, which podman takes as a name on localhost."""
    if name := item.annotations.get(_CONTAINERD_NAME):
        return [name]
    name = item.annotations.get(REF_NAME, "")
    if not name:
        return []
    return [name if any(mark in name for mark in ":/@") else f"localhost/{name.lower()}"]


def _repo_tags(staged: Staged) -> dict[str, list[str]]:
    """Of an archive with both tables: image ID to the names in manifest.json."""
    if not staged.has("manifest.json"):
        return {}
    tags = {}
    for item in _list_of_objects(staged, "manifest.json", staged.table("manifest.json")):
        config = item.get("Config")
        if isinstance(config, str):
            tags["sha256:" + config.rpartition("/")[2].removesuffix(".json")] = _strings(
                staged, item.get("RepoTags"), "manifest.json: RepoTags")
    return tags


def _reference(name: str, staged: Staged, where: str) -> str:
    try:
        return str(Reference.parse(name))
    except ConfigError as error:
        raise staged.bad(where, str(error)) from None


def _list_of_objects(staged: Staged, name: str, raw: bytes) -> list[dict[str, Any]]:
    try:
        value = loads(str(raw, "utf-8"))
    except ValueError as error:
        raise staged.bad(name, f"is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise staged.bad(name, "is not a list of objects")
    if len(value) > _IMAGES:
        raise staged.bad(name, f"{len(value)} images are more than {_IMAGES}")
    return value


def _strings(staged: Staged, value: Any, where: str) -> list[str]:
    value = value or []
    if not isinstance(value, list) or len(value) > _IMAGES or not all(isinstance(item, str) for item in value):
        raise staged.bad(where, "is not a list of strings")
    return value


