"""Archives made to harm: refused in one line that names the field; nothing is written, in the store or elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework.images import (
    OCI,
    Built,
    Link,
    Member,
    Special,
    digest,
    docker_members,
    oci_layout,
    oci_members,
    packed,
    tar,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.errors import HvError
from hv.image import inflate, staged
from hv.image.archive import load
from hv.image.store import Store

SMALL = Built([tar({"a": b"1"})])
BIG = Built([tar({"a": os.urandom(200 << 10)})])       # a layer that is kept in a file
LAYER = f"{digest(SMALL.blobs[0])[7:]}/layer.tar"
CONFIG = f"{digest(SMALL.config)[7:]}.json"
BLOB = "blobs/sha256/" + digest(SMALL.blobs[0])[7:]


def refused(tmp_path: Path, data: bytes) -> str:
    """Load it; the one line that refuses it."""
    store = Store(str(tmp_path / "in" / "store"))
    before = _everything(tmp_path)
    (tmp_path / "in" / "a.tar").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "in" / "a.tar").write_bytes(data)
    with pytest.raises(HvError) as caught:
        load(store, str(tmp_path / "in" / "a.tar"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    assert store.entries() == [] and os.listdir(f"{store.root}/tmp") == []
    assert _everything(tmp_path) == before
    return text


def _everything(tmp_path: Path) -> set[str]:
    return {str(path) for path in tmp_path.rglob("*") if "in" not in path.relative_to(tmp_path).parts[:1]}


def docker(members: dict[str, Member] | None = None, built: Built = SMALL, **fields: Any) -> bytes:
    """A docker-archive, with `fields` of its only image and `members` replaced."""
    made = docker_members([built])
    table = json.loads(made.pop("manifest.json"))       # type: ignore[arg-type]
    table[0] |= fields
    made["manifest.json"] = json.dumps(table).encode()
    return tar({**made, **(members or {})})


def oci(change: Callable[[dict[str, Any]], None] | None = None, **members: Member) -> bytes:
    """An oci-archive, its only manifest changed."""
    made: dict[str, Any] = oci_members([SMALL])
    if change:
        name = "blobs/sha256/" + digest(SMALL.manifest)[7:]
        manifest = json.loads(made.pop(name))
        change(manifest)
        raw = json.dumps(manifest).encode()
        index = json.loads(made["index.json"])
        index["manifests"][0] |= {"digest": digest(raw), "size": len(raw)}
        made |= {f"blobs/sha256/{digest(raw)[7:]}": raw, "index.json": json.dumps(index).encode()}
    return tar({**made, **{key.replace("__", "/"): value for key, value in members.items()}})


def test_the_builders_build_what_loads(tmp_path):
    for n, data in enumerate((docker(), oci(), oci(lambda manifest: None))):
        (tmp_path / str(n)).write_bytes(data)
        assert load(Store(str(tmp_path / "store")), str(tmp_path / str(n)))


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "a/../../x", "..", ".", "/"])
def test_a_member_that_leads_outside(tmp_path, name):
    assert "leads outside the archive" in refused(tmp_path, docker({name: b"x"}))


@pytest.mark.parametrize("target", ["/etc/passwd", "../../etc/passwd", "../../../x"])
@pytest.mark.parametrize("hard", [False, True])
def test_a_link_that_leads_outside(tmp_path, target, hard):
    assert "leads outside" in refused(tmp_path, docker({LAYER: Link(target, hard)}))
    assert "leads outside" in refused(tmp_path, docker({"manifest.json": Link(target, hard)}))


def test_links_among_members_are_no_way_out_either(tmp_path):
    assert "is a link that leads nowhere" in refused(tmp_path, docker({LAYER: Link("layer.tar")}))
    loop = {"p/x": Link("../q/x"), "q/x": Link("../p/x")}
    assert "is a link that leads nowhere" in refused(tmp_path, docker({**loop, LAYER: Link("../p/x")}))
    assert "is not in the archive" in refused(tmp_path, docker({LAYER: Link("missing")}))
    assert "neither manifest.json nor index.json" in refused(tmp_path, docker({"manifest.json": Link("missing")}))


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "a/../../b", ""])
def test_a_table_that_names_what_is_outside(tmp_path, path):
    assert "manifest.json: [0].Config: " in refused(tmp_path, docker(Config=path))
    assert "manifest.json: [0].Layers" in refused(tmp_path, docker(Layers=[path]))


@pytest.mark.parametrize("fields, says", [
    ({"Config": None}, "[0].Config: is no string"), ({"Config": 5}, "[0].Config: is no string"),
    ({"Config": "no.json"}, "[0].Config: no.json is not in the archive"),
    ({"Config": LAYER}, "is not JSON"), ({"Layers": ["no"]}, "[0].Layers: no is not in the archive"),
    ({"Layers": "x"}, "[0].Layers: is not a list of strings"),
    ({"Layers": [1]}, "[0].Layers: is not a list of strings"),
    ({"Layers": [LAYER, LAYER]}, "[0].Layers: 2 layers, and 1 in rootfs.diff_ids"),
    ({"Layers": [CONFIG]}, "is not the layer sha256:"), ({"Layers": []}, "0 layers, and 1"),
    ({"RepoTags": ["Bad Name"]}, "[0].RepoTags: image name 'Bad Name'"), ({"RepoTags": "x"}, "[0].RepoTags"),
    ({"RepoTags": ["../../x"]}, "[0].RepoTags: image name"), ({"RepoTags": ["x"] * 1001}, "[0].RepoTags")])
def test_a_bad_field_of_the_table(tmp_path, fields, says):
    assert says in refused(tmp_path, docker(**fields))


@pytest.mark.parametrize("content, says", [
    (b"", "manifest.json: is not JSON"), (b"{}", "manifest.json: is not a list of objects"), (b"[]", "is not a list"),
    (b"[1]", "is not a list of objects"), (b"\xff\xfe", "is not JSON"), (b"[" * 200_000, "is not JSON"),
    (b" " * (5 << 20) + b"[]", "bytes are more than"), (b"[" + b"{}," * 1001 + b"{}]", "1002 images are more than")])
def test_a_bad_table(tmp_path, content, says):
    assert says in refused(tmp_path, docker({"manifest.json": content}))


def test_a_configuration_that_is_huge_or_bad(tmp_path):
    assert "bytes are more than" in refused(tmp_path, docker({CONFIG: b" " * (9 << 20)}))
    assert "rootfs: is missing" in refused(tmp_path, docker({CONFIG: b"{}"}))


def test_a_name_with_two_contents(tmp_path):
    made = docker_members([SMALL])
    for name in ("manifest.json", CONFIG, LAYER):
        assert f"{name}: stands in it twice" in refused(tmp_path, tar([*made.items(), (name, b"[]")]))
        assert f"{name}: stands in it twice" in refused(tmp_path, tar([*made.items(), ("./" + name, Link("x"))]))
        assert f"{name}: stands in it twice" in refused(tmp_path, tar([(name, Link("x")), *made.items()]))
    big = docker_members([BIG])
    name = f"{digest(BIG.blobs[0])[7:]}/layer.tar"
    assert "stands in it twice" in refused(tmp_path, tar([*big.items(), (name, os.urandom(200 << 10))]))
    same = tmp_path / "same.tar"
    same.write_bytes(tar([*big.items(), (name, BIG.blobs[0])]))
    assert load(Store(str(tmp_path / "store")), str(same))      # the same twice does no harm


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_special_files(tmp_path, kind):
    assert "is neither a file, a folder nor a link" in refused(tmp_path, docker({LAYER: Special({"type": kind})}))


def test_a_sparse_member(tmp_path):
    fields = {"pax_headers": {"GNU.sparse.map": "1099511627776,4", "GNU.sparse.size": "1099511627780"}}
    assert "is neither a file" in refused(tmp_path, docker({LAYER: Special(fields, b"data")}))


def test_a_size_that_lies(tmp_path):
    """The header of the last member says more than follows; or less than follows, so that data reads as a header."""
    data = bytearray(docker())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as file:
        info = file.getmember("manifest.json")
    for size in (1 << 30, 1 << 40, 8 ** 11 - 1):
        changed = bytearray(data)
        changed[info.offset + 124:info.offset + 136] = b"%011o\0" % size
        changed[info.offset + 148:info.offset + 156] = b" " * 8
        total = sum(changed[info.offset:info.offset + 512])
        changed[info.offset + 148:info.offset + 156] = b"%06o\0 " % total
        text = refused(tmp_path, bytes(changed))
        assert "bytes are more than" in text or "ends within" in text


@pytest.mark.parametrize("part", [0.001, 0.1, 0.3, 0.6, 0.9, 0.99, 1])
def test_an_archive_that_ends_early(tmp_path, part):
    with tarfile.open(fileobj=io.BytesIO(docker())) as file:
        info = file.getmember("manifest.json")
    assert refused(tmp_path, docker()[:int((info.offset_data + info.size - 1) * part)])


def test_what_is_no_archive(tmp_path):
    for data in (b"", b"\0" * 512, b"hello", os.urandom(5000), tar({"etc/passwd": b"root"}), tar({}), b"\x1f\x8b",
                 gzip.compress(b"not a tar"), gzip.compress(docker())[:-20], b"\x28\xb5\x2f\xfd\0\0"):
        assert refused(tmp_path, data)
    with pytest.raises(HvError, match="No such file"):
        load(Store(str(tmp_path / "store")), str(tmp_path / "missing"))


def test_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(inflate, "_FREE", 1 << 20)      # instead of the first GiB
    bomb = gzip.compress(docker({"zeros": bytes(64 << 20)}))
    assert len(bomb) < 200 << 10
    assert "of it became more than" in refused(tmp_path, bomb)


def test_names_that_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "_NAMES", 50_000)
    assert "the names of its members take more than" in refused(
        tmp_path, docker({f"{n}{'x' * 1000}": b"" for n in range(60)}))


def test_a_layer_compressed_as_no_layer_is(tmp_path):
    import bz2

    built = Built([tar({"a": b"1"})])
    blob = bz2.compress(built.layers[0])
    assert "compressed with bzip2" in refused(tmp_path, docker({LAYER: blob}, built))


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to
    return change


@pytest.mark.parametrize("change, says", [
    (_set("layers", 0, "size", to=5), "layers[0]: "), (_set("layers", 0, "size", to=1 << 60), "layers[0]: "),
    (_set("config", "size", to=1), "config: "), (_set("layers", 0, "digest", to="sha256:" + "0" * 64), "layers[0]: "),
    (_set("config", "digest", to="sha256:../../x"), "config.digest"), (_set("layers", to=[]), "rootfs.diff_ids"),
    (_set("config", "digest", to=digest(SMALL.blobs[0])), "config"), (_set("schemaVersion", to=1), "schemaVersion"),
    (_set("layers", to=5), "layers: is not a list")])
def test_a_bad_field_of_a_manifest(tmp_path, change, says):
    assert says in refused(tmp_path, oci(change))


def test_a_blob_that_is_not_its_digest(tmp_path):
    blob = tar({"a": b"2"})
    assert f"{BLOB} has the digest {digest(blob)}" in refused(tmp_path, oci(**{BLOB.replace("/", "__"): blob}))


@pytest.mark.parametrize("index, says", [
    (b"", "index.json: is not JSON"), (b'{"schemaVersion":2,"manifests":[]}', "index.json: has no image"),
    (SMALL.manifest, "index.json: is no index"), (b'{"schemaVersion":2,"manifests":[{}]}', "index.json: manifests[0]"),
    (b" " * (5 << 20), "index.json: 5242880 bytes are more than")])
def test_a_bad_index(tmp_path, index, says):
    assert says in refused(tmp_path, oci(**{"index.json": index}))


def test_an_index_that_leads_to_itself_or_too_deep(tmp_path):
    inner = json.dumps({"schemaVersion": 2, "manifests": [SMALL.descriptor()]}).encode()
    data = inner
    members: dict[str, Member] = {}
    for _ in range(1500):
        members[f"blobs__sha256__{digest(data)[7:]}"] = data
        data = json.dumps({"schemaVersion": 2, "manifests": [
            {"mediaType": f"{OCI}index.v1+json", "digest": digest(data), "size": len(data)}]}).encode()
    assert "an index within an index is not taken" in refused(tmp_path, oci(**members, **{"index.json": data}))


def test_a_folder_with_links_and_pipes_in_it(tmp_path):
    (tmp_path / "secret").write_bytes(SMALL.blobs[0])
    for make in (lambda path: path.symlink_to(tmp_path / "secret"), os.mkfifo, os.mkdir):
        folder = oci_layout(tmp_path / make.__name__, SMALL)
        (folder / BLOB).unlink()
        make(folder / BLOB)
        store = Store(str(tmp_path / "store"))
        with pytest.raises(HvError):
            load(store, str(folder))
        assert store.entries() == []
    with pytest.raises(HvError, match="blobs/sha256/: No such file"):
        load(Store(str(tmp_path / "store")), str(tmp_path))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_changed_it_loads_or_is_refused(tmp_path, data):
    """Bytes of good archives changed at random: an HvError in one line, or an image that is whole."""
    good = data.draw(st.sampled_from([docker(), oci(), packed(docker(), "gzip"), packed(oci(), "zstd")]))
    made = bytearray(good)
    for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
        made[at] = data.draw(st.integers(0, 255))
    path, store = tmp_path / "a.tar", Store(str(tmp_path / "store"))
    path.write_bytes(bytes(made))
    try:
        for item in load(store, str(path)):
            for name in item.names or [item.id]:
                store.resolve(name)
    except HvError as error:
        assert "\n" not in str(error)
    assert os.listdir(f"{store.root}/tmp") == []


