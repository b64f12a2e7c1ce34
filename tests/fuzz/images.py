"""Targets of images: manifests, configurations and names; archives, which are loaded, resolved and exported."""

from __future__ import annotations

import json
import os
import tempfile

from framework.images import OCI, Built, digest, oci_members

from fuzz.engine import Target
from hv.errors import HvError
from hv.image.archive import load
from hv.image.archive_export import export
from hv.image.archive_write import Output
from hv.image.fsck import check
from hv.image.media import ImageConfig, parse_manifest
from hv.image.reference import Reference
from hv.image.store import Store
from hv.image.tarwrite import END, header, padding

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None      # a store is made for each input


def packed(members: dict[str, bytes]) -> bytes:
    """A tar archive without the padding of 10 KiB."""
    return b"".join(header(name.encode(), len(data)) + data + padding(len(data))
                    for name, data in members.items()) + END


LOWER = packed({"d/f": b"1"}) + header(b"d/g", kind=b"1", link=b"d/f")
BUILT = Built([LOWER, packed({".wh.d": b""})], ["a:1"])
DOCKER = packed({"c.json": BUILT.config, "0": BUILT.layers[0], "1": BUILT.layers[1], "manifest.json": json.dumps(
    [{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["0", "1"]}]).encode()})
SMALL = Built([packed({"x": b"1"})], ["a:1"])
LAYOUT = packed({name: data for name, data in oci_members([SMALL]).items() if isinstance(data, bytes)})
INDEX = json.dumps({"schemaVersion": 2, "mediaType": f"{OCI}index.v1+json", "manifests": [
    SMALL.descriptor("a:1"), SMALL.descriptor() | {"digest": digest(b"")}]}).encode()


def run_manifest(data: bytes) -> None:
    """Anything as a manifest, an index, a configuration, a name."""
    for parse in (parse_manifest, ImageConfig.parse):
        try:
            parse(data)
        except HvError as error:
            assert "\n" not in str(error)
    try:
        reference = Reference.parse(str(data, "utf-8", "replace"))
    except HvError:
        return
    assert Reference.parse(str(reference)) == reference


def run_archive(data: bytes) -> None:
    """Anything as an archive: refused and nothing left, or images that are whole and can be exported."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        store = Store(f"{folder}/store")
        with open(f"{folder}/a", "wb") as file:
            file.write(data)
        try:
            loaded = load(store, f"{folder}/a")
        except HvError as error:
            assert "\n" not in str(error)
            assert not store.entries() and not os.listdir(f"{store.root}/tmp")
            return
        assert not check(store)
        for item in loaded:
            image = store.resolve(item.names[0] if item.names else item.id)
            try:
                with Output(f"{folder}/out") as output:
                    export(store, image, output)
            except HvError as error:
                assert "\n" not in str(error)
                assert sorted(os.listdir(folder)) == ["a", "store"]


TARGETS = {"manifest": Target(run_manifest, (SMALL.manifest, SMALL.config, BUILT.config, INDEX, b"quay.io/a/b:1")),
           "archive": Target(run_archive, (DOCKER, LAYOUT))}
