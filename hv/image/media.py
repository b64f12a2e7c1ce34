"""Descriptors, manifests, indexes and image configurations, checked field by field.

Source: opencontainers/image-spec v1.1 (descriptor.md, manifest.md, image-index.md, config.md), and docker's
distribution manifests v2 schema 2, which have the same fields. What comes here was written by others: sizes, counts and
types are checked, and an error names the field. Left out on purpose: schema 1 manifests (retired since 2017), digests
other than sha256, data embedded in descriptors.

`pyhv run` reads an image's manifest and configuration before it starts anything, so this imports next to nothing.
Driven by tests/unit/test_image_media.py.
"""

from __future__ import annotations

__all__ = ["CONFIG", "CONFIG_LIMIT", "DOCKER_CONFIG", "DOCKER_INDEX", "DOCKER_MANIFEST", "INDEX", "LAYER", "LAYER_GZIP",
           "LAYER_ZSTD", "MANIFEST", "MANIFEST_LIMIT", "MANIFEST_TYPES", "Descriptor", "ImageConfig", "Index",
           "Manifest", "choose", "host_platform", "parse_manifest"]

import os

from hv.errors import ImageError
from hv.image.reference import is_digest
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OCI, _DOCKER = "application/vnd.oci.image.", "application/vnd.docker."
INDEX, MANIFEST, CONFIG = _OCI + "index.v1+json", _OCI + "manifest.v1+json", _OCI + "config.v1+json"
LAYER, LAYER_GZIP, LAYER_ZSTD = _OCI + "layer.v1.tar", _OCI + "layer.v1.tar+gzip", _OCI + "layer.v1.tar+zstd"
DOCKER_INDEX = _DOCKER + "distribution.manifest.list.v2+json"
DOCKER_MANIFEST = _DOCKER + "distribution.manifest.v2+json"
DOCKER_CONFIG = _DOCKER + "container.image.v1+json"
MANIFEST_TYPES = (MANIFEST, DOCKER_MANIFEST, INDEX, DOCKER_INDEX)

MANIFEST_LIMIT = 4 << 20        # what registries take (image-spec manifest.md), containers/image and containerd read
CONFIG_LIMIT = 8 << 20
_LAYERS = 500                   # fs/overlayfs/params.h: OVL_MAX_STACK; no host could mount more
_ENTRIES = 10_000               # manifests of an index, entries of a history, environment, labels
_SIZE = 1 << 62                 # no file is larger

