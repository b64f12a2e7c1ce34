"""Layers made into files: as GNU tar makes them, and in overlayfs's form where tar knows nothing of layers."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from framework.images import Link, Special, digest, tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.errors import ImageError
from hv.image.inflate import Limits
from hv.image.later import Later
from hv.image.unpack import Summary, unpack

ROOT = os.geteuid() == 0
OPAQUE = "trusted.overlay.opaque" if ROOT else "user.overlay.opaque"
FOLDER = Special({"type": tarfile.DIRTYPE, "mode": 0o755})


def unpacked(layer: bytes, folder: Path, diff_id: str = "", limits: Limits | None = None) -> Summary:
    folder.mkdir()
    blob = folder.with_suffix(".blob")
    blob.write_bytes(layer)
    files, into = os.open(blob, os.O_RDONLY), os.open(folder, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    try:
        return unpack(files, into, "layer x", diff_id, limits)
    finally:
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(files)
        os.close(into)


def look(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything of a tree that an archive can say, but for the times of folders."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status, name = path.lstat(), str(path.relative_to(folder))
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        if kind == stat.S_IFREG:
            content = path.read_bytes()
        elif kind == stat.S_IFLNK:
            content = os.readlink(path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            content = status.st_rdev
        xattrs = {key: os.getxattr(path, key, follow_symlinks=False)
                  for key in os.listxattr(path, follow_symlinks=False)}
        mtime = 0 if kind == stat.S_IFDIR else status.st_mtime_ns
        found[name] = (status.st_mode, status.st_uid, status.st_gid, mtime, content,
                       first.setdefault(status.st_ino, name), xattrs)
    return found


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


# -- beside GNU tar ----------------------------------------------------------------------------------------------

PART = st.sampled_from(["a", "b", "c", "dir", "ä" * 40, "n" * 120, ".hidden", "new\nline"])
MODE = st.integers(0, 0o7777)
TIME = st.integers(0, 2**33)


@st.composite
def members(draw) -> list[tuple[str, tarfile.TarInfo, bytes]]:
    """Entries that GNU tar makes without a complaint: parents first, links to what is there."""
    folders, files, taken, made = [""], [], set(), []
    for _ in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(folders)) + draw(PART)
        if name in taken:
            continue
        taken.add(name)
        info = tarfile.TarInfo(draw(st.sampled_from(["", "./", "/"])) + name)
        info.mode, info.mtime = draw(MODE), draw(TIME)
        if ROOT:
            info.uid, info.gid = draw(st.integers(0, 70000)), draw(st.integers(0, 70000))
        kind = draw(st.sampled_from(["file", "file", "folder", "folder", "symbolic", "hard", "fifo", "device"]))
        data = b""
        if kind == "folder":
            info.type = tarfile.DIRTYPE
            folders.append(name + "/")
        elif kind == "symbolic":
            info.type, info.linkname = tarfile.SYMTYPE, draw(st.text("ab/.", min_size=1, max_size=150))
        elif kind == "hard" and files:
            info.type, info.linkname = tarfile.LNKTYPE, draw(st.sampled_from(files))
        elif kind == "fifo":
            info.type = tarfile.FIFOTYPE
        elif kind == "device" and ROOT:
            info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, draw(st.integers(1, 4000)), draw(
                st.integers(0, 300))
        else:
            data = draw(st.binary(max_size=2000))
            info.size = len(data)
            files.append(name)
        made.append((name, info, data))
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members(), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_as_gnu_tar_does_it(tmp_path_factory, entries, kind):
    tmp_path = tmp_path_factory.mktemp("u")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as file:
        top = tarfile.TarInfo("./")
        top.type, top.mode, top.mtime = tarfile.DIRTYPE, 0o751, 1234567
        file.addfile(top)
        for _, info, data in entries:
            file.addfile(info, io.BytesIO(data))
    summary = unpacked(out.getvalue(), tmp_path / "ours", digest(out.getvalue()))
    (tmp_path / "theirs").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "theirs", "-xp", "--xattrs"],
                   input=out.getvalue(), check=True, stderr=subprocess.DEVNULL)
    assert look(tmp_path / "ours") == look(tmp_path / "theirs")
    # GNU tar loses the time of some folders that have links in them
    for name, info, _ in [("", top, b""), *entries]:
        if info.isdir():
            assert (tmp_path / "ours" / name).stat().st_mtime == info.mtime
    assert summary.entries == len(entries) + 1 and summary.implied == []


@pytest.mark.parametrize("form", [["--format=gnu"], ["--format=posix", "--sparse-version=0.0"],
                                  ["--format=posix", "--sparse-version=0.1"], ["--format=posix"]])
def test_sparse_files_keep_their_holes(form, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "holes").open("wb") as file:
        for number in range(50):
            file.seek(number * 1_000_000)
            file.write(bytes([number + 1]) * 5000)
        file.truncate(60_000_000)
    (folder / "nothing").touch()
    os.truncate(folder / "nothing", 1 << 30)
    layer = subprocess.run(["tar", "-C", folder, "-S", *form, "-c", "holes", "nothing"], check=True,
                           capture_output=True).stdout
    unpacked(layer, tmp_path / "out")
    assert (tmp_path / "out/holes").read_bytes() == (folder / "holes").read_bytes()
    assert (tmp_path / "out/holes").stat().st_blocks * 512 < 1_000_000
    assert (tmp_path / "out/nothing").stat().st_size == 1 << 30 and (tmp_path / "out/nothing").stat().st_blocks < 16


# -- what tar does not know --------------------------------------------------------------------------------------


def test_whiteouts_and_opaque_folders(tmp_path):
    summary = unpacked(tar([("./", None), ("d/", None), ("d/.wh.gone", b""), ("o/", None), ("o/.wh..wh..opq", b""),
                            ("o/kept", b"1"), (".wh.top", b""), (".wh..wh.plnk/", None), (".wh..wh.plnk/1.2", b""),
                            ("d/.wh..wh.orph", b""), ("deep/er/.wh.x", b"")]), tmp_path / "l")
    out = tmp_path / "l"
    assert is_whiteout(out / "d/gone") and is_whiteout(out / "top") and is_whiteout(out / "deep/er/x")
    assert os.getxattr(out / "o", OPAQUE) == b"y" and (out / "o/kept").read_bytes() == b"1"
    assert sorted(os.listdir(out)) == ["d", "deep", "o", "top"] and os.listdir(out / "d") == ["gone"]
    assert summary.implied == [b"deep", b"deep/er"] and not summary.opaque
    assert os.listxattr(out / "d") == []


def test_a_whiteout_hides_lower_layers_only_whatever_the_order(tmp_path):
    unpacked(tar([("f", b"1"), (".wh.f", b""), ("d/", None), ("d/in", b"2"), (".wh.d", b""), (".wh.g", b""),
                  ("g", b"3"), (".wh.e", b""), ("e/", None), ("e/in", b"4"), (".wh.p", b""), ("p/q/r", b"5"),
                  (".wh.w", b""), ("w/.wh.x", b"")]), tmp_path / "l")
    out = tmp_path / "l"
    assert (out / "f").read_bytes() == b"1" and (out / "g").read_bytes() == b"3"
    assert (out / "d/in").read_bytes() == b"2" and (out / "e/in").read_bytes() == b"4"
    for name in ("d", "e", "p"):
        assert os.getxattr(out / name, OPAQUE) == b"y", name
    assert (out / "p/q/r").read_bytes() == b"5" and not os.listxattr(out / "p/q")
    assert is_whiteout(out / "w/x") and os.getxattr(out / "w", OPAQUE) == b"y"


def test_an_opaque_root_is_told(tmp_path):
    assert unpacked(tar([(".wh..wh..opq", b"")]), tmp_path / "l").opaque


def test_later_entries_replace_earlier_ones(tmp_path):
    unpacked(tar([("a/", None), ("a/b/", None), ("a/b/c", b"old"), ("a", b"file"), ("f", b"file"), ("f/", None),
                  ("f/in", b"1"), ("l", Link("a")), ("l", b"not through the link"), ("s", b"1"), ("s", Link("a")),
                  ("d/", Special({"type": tarfile.DIRTYPE, "mode": 0o700})), ("d/x", b"1"),
                  ("d/", Special({"type": tarfile.DIRTYPE, "mode": 0o755})), ("h", Link("a", hard=True)),
                  ("h", Link("f/in", hard=True)), ("x", b"longer than the next"), ("x", b"short")]), tmp_path / "l")
    out = tmp_path / "l"
    assert (out / "a").read_bytes() == b"file" and (out / "f/in").read_bytes() == b"1"
    assert (out / "l").read_bytes() == b"not through the link" and not (out / "l").is_symlink()
    assert os.readlink(out / "s") == "a"
    assert (out / "d/x").read_bytes() == b"1" and stat.S_IMODE((out / "d").stat().st_mode) == 0o755
    assert (out / "h").samefile(out / "f/in") and (out / "x").read_bytes() == b"short"
    assert os.getxattr(out / "f", OPAQUE) == b"y"


def test_a_folder_that_was_replaced_is_not_written_to_any_more(tmp_path):
    unpacked(tar([("d/", None), ("d/x", b"1"), ("d", b"file"), ("d/", None), ("d/y", b"2"), ("real/", None),
                  ("l", Link("real")), ("l/a", b"3"), ("l/", None), ("l/b", b"4")]), tmp_path / "l")
    out = tmp_path / "l"
    assert os.listdir(out / "d") == ["y"] and os.listdir(out / "real") == ["a"] and os.listdir(out / "l") == ["b"]


def test_entries_without_parents_and_links_in_the_middle_of_names(tmp_path):
    summary = unpacked(tar([("x/y/z", b"1"), ("usr/lib/", None), ("lib", Link("usr/lib")), ("lib/a", b"2"),
                            ("abs", Link("/usr")), ("abs/lib/b", b"3"), ("up", Link("../../../usr/lib")),
                            ("up/c", b"4"), ("./././lib//d", b"5"), ("h", Link("lib/a", hard=True))]), tmp_path / "l")
    out = tmp_path / "l"
    assert summary.implied == [b"x", b"x/y", b"usr", b""]
    assert sorted(os.listdir(out / "usr/lib")) == ["a", "b", "c", "d"]
    assert os.readlink(out / "lib") == "usr/lib" and (out / "h").samefile(out / "usr/lib/a")
    assert stat.S_IMODE((out / "x/y").stat().st_mode) == 0o755


def test_xattrs_that_are_taken_and_those_that_are_not(tmp_path):
    pax = {"SCHILY.xattr.user.one": "1", "SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.trusted.x": "1",
           "SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.security.selinux": "x"}
    for name, fields in {"f": {}, "d/": {"type": tarfile.DIRTYPE}}.items():
        layer = tar([(name, Special({"mode": 0o444 | 0o111 * (name == "d/"), "pax_headers": pax, **fields}))])
        unpacked(layer, tmp_path / name[0])
        assert os.listxattr(tmp_path / name[0] / name) == ["user.one"]
    unpacked(tar([("l", Special({"type": tarfile.SYMTYPE, "linkname": "x", "pax_headers": pax}))]), tmp_path / "l")
    assert os.listxattr(tmp_path / "l/l", follow_symlinks=False) == []


@pytest.mark.skipif(not ROOT, reason="a file's capabilities take root")
def test_capabilities_survive_the_change_of_owner(tmp_path):
    value = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    text = value.decode("utf-8", "surrogateescape")
    unpacked(tar([("ping", Special({"uid": 5, "mode": 0o4755, "pax_headers": {
        "SCHILY.xattr.security.capability": text}}))]), tmp_path / "l")
    status = (tmp_path / "l/ping").stat()
    assert os.getxattr(tmp_path / "l/ping", "security.capability") == value
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (5, 0o4755)


@pytest.mark.skipif(not ROOT, reason="owners take root")
def test_setgid_folders_hand_nothing_down(tmp_path):
    unpacked(tar([("d/", Special({"type": tarfile.DIRTYPE, "gid": 50, "mode": 0o2775})), ("d/f", b"1"),
                  ("d/e/", None)]), tmp_path / "l")
    out = tmp_path / "l"
    assert stat.S_IMODE((out / "d").stat().st_mode) == 0o2775 and (out / "d").stat().st_gid == 50
    assert (out / "d/f").stat().st_gid == 0 and (out / "d/e").stat().st_mode == stat.S_IFDIR | 0o755


def test_the_content_must_be_what_the_configuration_says(tmp_path):
    layer = tar([("f", b"1")])
    assert unpacked(layer, tmp_path / "right", digest(layer)).size == 1
    with pytest.raises(ImageError, match="digest"):
        unpacked(layer, tmp_path / "wrong", digest(b""))
    more = layer + b"garbage behind the end"
    assert unpacked(more, tmp_path / "more", digest(more)).size == 1
    with pytest.raises(ImageError, match="digest"):
        unpacked(more, tmp_path / "less", digest(layer))


def test_times_of_folders_wait_in_bounded_memory(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    rows = [(b"%d/" % number + b"p" * (number % 300), number * 7 - 10**12, number % 0o7777 - 1)
            for number in range(30_000)]
    for count in (3, len(rows)):
        later = Later(fd)
        for row in rows[:count]:
            later.add(*row)
        assert len(later._rows) < 2 << 20
        assert list(later) == rows[:count]
        later.close()
    os.close(fd)
    assert os.listdir(tmp_path) == []


def test_progress_and_many_folders(tmp_path):
    layer = tar([(f"d{number}/e/f", b"") for number in range(1500)])        # more than descriptors are kept
    (tmp_path / "l").mkdir()
    (tmp_path / "blob").write_bytes(layer)
    heard: list[int] = []
    blob, into = os.open(tmp_path / "blob", os.O_RDONLY), os.open(tmp_path / "l", os.O_RDONLY)
    assert unpack(blob, into, "x", progress=heard.append).entries == 4501
    os.close(blob)
    os.close(into)
    assert heard[-1] == len(layer) and heard == sorted(heard) and len(os.listdir(tmp_path / "l")) == 1500
