"""`fsck`: every kind of damage is found, named, and repaired as far as it can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from framework.images import OCI, Built, busybox_image, docker_archive, tar

from hv.errors import ImageError, StateError
from hv.image.archive import load
from hv.image.fsck import Finding, check
from hv.image.layers import Layers
from hv.image.store import Store

BOX = "docker.io/library/busybox:latest"


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "store"))
    busybox_image(store)
    busybox_image(store, "other", layers=[tar({"x": b"y"})], compression="gzip")
    return store


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [(finding.what, finding.problem) for finding in findings]
    return findings[0]


def flip(path: str, at: int = 700) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_whole_store_and_none_at_all(store, tmp_path):
    Layers(store).ensure(store.resolve("busybox"))
    assert check(store) == [] and check(store, repair=True) == [] and check(Store(str(tmp_path / "none"))) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("harm, says", [
    (os.unlink, "is missing"), (lambda path: os.truncate(path, 100), "has 100 bytes, and should have"),
    (flip, "is not what its digest says"),
    (lambda path: (os.unlink(path), os.symlink("/etc/passwd", path)), "can't be read"),
    (lambda path: (os.unlink(path), os.mkfifo(path)), "bytes, and should have")],
    ids=["missing", "truncated", "flipped", "linked", "fifo"])
def test_a_damaged_layer(store, harm, says):
    image = store.resolve("busybox")
    digest = image.layers[0][0].digest
    harm(store.blob_path(digest))
    found = only(check(store))
    assert found.what == f"blob {digest}" and says in found.problem and found.images == {BOX} and not found.stray
    assert only(check(store, repair=True)).images == {BOX}
    assert not os.path.lexists(store.blob_path(digest))         # so that a pull fetches it
    assert only(check(store)).problem == "is missing"
    assert store.resolve("other").config.cmd == ["sh"]


def test_what_was_repaired_loads_again(store, tmp_path):
    flip(store.blob_path(store.resolve("busybox").layers[0][0].digest))
    archive = docker_archive(tmp_path / "a.tar", Built())
    assert check(store, repair=True)
    load(store, str(archive))
    assert [finding.what for finding in check(store) if not finding.stray] == []


@pytest.mark.parametrize("part", ["id", "digest"])
def test_a_damaged_manifest_or_configuration(store, part):
    digest = getattr(store.resolve("busybox"), part)
    flip(store.blob_path(digest), 20)
    assert f"blob {digest}" in {finding.what for finding in check(store) if BOX in finding.images}
    assert check(store, repair=True)
    assert "is missing" in {finding.problem for finding in check(store) if finding.images == {BOX}}
    with pytest.raises(ImageError, match="is missing"):
        store.resolve("busybox")


def test_a_layer_that_several_images_need_names_them_all(store):
    busybox_image(store, "third", layers=[tar({"x": b"z"})])
    os.unlink(store.blob_path(store.resolve("busybox").layers[0][0].digest))
    assert only(check(store)).images == {BOX, "docker.io/library/third:latest"}


STRAYS = ["layers/x", "blobs/sha256/README", "blobs/sha256/" + "0" * 64, "blobs/md5", "tmp/x", "partial/x", "core",
          "layers/sha256/" + "1" * 64 + "/"]


def test_strays_are_found_and_removed(store):
    for name in STRAYS:
        path = Path(store.root, name)
        path.mkdir() if name.endswith("/") else path.write_text("x")
    Path(store.partial("sha256:" + "3" * 64)).write_text("a download")      # is none
    assert {finding.what for finding in check(store)} == {name.rstrip("/") for name in STRAYS}
    assert all(finding.stray and not finding.images and not finding.repaired for finding in check(store))
    assert all(finding.repaired for finding in check(store, repair=True)) and check(store) == []
    assert os.path.exists(store.partial("sha256:" + "3" * 64))


def test_a_stray_link_is_removed_and_not_followed(store, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    os.symlink(tmp_path / "precious", f"{store.root}/tmp/link")
    os.symlink(tmp_path / "precious", f"{store.root}/blobs/sha256/link")
    assert len(check(store, repair=True)) == 2 and check(store) == [] and (tmp_path / "precious" / "file").exists()


def test_a_damaged_index_is_put_aside_and_the_images_are_found(store):
    ids = {store.load(item).id for _, item in store.entries()}
    Path(store.root, "index.json").write_text('{"schemaVersion": 2, "manifests": [{')
    assert only(check(store)).what == "index.json"
    found = only(check(store, repair=True))
    assert found.repaired and os.path.exists(f"{store.root}/index.json.bad")
    assert {store.load(item).id for _, item in store.entries()} == ids and check(store) == []


def test_a_damaged_layout_file(store):
    for content in ("", "{}", '{"imageLayoutVersion": "9"}'):
        Path(store.root, "oci-layout").write_text(content)
        assert only(check(store)).what == "oci-layout"
    assert only(check(store, repair=True)).repaired and check(store) == []


def test_manifests_that_disagree_about_a_size(store):
    """A layer's size is false in one manifest, whose own digest is right: the blob is not to blame."""
    image = busybox_image(store)
    raw = image.manifest.raw.replace(b'"size": %d' % image.layers[0][0].size, b'"size": 5')
    with store.lock(shared=True):
        store.tag("liar", store.put_bytes(raw, f"{OCI}manifest.v1+json"))
    assert [finding.what for finding in check(store)] == ["image docker.io/library/liar:latest"]
    assert check(store, repair=True) and store.has(image.layers[0][0].digest)


def test_it_waits_for_a_pull_under_way(store, monkeypatch):
    from hv.image import fsck

    monkeypatch.setattr(fsck, "_WAIT", 0.05)
    with store.lock(shared=True), pytest.raises(StateError, match="another command is at work"):
        check(store)
