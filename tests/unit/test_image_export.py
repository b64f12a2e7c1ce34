"""`export`: the layers laid over each other give the same files as unpacking one after the other does."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from framework.images import Built, Link, Member, Special, busybox_image, busybox_layer, digest, tar

from hv.errors import ImageError
from hv.image.archive_export import export
from hv.image.archive_import import import_image
from hv.image.archive_write import Output
from hv.image.store import Store


def exported(tmp_path: Path, *layers: bytes, compression: str = "none") -> dict[str, Any]:
    """The export's members by name: a file's content, a link's target, or a type; hard links by what they lead to."""
    store = Store(str(tmp_path / "store"))
    with store.lock(shared=True):
        built = Built(list(layers), compression=compression)
        for blob in [*built.blobs, built.config]:
            store.put_bytes(blob)
        image = store.load(store.put_bytes(built.manifest))
    with Output(str(tmp_path / "out.tar")) as output:
        export(store, image, output)
    found: dict[str, Any] = {}
    with tarfile.open(tmp_path / "out.tar") as file:
        for member in file:
            assert member.name not in found, f"{member.name} is there twice"
            if member.isreg() or member.islnk():
                data = file.extractfile(member)
                assert data is not None
                found[member.name] = data.read()
            else:
                found[member.name] = member.linkname if member.issym() else member.type
    return found


FOLDER = tarfile.DIRTYPE


def test_one_layer_is_as_it_was(tmp_path):
    found = exported(tmp_path, busybox_layer())
    assert found["bin/busybox"] == Path("/bin/busybox").read_bytes() and found["bin/sh"] == "busybox"
    assert found["tmp"] == FOLDER


@pytest.mark.parametrize("layers, wanted", [
    ([{"a": b"1", "b": b"2"}, {"a": b"3"}], {"a": b"3", "b": b"2"}),
    ([{"a": b"1", "b": b"2"}, {".wh.a": b""}], {"b": b"2"}),
    ([{"a": b"1"}, {".wh.a": b""}, {"a": b"3"}], {"a": b"3"}),
    ([{"a": b"1"}, {"a": b"2", ".wh.a": b""}], {"a": b"2"}),
    ([{"d/": None, "d/x": b"1"}, {".wh.d": b""}], {}),
    ([{"d/": None, "d/x": b"1", "d/e/": None, "d/e/y": b"2"}, {"d/": None, "d/.wh..wh..opq": b"", "d/z": b"3"}],
     {"d": FOLDER, "d/z": b"3"}),
    ([{"d/": None, "d/x": b"1"}, {"d": b"file"}], {"d": b"file"}),
    ([{"d/": None, "d/x": b"1"}, {"d": Link("/etc")}], {"d": "/etc"}),
    ([{"d": Link("/etc")}, {"d/": None, "d/x": b"1"}], {"d": FOLDER, "d/x": b"1"}),
    ([{"d": b"file"}, {"d/x": b"1"}], {"d/x": b"1"}),
    ([{"d/": None, "d/x": b"1"}, {"d": b"file"}, {"d/": None, "d/y": b"2"}], {"d": FOLDER, "d/y": b"2"}),
    ([{"a": b"1"}, {"a": Special({"type": tarfile.FIFOTYPE})}], {"a": tarfile.FIFOTYPE}),
    ([{".wh..wh.plnk": b"", "./a": b"1", "b//c": b"2"}], {"a": b"1", "b/c": b"2"}),
    ([{"d/a": b"1"}, {"d/.wh.a": b"", "d/b": b"2"}], {"d/b": b"2"})], ids=str)
def test_layers_over_each_other(tmp_path, layers, wanted):
    assert exported(tmp_path, *(tar(layer) for layer in layers)) == wanted


@pytest.mark.parametrize("upper, wanted", [
    ({"a": b"new"}, {"a": b"new", "b": b"old", "c": b"old"}), ({".wh.a": b""}, {"b": b"old", "c": b"old"}),
    ({".wh.a": b"", ".wh.b": b""}, {"c": b"old"}), ({".wh.b": b""}, {"a": b"old", "c": b"old"}),
    ({"c": b"new"}, {"a": b"old", "b": b"old", "c": b"new"})], ids=str)
def test_a_hard_links_content_outlives_its_first_name(tmp_path, upper, wanted):
    lower = tar({"a": b"old", "b": Link("a", hard=True), "c": Link("b", hard=True)})
    assert exported(tmp_path, lower, tar(upper)) == wanted
    with tarfile.open(tmp_path / "out.tar") as file:
        kinds = [member.type for member in file if file.extractfile(member).read() == b"old"]  # type: ignore[union-attr]
    assert kinds.count(tarfile.REGTYPE) == 1        # the rest are links to it


def test_what_an_entry_has_is_kept(tmp_path):
    info: dict[str, Any] = {"mode": 0o4711, "uid": 70_000, "gid": 5_000_000, "mtime": 1_700_000_000}
    long = "d/" * 150 + "file"
    members: dict[str, Member] = {
        long: Special(info | {"pax_headers": {"SCHILY.xattr.user.a": "b", "mtime": "1700000000.25"}}, b"x"),
        "dev": Special({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}), "link": Link(long)}
    exported(tmp_path, tar(members), compression="zstd")
    with tarfile.open(tmp_path / "out.tar") as file:
        found = file.getmember(long)
        assert (found.mode, found.uid, found.gid) == (0o4711, 70_000, 5_000_000)
        assert found.mtime == 1_700_000_000.25 and found.pax_headers["SCHILY.xattr.user.a"] == "b"
        assert (file.getmember("dev").devmajor, file.getmember("dev").devminor) == (1, 3)
        assert file.getmember("link").linkname == long


def test_a_sparse_file_is_written_whole(tmp_path):
    fields = {"pax_headers": {"GNU.sparse.map": "100,4,5000,4", "GNU.sparse.size": "9000"}}
    found = exported(tmp_path, tar({"s": Special(fields, b"abcdefgh")}))
    assert found["s"] == bytes(100) + b"abcd" + bytes(4896) + b"efgh" + bytes(3996)


def test_a_sparse_file_that_would_fill_any_disk_is_refused(tmp_path):
    fields = {"pax_headers": {"GNU.sparse.map": "0,4", "GNU.sparse.size": str(1 << 61)}}
    with pytest.raises(ImageError, match="bytes, more than"):
        exported(tmp_path, tar({"s": Special(fields, b"abcd")}))
    assert not list(tmp_path.glob("out*"))


def test_names_that_lead_outside_are_refused(tmp_path):
    for members in ({"../x": b""}, {"a/../../x": b""}, {"a": b"", "b": Link("../a", hard=True)}):
        with pytest.raises(ImageError, match="leads outside"):
            exported(tmp_path, tar(members))


def test_export_and_import_give_the_files_again(tmp_path):
    store = Store(str(tmp_path / "store"))
    image = busybox_image(store, layers=[tar({".wh.etc": b"", "new": b"1"})], compression="gzip")
    with Output(str(tmp_path / "a.tar")) as output:
        export(store, image, output)
    again = import_image(store, str(tmp_path / "a.tar"), "flat")
    with Output(str(tmp_path / "b.tar")) as output:
        export(store, again, output)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert digest((tmp_path / "a.tar").read_bytes()) == again.layers[0][1]


def _applied(folder: Path, layers: list[list[tuple[str, Member]]]) -> dict[str, Any]:
    """The specification's way: each layer unpacked over the one before, whiteouts first."""
    tree: dict[str, Any] = {}
    for layer in layers:
        for name, _ in layer:
            parent, _, leaf = name.rpartition("/")
            if leaf.startswith(".wh."):
                gone = f"{parent}/{leaf[4:]}".lstrip("/")
                tree = {path: value for path, value in tree.items() if path != gone and not path.startswith(gone + "/")}
        for name, content in layer:
            path = name.rstrip("/")
            if path.rpartition("/")[2].startswith(".wh."):
                continue
            if content is not None:
                tree = {old: value for old, value in tree.items() if not old.startswith(path + "/")}
            tree[path] = FOLDER if content is None else content
    return tree


@pytest.mark.parametrize("seed", range(30))
def test_random_layers_against_the_plain_algorithm(tmp_path, seed):
    draw = random.Random(seed)
    layers: list[list[tuple[str, Member]]] = []
    for _ in range(draw.randint(1, 4)):
        there: dict[str, Member] = {}
        for _ in range(draw.randint(0, 12)):
            depth = draw.randint(1, 3)
            path = "/".join(draw.choice("abc") for _ in range(depth))
            folders = ["/".join(path.split("/")[:n]) for n in range(1, depth)]
            if any(there.get(folder) is not None for folder in folders):
                continue
            if any(other.startswith(path + "/") for other in there):
                continue
            there |= dict.fromkeys(folders)
            there[path] = draw.choice([None, os.urandom(3), os.urandom(3)])
        gone = [path for path in {"/".join(draw.choice("abc") for _ in range(draw.randint(1, 2))) for _ in range(2)}
                if path not in there and there.get(path.rpartition("/")[0]) is None]
        rows: list[tuple[str, Member]] = [(path + "/" if content is None else path, content)
                                          for path, content in there.items()]
        for path in gone:
            parent, slash, leaf = path.rpartition("/")
            rows.insert(draw.randint(0, len(rows)), (f"{parent}{slash}.wh.{leaf}", b""))
        layers.append(rows)
    assert exported(tmp_path, *(tar(layer) for layer in layers)) == _applied(tmp_path, layers)


def test_the_end_of_an_export_is_an_archives_end(tmp_path):
    exported(tmp_path, tar({"a": b"1"}))
    data = (tmp_path / "out.tar").read_bytes()
    assert data.endswith(bytes(1024)) and len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data), errorlevel=2) as file:
        assert file.getnames() == ["a"]
