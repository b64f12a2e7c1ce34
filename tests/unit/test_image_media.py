"""Manifests, indexes, configurations: what is read from good ones, which field of a bad one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ImageError
from hv.image.media import (
    DOCKER_MANIFEST,
    INDEX,
    LAYER,
    MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    choose,
    host_platform,
    parse_manifest,
)

D = "sha256:" + "ab" * 32


def descriptor(**fields: Any) -> dict[str, Any]:
    return {"mediaType": LAYER, "digest": D, "size": 5} | fields


def manifest(**fields: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "config": descriptor(), "layers": [descriptor()]} | fields).encode()


def config(**fields: Any) -> bytes:
    return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [D]}}
                      | fields).encode()


def index(*platforms: str) -> Index:
    made = []
    for n, text in enumerate(platforms):
        system, architecture, *variant = text.split("/")
        made.append(descriptor(size=n, platform={"os": system, "architecture": architecture}
                               | ({"variant": variant[0]} if variant else {})))
    found = parse_manifest(json.dumps({"schemaVersion": 2, "manifests": made}).encode())
    assert isinstance(found, Index)
    return found


def test_a_manifest_and_its_fields():
    raw = manifest(mediaType=DOCKER_MANIFEST, annotations={"a": "b"})
    found = parse_manifest(raw)
    assert isinstance(found, Manifest)
    assert (found.raw, found.media_type, found.annotations) == (raw, DOCKER_MANIFEST, {"a": "b"})
    assert found.config == Descriptor(LAYER, D, 5) and found.layers == [Descriptor(LAYER, D, 5)]
    assert parse_manifest(manifest()).media_type == MANIFEST


@pytest.mark.parametrize("raw, named", [
    (b"", "manifest: is not JSON"), (b"[]", "manifest: is not an object"), (b"\xff", "is not JSON"),
    (b"{" * 100_000, "is not JSON"), (b'{"a":' * 100_000, "is not JSON"), (b" " * (5 << 20), "bytes are more than"),
    (manifest(schemaVersion=1), "schemaVersion"), (manifest(schemaVersion=True), "schemaVersion"),
    (manifest(schemaVersion="2"), "schemaVersion"), (manifest(mediaType="text/html"), "mediaType"),
    (manifest(mediaType=5), "mediaType"), (manifest(mediaType=INDEX), "mediaType"),
    (manifest(manifests=[]), "manifests"),
    (manifest(config=None), "config: is missing"), (manifest(config=[]), "config: is not an object"),
    (manifest(config=descriptor(size=100 << 20)), "config.size"), (manifest(layers={}), "layers: is not a list"),
    (manifest(layers=[descriptor()] * 501), "layers: 501"),
    (manifest(layers=[descriptor(), descriptor(size=-1)]), "layers[1].size"),
    (manifest(layers=[descriptor(size=1.5)]), "layers[0].size"),
    (manifest(layers=[descriptor(size=True)]), "layers[0].size"),
    (manifest(layers=[descriptor(size=1 << 63)]), "layers[0].size"),
    (manifest(layers=[descriptor(digest="sha256:../../etc")]), "layers[0].digest"),
    (manifest(layers=[descriptor(digest="sha512:" + "ab" * 64)]), "layers[0].digest"),
    (manifest(layers=[descriptor(digest=None)]), "layers[0].digest"),
    (manifest(layers=[descriptor(mediaType="a\0b")]), "layers[0].mediaType"),
    (manifest(layers=[descriptor(annotations={"a": 1})]), "layers[0].annotations"),
    (b'{"schemaVersion":2,"manifests":[{"digest":"' + D.encode() + b'","size":1,"platform":{"os":"a/b"}}]}',
     "platform"),
    (b'{"schemaVersion":2,"manifests":' + b"[" * 60_000, "is not JSON")])
def test_a_bad_manifest_is_refused_with_its_field(raw, named):
    with pytest.raises(ImageError, match=r"^manifest") as caught:
        parse_manifest(raw)
    assert named in str(caught.value) and len(str(caught.value)) < 400


def test_a_configuration_and_its_fields():
    found = ImageConfig.parse(config(created="2024-01-01T00:00:00Z", variant="v3", config={
        "Entrypoint": ["/e"], "Cmd": ["c"], "Env": ["A=b"], "WorkingDir": "/w", "User": "u:g", "StopSignal": "SIGINT",
        "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/v": {}}, "Labels": {"l": "m"}}, history=[{"created_by": "x"}]))
    assert (found.entrypoint, found.cmd, found.env) == (["/e"], ["c"], ["A=b"])
    assert (found.working_dir, found.user, found.stop_signal) == ("/w", "u:g", "SIGINT")
    assert (found.exposed_ports, found.volumes, found.labels) == (["80/tcp"], ["/v"], {"l": "m"})
    assert (found.platform, found.diff_ids, found.history) == ("linux/amd64/v3", [D], [{"created_by": "x"}])


def test_null_stands_for_nothing():
    nothing = {"Entrypoint": None, "Cmd": None, "Env": None, "Labels": None}
    found = ImageConfig.parse(config(config=nothing, history=None))
    assert (found.entrypoint, found.cmd, found.env, found.labels, found.history) == ([], [], [], {}, [])
    assert ImageConfig.parse(config(config=None)).cmd == ImageConfig.parse(config(config=[])).cmd == []


@pytest.mark.parametrize("raw, named", [
    (config(config=5), "config: config"), (config(config={"Cmd": "sh"}), "config.Cmd"),
    (config(config={"Cmd": [1]}), "config.Cmd[0]"), (config(config={"Env": ["A=\0"]}), "config.Env[0]"),
    (config(config={"Env": ["\ud800"]}), "config.Env[0]"), (config(config={"User": 0.5}), "config.User"),
    (config(config={"Volumes": ["/v"]}), "config.Volumes"), (config(config={"Labels": {"a": []}}), "config.Labels"),
    (config(rootfs=None), "rootfs"), (config(rootfs={"type": "tar"}), "rootfs.type"),
    (config(rootfs={"type": "layers", "diff_ids": ["x"]}), "rootfs.diff_ids[0]"), (config(history=[1]), "history[0]"),
    (config(history=[{}] * 10_001), "history"), (config(os=5), "os"), (b" " * (9 << 20), "bytes are more than")])
def test_a_bad_configuration_is_refused_with_its_field(raw, named):
    with pytest.raises(ImageError, match=r"^config") as caught:
        ImageConfig.parse(raw)
    assert named in str(caught.value) and len(str(caught.value)) < 400


ALL = ("linux/amd64", "linux/arm/v5", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "windows/amd64")


@pytest.mark.parametrize("wanted, given, got", [
    ("linux/amd64", ALL, "linux/amd64"), ("linux/arm/v7", ALL, "linux/arm/v7"), ("linux/arm64", ALL, "linux/arm64/v8"),
    ("linux/arm/v7", ALL[:3], "linux/arm/v6"), ("linux/arm/v6", ("linux/arm/v7",), None), ("linux/s390x", ALL, None),
    ("windows/amd64", ALL, "windows/amd64"), ("linux/amd64", ("linux/amd64/v3", "linux/amd64"), "linux/amd64"),
    ("linux/amd64", ("linux/amd64/v3",), None), ("linux/arm64/v8", ("linux/arm64",), "linux/arm64")])
def test_the_manifest_for_a_platform(wanted, given, got):
    if got is None:
        with pytest.raises(ImageError, match=f"no image for {wanted}") as caught:
            choose(index(*given), wanted)
        assert given[0] in caught.value.hint
    else:
        assert choose(index(*given), wanted).platform == got


def test_this_hosts_platform_is_chosen_by_default():
    assert choose(index("linux/s390x", host_platform(), "linux/ppc64le")).platform == host_platform()


KEYS = st.sampled_from(["config", "layers", "manifests", "digest", "size", "mediaType", "platform", "os", "rootfs",
                        "diff_ids", "Env", "Cmd", "history", "Labels", "annotations"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(D),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=20)


@given(st.dictionaries(st.sampled_from(["schemaVersion", "config", "layers", "manifests", "mediaType", "rootfs", "os"]),
                       JSON | st.just(2), max_size=6))
def test_whatever_is_in_it_is_read_or_refused(value):
    raw = json.dumps(value).encode()
    for parse in (parse_manifest, ImageConfig.parse):
        try:
            parse(raw)
        except ImageError:
            pass
