"""Archives of images: what other tools write is loaded, what is saved loads again, byte for byte."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import zstandard
from framework.images import (
    OCI,
    Built,
    Link,
    busybox_image,
    digest,
    docker_archive,
    docker_members,
    oci_archive,
    oci_layout,
    oci_members,
    tar,
)
from framework.run import ROOT

from hv.errors import ConfigError, ImageError
from hv.image.archive import load
from hv.image.archive_write import Output, save
from hv.image.fsck import check
from hv.image.prune import sweep
from hv.image.store import Store
from hv.image.tarwrite import END, header, padding

BOX = "docker.io/library/busybox:latest"
OTHER = Built([tar({"other": b"1"}), tar({".wh.other": b""})], ["quay.io/a/b:1", "a/b:2"], compression="gzip")
ZSTD = Built([tar({"z": b"z" * 5000})], ["z:1"], compression="zstd")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def loaded(store: Store, path: Path) -> set[str]:
    """The names that were loaded; the store is whole and holds nothing beside them."""
    found = load(store, str(path))
    assert not [(finding.what, finding.problem) for finding in check(store)]
    return {name for item in found for name in item.names}


@pytest.mark.parametrize("write", [docker_archive, oci_archive, oci_layout])
def test_what_others_write_is_loaded(store, tmp_path, write):
    names = loaded(store, write(tmp_path / "there", Built(), OTHER, ZSTD))
    assert names == {BOX, "quay.io/a/b:1", "docker.io/a/b:2", "docker.io/library/z:1"} == set(store.names())
    for built in (Built(), OTHER, ZSTD):
        image = store.resolve(built.names[0])
        assert image.digest == digest(built.manifest) or write is docker_archive    # which has no manifests
        assert image.id == digest(built.config) and image.config.cmd == built.run["Cmd"]
        assert [layer.digest for layer, _ in image.layers] == [digest(blob) for blob in built.blobs]
        assert [diff for _, diff in image.layers] == [digest(layer) for layer in built.layers]
        suffix = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}[built.compression]
        assert {layer.media_type for layer, _ in image.layers} == {f"{OCI}layer.v1.tar{suffix}"}


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress,
                                  lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:])],
                         ids=["plain", "gzip", "zstd", "gzip members"])
def test_from_standard_input_plain_or_compressed(store, tmp_path, pack, monkeypatch):
    data = pack(docker_archive(tmp_path / "a.tar", Built()).read_bytes())
    reader, writer = os.pipe()
    feeder = threading.Thread(target=lambda: (os.write(writer, data[:100]), _all(writer, data[100:])))
    saved = os.dup(0)
    try:
        os.dup2(reader, 0)
        feeder.start()
        assert loaded(store, Path("-")) == {BOX}
    finally:
        os.dup2(saved, 0)
        for fd in (saved, reader):
            os.close(fd)
        feeder.join(30)


def _all(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)


@pytest.mark.parametrize("pack, named", [(bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_what_is_not_taken_is_said_by_name(store, tmp_path, pack, named):
    path = tmp_path / "a"
    path.write_bytes(pack(docker_archive(tmp_path / "a.tar", Built()).read_bytes()))
    with pytest.raises(ImageError, match=f"is compressed with {named}"):
        load(store, str(path))


def test_dockers_links_among_layers_are_followed(store, tmp_path):
    """docker before 25 writes a layer that two images share once, and links; skopeo links from layer folders too."""
    members = docker_members([Built()])
    folder = digest(Built().blobs[0])[7:]
    content = members[f"{folder}/layer.tar"]
    assert isinstance(content, bytes)
    members["0" * 64 + "/layer.tar"] = content
    members[f"{folder}/layer.tar"] = Link(f"../{'0' * 64}/layer.tar")
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert loaded(store, tmp_path / "a.tar") == {BOX}


def test_docker_25_writes_both_tables(store, tmp_path):
    members = oci_members([Built(names=["latest"])])
    members["manifest.json"] = json.dumps([{"Config": f"blobs/sha256/{digest(Built().config)[7:]}", "RepoTags": [BOX],
                                            "Layers": [f"blobs/sha256/{digest(Built().blobs[0])[7:]}"]}]).encode()
    index = json.loads(members["index.json"])       # type: ignore[arg-type]
    index["manifests"][0]["annotations"]["io.containerd.image.name"] = BOX
    members["index.json"] = json.dumps(index).encode()
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert loaded(store, tmp_path / "a.tar") == {BOX}
    assert store.resolve(BOX).digest == digest(Built().manifest)
    del index["manifests"][0]["annotations"]        # and then the names of manifest.json count
    members["index.json"] = json.dumps(index).encode()
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert loaded(store, tmp_path / "a.tar") == {BOX}


def test_a_tag_alone_is_a_name_on_localhost_as_podman_has_it(store, tmp_path):
    assert loaded(store, oci_archive(tmp_path / "a.tar", Built(names=["v1"]))) == {"localhost/v1:latest"}


def test_an_image_without_a_name_is_there_by_its_id(store, tmp_path):
    for write in (docker_archive, oci_archive):
        assert loaded(store, write(tmp_path / "a.tar", Built(names=[]))) == set()
        assert store.resolve(digest(Built().config)[7:20]).name == ""


def test_an_index_of_several_platforms_is_kept_whole(store, tmp_path):
    arm, amd = Built([tar({"arm": b""})], architecture="arm64"), Built([tar({"amd": b""})])
    members = oci_members([arm, amd])
    raw = json.dumps({"schemaVersion": 2, "mediaType": f"{OCI}index.v1+json", "manifests": [
        arm.descriptor(), amd.descriptor(), amd.descriptor() | {
            "digest": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "s390x"}}]}).encode()
    members[f"blobs/sha256/{digest(raw)[7:]}"] = raw
    members["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [
        {"mediaType": f"{OCI}index.v1+json", "digest": digest(raw), "size": len(raw),
         "annotations": {"org.opencontainers.image.ref.name": "both:1"}}]}).encode()
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert loaded(store, tmp_path / "a.tar") == {"docker.io/library/both:1"}
    assert store.resolve("both:1", "linux/arm64").id == digest(arm.config)
    assert store.resolve("both:1", "linux/amd64").id == digest(amd.config)


def test_loading_again_changes_nothing(store, tmp_path):
    archive = docker_archive(tmp_path / "a.tar", Built(), OTHER)
    loaded(store, archive)
    before = {name: os.stat(f"{store.root}/blobs/sha256/{name}").st_ino
              for name in os.listdir(f"{store.root}/blobs/sha256")}
    loaded(store, archive)
    loaded(store, oci_archive(tmp_path / "b.tar", Built(), OTHER))
    after = {name: os.stat(f"{store.root}/blobs/sha256/{name}").st_ino
             for name in os.listdir(f"{store.root}/blobs/sha256")}
    assert before.items() <= after.items()      # the OCI manifests are other bytes


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_what_is_saved_loads_again(store, tmp_path, form):
    load(store, str(docker_archive(tmp_path / "a.tar", Built(), OTHER, ZSTD)))
    for path in ("1.tar", "2.tar"):
        with Output(str(tmp_path / path)) as output:
            save(store, ["busybox", "a/b:2", "z:1", store.resolve("a/b:2").id], output, form)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as file:
        names = file.getnames()
    assert len(names) == len(set(names)) and sorted(os.listdir(tmp_path)) == ["1.tar", "2.tar", "a.tar", "store"]
    again = Store(str(tmp_path / "again"))
    assert loaded(again, tmp_path / "1.tar") == {BOX, "docker.io/a/b:2", "docker.io/library/z:1"}
    for name in again.names():
        assert again.resolve(name).id == store.resolve(name).id
        assert again.resolve(name).digest == store.resolve(name).digest


def test_damage_in_the_store_does_not_travel(store, tmp_path):
    image = busybox_image(store)
    path = Path(store.blob_path(image.layers[0][0].digest))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="is not what its digest says"), Output(str(tmp_path / "a.tar")) as output:
        save(store, ["busybox"], output)
    assert os.listdir(tmp_path) == ["store"]
    path.write_bytes(content[:-1])
    with pytest.raises(ImageError, match=f"is not {len(content)} bytes long"), \
            Output(str(tmp_path / "a.tar")) as output:
        save(store, ["busybox"], output)


def test_outputs_that_cant_be_written(store, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Output(str(tmp_path / "no" / "such"))
    busybox_image(store)
    with pytest.raises(ImageError, match="/dev/full: No space left"), Output("/dev/full") as output:
        save(store, ["busybox"], output)
    assert os.path.exists("/dev/full")


SAVE = """
import sys
sys.path.insert(0, sys.argv[1])
from hv.image.archive_write import Output, save
from hv.image.store import Store
with Output(sys.argv[3]) as output:
    save(Store(sys.argv[2]), ["busybox"], output)
"""


@pytest.mark.skipif(not shutil.which("strace"), reason="not installed: strace")
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_killed_save_leaves_nothing(store, tmp_path, at):
    busybox_image(store)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.tar").write_text("what was there")
    command = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=write", "-e", f"inject=write:signal=KILL:when={at}",
               sys.executable, "-ISEB", "-c", SAVE, str(ROOT), store.root, str(tmp_path / "out" / "a.tar")]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert os.listdir(tmp_path / "out") == ["a.tar"] and (tmp_path / "out" / "a.tar").read_text() == "what was there"


def test_where_files_need_names(store, tmp_path, monkeypatch):
    """As on a file system without O_TMPFILE."""
    plain = os.open

    def refusing(path: str, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return plain(path, flags, *rest, **options)

    busybox_image(store)
    monkeypatch.setattr(os, "open", refusing)
    with Output(str(tmp_path / "a.tar")) as output:
        save(store, ["busybox"], output)
    with pytest.raises(ZeroDivisionError), Output(str(tmp_path / "b.tar")):
        raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "store"]
    assert loaded(Store(str(tmp_path / "again")), tmp_path / "a.tar") == {BOX}


@pytest.mark.parametrize("fields", [
    {}, {"name": b"x" * 100}, {"name": b"d/" * 60 + b"x"}, {"name": b"x" * 101}, {"name": b"d/" * 200 + b"x"},
    {"name": "ä".encode() * 80}, {"kind": b"2", "link": b"y" * 150}, {"kind": b"2", "link": b"../z"},
    {"uid": 8 ** 7, "gid": 4_000_000_000}, {"mtime": -5_500_000_000}, {"mtime": 1_700_000_000_123_456_789},
    {"mtime": 1 << 70}, {"mode": 0o7755}, {"kind": b"4", "device": (8, 1)}, {"kind": b"5", "name": b"d/"},
    {"xattrs": {b"user.a": b"\0\n=", b"security.capability": bytes(range(20))}}, {"size": 8 ** 11},
    {"name": b"a" * 155 + b"/" + b"b" * 100}, {"name": b"a" * 156 + b"/" + b"b" * 100}, {"xattrs": {b"k": b"v" * 83}},
    *({"xattrs": {b"k": b"v" * n}} for n in range(74, 84))], ids=str)
def test_what_the_writer_writes_the_standard_library_reads(fields):
    fields = {"name": b"n", "size": 0} | fields
    head = header(**fields)
    assert len(head) % 512 == 0 and head == header(**fields)
    with tarfile.open(fileobj=io.BytesIO(head + padding(0) + END), errorlevel=2) as file:
        info = file.next()
    assert info is not None
    assert os.fsencode(info.name) == fields["name"].rstrip(b"/")
    assert os.fsencode(info.linkname) == fields.get("link", b"")
    assert (info.uid, info.gid, info.size) == (fields.get("uid", 0), fields.get("gid", 0), fields["size"])
    assert info.mode == fields.get("mode", 0o644) and info.type == fields.get("kind", b"0")
    assert abs(float(info.mtime) - fields.get("mtime", 0) / 1e9) <= abs(fields.get("mtime", 0)) / 1e15
    assert (info.devmajor, info.devminor) == fields.get("device", (0, 0))
    found = {key[13:].encode(): value.encode(errors="surrogateescape") for key, value in info.pax_headers.items()
             if key.startswith("SCHILY.xattr.")}
    assert found == fields.get("xattrs", {})


def test_nothing_of_a_refused_archive_remains(store, tmp_path):
    """The second of two images is bad: the first is not named, and its blobs go."""
    members = docker_members([Built(), OTHER])
    table = json.loads(members["manifest.json"])        # type: ignore[arg-type]
    table[1]["Layers"].pop()
    (tmp_path / "a.tar").write_bytes(tar(members | {"manifest.json": json.dumps(table).encode()}))
    with pytest.raises(ImageError, match=r"manifest.json: \[1\].Layers: 1 layers, and 2 in rootfs.diff_ids"):
        load(store, str(tmp_path / "a.tar"))
    assert store.entries() == [] and os.listdir(f"{store.root}/tmp") == []
    sweep(store)
    assert os.listdir(f"{store.root}/blobs/sha256") == []