# `uname -m` in the words of Go's GOARCH (go.dev/doc/install/source#environment), and the variant that is implied
_MACHINES = {"x86_64": ("amd64", ""), "aarch64": ("arm64", "v8"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"),
             "i686": ("386", ""), "riscv64": ("riscv64", ""), "ppc64le": ("ppc64le", ""), "s390x": ("s390x", "")}


class Descriptor:
    """What a blob is, how large, and its digest; `platform` (of a manifest in an index) is "" or os/arch[/variant]."""

    __slots__ = ("annotations", "digest", "media_type", "platform", "size")

    def __init__(self, media_type: str, digest: str, size: int, annotations: dict[str, str] | None = None,
                 platform: str = "") -> None:
        self.media_type, self.digest, self.size = media_type, digest, size
        self.annotations, self.platform = annotations or {}, platform

    @classmethod
    def parse(cls, value: Any, where: str) -> Descriptor:
        """Read a descriptor's JSON object; `where` names it in an error."""
        fields = _typed(value, dict, where)
        media_type = _text(fields.get("mediaType", ""), f"{where}.mediaType")
        digest = _text(fields.get("digest"), f"{where}.digest")
        if not is_digest(digest):
            raise _bad(f"{where}.digest", f"{digest[:100]!r} is not sha256: and 64 hexadecimal digits")
        size = fields.get("size")
        if type(size) is not int or not 0 <= size < _SIZE:
            raise _bad(f"{where}.size", f"{str(size)[:30]!r} is no size")
        return cls(media_type, digest, size, _strings(fields.get("annotations"), f"{where}.annotations"),
                   _platform(fields.get("platform"), f"{where}.platform"))

    def json(self) -> dict[str, Any]:
        """As it stands in a manifest or an index."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.platform:
            system, architecture, *variant = self.platform.split("/")
            value["platform"] = {"architecture": architecture, "os": system}
            if variant:
                value["platform"]["variant"] = variant[0]
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return value

    def __repr__(self) -> str:
        return f"Descriptor({self.media_type!r}, {self.digest!r}, {self.size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Descriptor) and (self.digest, self.size) == (other.digest, other.size)

    def __hash__(self) -> int:
        return hash(self.digest)


class Manifest:
    """One image for one platform: its configuration and its layers, the lowest first. `raw` is what was read."""

    __slots__ = ("annotations", "config", "layers", "media_type", "raw")

    def __init__(self, raw: bytes, fields: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.media_type: str = fields.get("mediaType") or MANIFEST
        self.config = Descriptor.parse(fields.get("config"), f"{where}: config")
        if self.config.size > CONFIG_LIMIT:
            raise _bad(f"{where}: config.size", f"{self.config.size} bytes are more than {CONFIG_LIMIT}")
        layers = _typed(fields.get("layers"), list, f"{where}: layers")
        if len(layers) > _LAYERS:
            raise _bad(f"{where}: layers", f"{len(layers)} are more than a host can stack ({_LAYERS})")
        self.layers = [Descriptor.parse(item, f"{where}: layers[{n}]") for n, item in enumerate(layers)]
        self.annotations = _strings(fields.get("annotations"), f"{where}: annotations")


class Index:
    """Several manifests, one per platform (a manifest list in docker's words). `raw` is what was read."""

    __slots__ = ("annotations", "manifests", "media_type", "raw")

    def __init__(self, raw: bytes, fields: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.media_type: str = fields.get("mediaType") or INDEX
        manifests = _typed(fields.get("manifests"), list, f"{where}: manifests")
        if len(manifests) > _ENTRIES:
            raise _bad(f"{where}: manifests", f"{len(manifests)} are more than {_ENTRIES}")
        self.manifests = [Descriptor.parse(item, f"{where}: manifests[{n}]") for n, item in enumerate(manifests)]
        self.annotations = _strings(fields.get("annotations"), f"{where}: annotations")


def parse_manifest(raw: bytes, where: str = "manifest") -> Manifest | Index:
    """Read a manifest or an index, by what is in it; ImageError names the field that is wrong."""
    fields = _object(raw, MANIFEST_LIMIT, where)
    version = fields.get("schemaVersion")
    if version == 1:
        raise _bad(f"{where}: schemaVersion", "1 is docker's old form", "push the image again with a current tool")
    if version != 2 or type(version) is not int:
        raise _bad(f"{where}: schemaVersion", f"{str(version)[:30]!r} is not 2")
    media_type = _text(fields.get("mediaType") or "", f"{where}: mediaType")
    if media_type and media_type not in MANIFEST_TYPES:
        raise _bad(f"{where}: mediaType", f"{media_type[:100]!r} is neither a manifest's nor an index's")
    # CVE-2021-41190: what could be read as either is refused
    is_index = "manifests" in fields
    if is_index and ("layers" in fields or "config" in fields):
        raise _bad(f"{where}: manifests", "stands beside layers or config: it is either a manifest or an index")
    if media_type and is_index != (media_type in (INDEX, DOCKER_INDEX)):
        raise _bad(f"{where}: mediaType", f"{media_type!r} does not fit what is in it")
    return Index(raw, fields, where) if is_index else Manifest(raw, fields, where)


class ImageConfig:
    """An image's configuration (config.md): what to run by default, and the digests of the unpacked layers."""

    __slots__ = ("architecture", "cmd", "created", "diff_ids", "entrypoint", "env", "exposed_ports", "history",
                 "labels", "os", "raw", "stop_signal", "user", "variant", "volumes", "working_dir")

    @classmethod
    def parse(cls, raw: bytes, where: str = "config") -> ImageConfig:
        """Read a configuration; ImageError names the field that is wrong."""
        return cls(raw, where)

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw = raw
        fields = _object(raw, CONFIG_LIMIT, where)
        self.os = _text(fields.get("os") or "linux", f"{where}: os")
        self.architecture = _text(fields.get("architecture") or "", f"{where}: architecture")
        self.variant = _text(fields.get("variant") or "", f"{where}: variant")
        self.created = _text(fields.get("created") or "", f"{where}: created")
        run = _typed(fields.get("config") or {}, dict, f"{where}: config")
        self.entrypoint = _texts(run.get("Entrypoint"), f"{where}: config.Entrypoint")
        self.cmd = _texts(run.get("Cmd"), f"{where}: config.Cmd")
        self.env = _texts(run.get("Env"), f"{where}: config.Env")
        self.working_dir = _text(run.get("WorkingDir") or "", f"{where}: config.WorkingDir")
        self.user = _text(run.get("User") or "", f"{where}: config.User")
        self.stop_signal = _text(run.get("StopSignal") or "", f"{where}: config.StopSignal")
        self.exposed_ports = _keys(run.get("ExposedPorts"), f"{where}: config.ExposedPorts")
        self.volumes = _keys(run.get("Volumes"), f"{where}: config.Volumes")
        self.labels = _strings(run.get("Labels"), f"{where}: config.Labels")
        rootfs = _typed(fields.get("rootfs"), dict, f"{where}: rootfs")
        if rootfs.get("type", "layers") != "layers":
            raise _bad(f"{where}: rootfs.type", f"{str(rootfs['type'])[:50]!r} is not \"layers\"")
        self.diff_ids = _texts(rootfs.get("diff_ids"), f"{where}: rootfs.diff_ids")
        for n, digest in enumerate(self.diff_ids):
            if not is_digest(digest):
                raise _bad(f"{where}: rootfs.diff_ids[{n}]", f"{digest[:100]!r} is no sha256 digest")
        history = _typed(fields.get("history") or [], list, f"{where}: history")
        self.history: list[dict[str, Any]] = [_typed(item, dict, f"{where}: history[{n}]")
                                              for n, item in enumerate(_counted(history, f"{where}: history"))]

    @property
    def platform(self) -> str:
        """os/architecture[/variant]"""
        return f"{self.os}/{self.architecture}" + (f"/{self.variant}" if self.variant else "")


def host_platform() -> str:
    """What this host runs, as os/arch[/variant]."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return f"linux/{architecture}" + (f"/{variant}" if variant else "")


def choose(index: Index, platform: str = "", where: str = "index") -> Descriptor:
    """The manifest for `platform` (this host's by default): the same variant first, then one without, then any other.

    An arm host also runs older variants than its own, never newer (image-index.md, platform.variant).
    """
    system, architecture, variant, *_ = [*(platform or host_platform()).split("/"), "", ""]
    found: list[tuple[int, Descriptor]] = []
    for item in index.manifests:
        if item.platform:
            its_system, its_architecture, *its_rest = item.platform.split("/")
            if (its_system, its_architecture) != (system, architecture):
                continue
            its = its_rest[0] if its_rest else ""
            if its == variant:
                rank = 0
            elif not its:
                rank = 1
            elif not variant and not platform:
                rank = 3
            elif architecture == "arm" and its < variant:
                rank = 10 - int(its[1:] if its[1:].isdigit() else 0)
            elif (architecture, its, variant) == ("arm64", "v8", ""):
                rank = 2
            else:
                continue
            found.append((rank, item))
        elif len(index.manifests) == 1:
            found.append((9, item))         # an index of one, which does not say for what
    if not found:
        there = sorted({item.platform for item in index.manifests if item.platform} - {"unknown/unknown"})
        raise ImageError(f"{where}: no image for {platform or host_platform()}",
                         f"there are images for {', '.join(there[:20]) or 'no platform'}")
    return min(found, key=lambda pair: pair[0])[1]


def _bad(where: str, why: str, hint: str = "") -> ImageError:
    return ImageError(f"{where}: {why}", hint)


def _object(raw: bytes, limit: int, where: str) -> dict[str, Any]:
    if len(raw) > limit:
        raise _bad(where, f"{len(raw)} bytes are more than {limit}")
    try:
        value = loads(str(raw, "utf-8"))
    except ValueError as error:         # UnicodeDecodeError is one
        raise _bad(where, f"is not JSON: {str(error)[:100]}") from None
    return _typed(value, dict, where)       # type: ignore[no-any-return]


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list" if kind is list else "a string"
        raise _bad(where, f"is not {wanted}" if value is not None else f"is missing: it should be {wanted}")
    return value


def _text(value: Any, where: str) -> str:
    text: str = _typed(value, str, where)
    if "\0" in text:
        raise _bad(where, "holds a NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(where, "is no text: it holds half of a surrogate pair") from None
    return text


def _counted(value: Any, where: str) -> Any:
    if len(value) > _ENTRIES:
        raise _bad(where, f"{len(value)} entries are more than {_ENTRIES}")
    return value


def _texts(value: Any, where: str) -> list[str]:
    items = _counted(_typed(value or [], list, where), where)
    return [_text(item, f"{where}[{n}]") for n, item in enumerate(items)]


def _strings(value: Any, where: str) -> dict[str, str]:
    items = _counted(_typed(value or {}, dict, where), where)
    return {_text(key, where): _text(item, f"{where}[{key[:50]!r}]") for key, item in items.items()}


def _keys(value: Any, where: str) -> list[str]:
    """What stands as the keys of an object, with empty objects as the values."""
    return [_text(key, where) for key in _counted(_typed(value or {}, dict, where), where)]


def _platform(value: Any, where: str) -> str:
    if value is None:
        return ""
    fields = _typed(value, dict, where)
    parts = [_text(fields.get(key) or "", f"{where}.{key}") for key in ("os", "architecture", "variant")]
    for part in parts:
        if "/" in part or len(part) > 50:
            raise _bad(where, f"{part[:50]!r} is no part of a platform")
    if not parts[0] or not parts[1]:
        return ""
    return "/".join(parts if parts[2] else parts[:2])
