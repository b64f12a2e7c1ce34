"""Images made of the host's busybox: in a store, as archives, as layouts. No network; of hv only Store writes here.

    tree = tar({"bin/": None, "bin/sh": Link("busybox"), "etc/motd": b"hi", ".wh.old": b""})    a layer
    busybox_image(store, "busybox:1", layers=[tree], compression="gzip")                          in a Store, resolved
    docker_archive(path, [Built(...)]), oci_archive(path, ...), oci_layout(folder, ...)           files of other tools
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard
from framework.bundle import APPLETS, BUSYBOX

from hv.image.image import Image
from hv.image.store import Store

OCI = "application/vnd.oci.image."
SUFFIX = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Link:
    """A symbolic link; `hard` makes it a hard link to another member."""

    target: str
    hard: bool = False


@dataclass
class Special:
    """Any member: what is set here is set on the tarfile.TarInfo."""

    fields: dict[str, Any]
    content: bytes = b""


Member = bytes | Link | Special | None


def tar(members: Mapping[str, Member] | Iterable[tuple[str, Member]], mode: int = 0o755) -> bytes:
    """A tar archive: bytes are files, None (a name that ends in "/") folders, Link links. A list may repeat names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, what in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name.rstrip("/") if name.endswith("/") else name)
            info.mode = mode
            content = b""
            if what is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(what, Link):
                info.type = tarfile.LNKTYPE if what.hard else tarfile.SYMTYPE
                info.linkname = what.target
            elif isinstance(what, Special):
                content = what.content
                info.size = len(content)
                for key, value in what.fields.items():
                    setattr(info, key, value)
            else:
                content, info.size = what, len(what)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def busybox_layer() -> bytes:
    """The root file system that framework.bundle makes, as a layer."""
    members: dict[str, Member] = {f"{name}/": None for name in ("bin", "etc", "proc", "sys", "dev", "root")}
    members["tmp/"] = Special({"type": tarfile.DIRTYPE, "mode": 0o1777})
    members["bin/busybox"] = Path(BUSYBOX).read_bytes()
    members |= {f"bin/{name}": Link("busybox") for name in APPLETS}
    members["etc/passwd"] = b"root:x:0:0::/root:/bin/sh\nsomebody:x:1000:1000::/tmp:/bin/sh\n"
    members["etc/group"] = b"root:x:0:\nsomebody:x:1000:\n"
    return tar(members)


def digest(data: bytes) -> str:
    """sha256:..."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def packed(layer: bytes, compression: str) -> bytes:
    """A layer compressed: none, gzip or zstd."""
    if compression == "gzip":
        return gzip.compress(layer, 1, mtime=0)
    return zstandard.compress(layer, 1) if compression == "zstd" else layer


@dataclass
class Built:
    """An image in memory: its layers (plain tar archives, the lowest first) and what its configuration says."""

    layers: list[bytes] = field(default_factory=lambda: [busybox_layer()])
    names: list[str] = field(default_factory=lambda: ["docker.io/library/busybox:latest"])
    run: dict[str, Any] = field(default_factory=lambda: {"Cmd": ["sh"], "Env": [PATH]})
    compression: str = "none"
    architecture: str = "amd64"
    created: str = "2024-05-06T07:08:09Z"

    @property
    def blobs(self) -> list[bytes]:
        """The layers as they are kept."""
        return [packed(layer, self.compression) for layer in self.layers]

    @property
    def config(self) -> bytes:
        """The configuration as JSON."""
        history = [{"created": self.created, "created_by": f"/bin/sh -c #(nop) ADD layer {n}"}
                   for n in range(len(self.layers))]
        return json.dumps({
            "architecture": self.architecture, "os": "linux", "created": self.created, "config": self.run,
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in self.layers]},
            "history": [*history, {"created": self.created, "created_by": "CMD", "empty_layer": True}]}).encode()

    @property
    def manifest(self) -> bytes:
        """The manifest as JSON."""
        layers = [{"mediaType": f"{OCI}layer.v1.tar{SUFFIX[self.compression]}", "digest": digest(blob),
                   "size": len(blob)} for blob in self.blobs]
        return json.dumps({"schemaVersion": 2, "mediaType": f"{OCI}manifest.v1+json", "config": {
            "mediaType": f"{OCI}config.v1+json", "digest": digest(self.config), "size": len(self.config)},
            "layers": layers}).encode()

    def descriptor(self, name: str = "") -> dict[str, Any]:
        """Of the manifest, as an index has it."""
        made: dict[str, Any] = {"mediaType": f"{OCI}manifest.v1+json", "digest": digest(self.manifest),
                                "size": len(self.manifest),
                                "platform": {"os": "linux", "architecture": self.architecture}}
        return made | ({"annotations": {"org.opencontainers.image.ref.name": name}} if name else {})


def busybox_image(store: Store | str | Path, name: str = "busybox", layers: Iterable[bytes] = (),
                  compression: str = "none", **run: Any) -> Image:
    """An image of busybox and of `layers` (see `tar`) on top, in the store. `run`: Cmd, Entrypoint, Env, User, ..."""
    into = store if isinstance(store, Store) else Store(str(store))
    built = Built([busybox_layer(), *layers], run={"Cmd": ["sh"], "Env": [PATH]} | run, compression=compression)
    with into.lock(shared=True):
        for blob in [*built.blobs, built.config]:
            into.put_bytes(blob)
        into.tag(name, into.put_bytes(built.manifest, f"{OCI}manifest.v1+json"))
    return into.resolve(name)


def docker_members(images: Iterable[Built]) -> dict[str, Member]:
    """What `docker save` writes: a folder per layer, manifest.json last."""
    members: dict[str, Member] = {}
    manifest = []
    for built in images:
        paths = []
        for blob in built.blobs:
            folder = digest(blob)[7:]
            members |= {f"{folder}/": None, f"{folder}/VERSION": b"1.0", f"{folder}/layer.tar": blob}
            paths.append(f"{folder}/layer.tar")
        config = f"{digest(built.config)[7:]}.json"
        members[config] = built.config
        manifest.append({"Config": config, "RepoTags": built.names or None, "Layers": paths})
    return members | {"manifest.json": json.dumps(manifest).encode()}


def oci_members(images: Iterable[Built]) -> dict[str, Member]:
    """An OCI image layout."""
    members: dict[str, Member] = {"blobs/": None, "blobs/sha256/": None}
    manifests = []
    for built in images:
        for blob in [*built.blobs, built.config, built.manifest]:
            members[f"blobs/sha256/{digest(blob)[7:]}"] = blob
        manifests += [built.descriptor(name) for name in built.names or [""]]
    return members | {"index.json": json.dumps({"schemaVersion": 2, "manifests": manifests}).encode(),
                      "oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}


def docker_archive(path: Path, *images: Built) -> Path:
    """A file as `docker save` writes it."""
    path.write_bytes(tar(docker_members(images)))
    return path


def oci_archive(path: Path, *images: Built) -> Path:
    """A file as `podman save --format oci-archive` writes it."""
    path.write_bytes(tar(oci_members(images)))
    return path


def oci_layout(folder: Path, *images: Built) -> Path:
    """A folder as `skopeo copy ... oci:FOLDER` writes it."""
    for name, content in oci_members(images).items():
        if isinstance(content, bytes):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder
