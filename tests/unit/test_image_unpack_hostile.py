"""Archives that want out of the layer, or want too much: one line, and nothing outside is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from framework.images import Link, Special, tar
from framework.run import ROOT as CHECKOUT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.errors import ImageError
from hv.image.inflate import Limits
from hv.image.tree import clear_folder
from hv.image.unpack import Summary, unpack

ROOT = os.geteuid() == 0


@pytest.fixture
def outside(tmp_path):
    """The folder `box` to unpack in, with files around it that must stay as they are."""
    (tmp_path / "secret").write_text("untouched")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/in").write_text("untouched")
    (tmp_path / "box").mkdir()
    before = state(tmp_path)
    yield tmp_path
    assert state(tmp_path) == before


def state(tmp_path: Path) -> list[tuple[object, ...]]:
    found = []
    for path in [tmp_path / "folder", *sorted(tmp_path.glob("folder/*")), tmp_path / "secret"]:
        status = path.lstat()
        found.append((path, status.st_mode, status.st_uid, status.st_nlink, status.st_mtime_ns,
                      path.read_bytes() if path.is_file() else b""))
    return [*found, sorted(os.listdir(tmp_path))]


def into_box(outside: Path, layer: bytes, **limits: int) -> Summary:
    blob, box = os.memfd_create("layer"), os.open(outside / "box", os.O_RDONLY)
    try:
        os.write(blob, layer)
        os.lseek(blob, 0, os.SEEK_SET)
        return unpack(blob, box, "layer x", limits=Limits(**limits))
    finally:
        os.close(blob)
        os.close(box)


ESCAPES = {
    "dots": [("../secret", b"x")],
    "dots within": [("a/../../secret", b"x")],
    "dots at the end": [("a/", None), ("a/..", None)],
    "folder of dots": [("../folder/", None)],
    "link to dots": [("h", Link("../secret", hard=True))],
    "link to dots within": [("a/", None), ("h", Link("a/../../secret", hard=True))],
    "whiteout of dots": [(".wh...", b"")],
    "whiteout of dot": [("a/", None), ("a/.wh..", b"")],
    "whiteout of nothing": [(".wh.", b"")],
    "whiteout beyond": [("../.wh.secret", b"")],
    "opaque beyond": [("../folder/.wh..wh..opq", b"")],
    "root as a file": [("./", Special({"type": tarfile.SYMTYPE, "linkname": "/etc"}))],
    "link to the root": [("h", Link("/", hard=True))],
    "link to a folder": [("d/", None), ("h", Link("d", hard=True))],
    "link to nothing": [("h", Link("nowhere", hard=True))],
    "a file as a folder": [("f", b""), ("f/in", b"x")],
    "a link to nothing as a folder": [("l", Link("nowhere")), ("l/in", b"x")],
    "a link to itself as a folder": [("l", Link("l")), ("l/in", b"x")],
    "long part": [("n" * 256, b"x")],
    "long name": [("n/" * 3000 + "n", b"x")],
    "long target": [("l", Link("t" * 5000))],
    "device too high": [("d", Special({"type": tarfile.CHRTYPE, "devmajor": 9999, "devminor": 1}))],
}


@pytest.mark.parametrize("name", ESCAPES)
def test_refused(name, outside):
    with pytest.raises(ImageError) as caught:
        into_box(outside, tar(ESCAPES[name]))
    assert str(caught.value).startswith("layer x: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("target", ["..", "../folder", "/folder", "{out}/folder", "/proc/self/root{out}/folder",
                                    "/proc/self/cwd"])
def test_a_link_as_parent_never_leads_out(target, outside):
    where = target.format(out=outside)
    for name in ("l/in", "l/new", "l/.wh.in", "l/.wh..wh..opq", "l/d/"):
        with pytest.raises(ImageError) if target != ".." else open(os.devnull):
            into_box(outside, tar([("l", Link(where)), (name, b"x" if name[-1] != "/" else None)]))
        box = os.open(outside / "box", os.O_RDONLY)
        clear_folder(box)
        os.close(box)


def test_links_out_of_the_layer_stay_links_and_are_never_followed(outside):
    into_box(outside, tar([("l", Link(str(outside / "secret"))), ("l", Special(
        {"mode": 0o600, "uid": 1 if ROOT else 0, "mtime": 5, "pax_headers": {"SCHILY.xattr.user.a": "1"}}, b"mine")),
        ("k", Link(str(outside / "secret"))), ("h", Link("k", hard=True)), ("d", Link(str(outside / "folder"))),
        ("d/", None), ("d/in", b"mine"), ("m", Link(str(outside / "folder"))),
        ("m", Special({"type": tarfile.FIFOTYPE, "mode": 0o4777}))]))
    assert (outside / "box/l").read_bytes() == b"mine" and os.readlink(outside / "box/h") == str(outside / "secret")
    assert (outside / "box/d/in").read_bytes() == b"mine" and not (outside / "box/d").is_symlink()


def test_absolute_names_are_within_the_layer(outside):
    into_box(outside, tar([(f"{outside}/secret", b"mine"), ("/h", Link(f"{outside}/secret", hard=True)),
                           ("//./x", b"1")]))
    assert (outside / "box" / str(outside)[1:] / "secret").read_bytes() == b"mine"
    assert sorted(os.listdir(outside / "box")) == sorted(["h", "x", outside.parts[1]])


def test_bounds(outside):
    with pytest.raises(ImageError, match="more than 50 entries"):
        into_box(outside, tar([(f"f{number}", b"") for number in range(60)]), entries=50)
    with pytest.raises(ImageError, match="more than 50 entries"):
        into_box(outside, tar([("g/" * 60 + "f", b"")]), entries=50)       # folders that no entry names count, too
    with pytest.raises(ImageError, match="becomes more than 20000 bytes"):
        into_box(outside, tar([("h", bytes(50_000))]), most=20_000)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    with pytest.raises(ImageError, match="sparse file of 1125899906842624 bytes"):
        into_box(outside, tar([("s", Special({"pax_headers": pax}, b"0\n".ljust(512, b"\0")))]))


def test_a_deep_tree_can_be_replaced_and_removed(outside):
    part, entries = "d/" * 1000, [("a/" + "d/" * 1000, None)]
    for number in range(2):             # links lead deeper than a path could
        entries += [(f"l{number}", Link(("a/" if not number else f"l{number - 1}/") + part)),
                    (f"l{number}/" + part, None)]
    into_box(outside, tar(entries))
    assert os.path.isdir(outside / "box/a/d/d/d")
    box = os.open(outside / "box", os.O_RDONLY)
    clear_folder(box)
    assert os.listdir(box) == []
    os.close(box)
    into_box(outside, tar([*entries, ("a", b"now a file")]))
    assert (outside / "box/a").read_bytes() == b"now a file"
    box = os.open(outside / "box", os.O_RDONLY)
    clear_folder(box)
    os.close(box)


NAMES = st.sampled_from(["a", "b", "a/b", "a/b/c", "l", "l/x", "../secret", "/etc", "..", ".", "./", "a/../b", "l/../b",
                         ".wh.a", "a/.wh.b", ".wh...", ".wh..wh..opq", "l/.wh..wh..opq", "l/.wh.in", "a/l", "a/l/in"])
TARGETS = st.sampled_from(["a", "..", "/", "../folder", "/folder", "../../..", "l", ".", "a/b", "/proc/self/fd/0"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, st.sampled_from(["file", "folder", "link", "hard", "fifo", "device"]), TARGETS),
                max_size=12), st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 255)), max_size=3))
def test_whatever_the_archive_says(outside, entries, changes):
    made = []
    for name, kind, target in entries:
        made.append((name, {"file": b"evil", "folder": None, "link": Link(target), "hard": Link(target, hard=True),
                            "fifo": Special({"type": tarfile.FIFOTYPE}),
                            "device": Special({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})}[kind]))
    layer = bytearray(tar(made))
    for place, value in changes:
        if place < len(layer):
            layer[place] = value
    before, fds = state(outside), len(os.listdir("/proc/self/fd"))
    try:
        into_box(outside, bytes(layer))
    except ImageError as error:
        assert "\n" not in str(error)
    assert state(outside) == before and len(os.listdir("/proc/self/fd")) == fds
    box = os.open(outside / "box", os.O_RDONLY)
    clear_folder(box)
    assert os.listdir(box) == []
    os.close(box)


@pytest.mark.skipif(not ROOT, reason="needs another user")
def test_without_root_files_are_the_users_and_devices_are_left_out(tmp_path):
    layer = tar([("d/", Special({"type": tarfile.DIRTYPE, "uid": 5, "gid": 6, "mode": 0o2500})),
                 ("d/f", Special({"uid": 7, "mode": 0o4000, "pax_headers": {"SCHILY.xattr.user.a": "1"}}, b"x")),
                 ("d/none/", Special({"type": tarfile.DIRTYPE, "mode": 0})), ("d/none/in", b"1"),
                 ("null", Special({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})), (".wh.gone", b""),
                 ("o/.wh..wh..opq", b"")])
    script = ("import os, hashlib, threading, _queue\n"           # the tests' Python may lie where this user can't go
              "from hv.image.unpack import unpack\n"
              "os.setgroups([]); os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)\n"
              "blob, box = os.open('blob', os.O_RDONLY), os.open('box', os.O_RDONLY)\n"
              "print(unpack(blob, box, 'x').skipped)\n")
    (tmp_path / "blob").write_bytes(layer)
    (tmp_path / "box").mkdir()
    os.chown(tmp_path / "box", 1234, 1234)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(CHECKOUT)}, timeout=30,
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
    box = tmp_path / "box"
    assert (box / "d").stat().st_mode & 0o7777 == 0o2500 and (box / "d/f").stat().st_mode & 0o7777 == 0o4000
    assert (box / "d/none").stat().st_mode & 0o7777 == 0 and (box / "d/none/in").read_bytes() == b"1"
    assert os.getxattr(box / "d/f", "user.a") == b"1" and not (box / "null").exists()
    assert os.getxattr(box / "o", "user.overlay.opaque") == b"y" and (box / "gone").is_char_device()
    assert {path.lstat().st_uid for path in box.rglob("*")} == {1234}
