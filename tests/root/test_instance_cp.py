"""`pyhv cp`: docker's rules, and links that lead out."""

from __future__ import annotations

import io
import os
import stat
import tarfile

import pytest
from framework.instances import world as make_world

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=["running", "stopped"])
def box(world, request):
    name = f"box-{request.param}"
    world.start("--name", name, "busybox", "sh", "-c", "mkdir -p /d/e; echo one > /d/one; ln -s one /d/link; "
                "chown 5:6 /d/one; chmod 640 /d/one; mkfifo /d/fifo; sleep 1000")
    world.ok("exec", name, "true")
    if request.param == "stopped":
        world.ok("stop", "-t", "0", name)
    return name


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "deep").write_bytes(b"\0\xff" * 5000)
    (folder / "file").write_text("x")
    (folder / "file").chmod(0o4711)
    os.symlink("/etc/passwd", folder / "link")
    os.mkfifo(folder / "fifo")
    with (folder / "holes").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"middle")
    return folder


def members(world, place):
    with tarfile.open(fileobj=io.BytesIO(world("cp", place, "-").stdout)) as archive:
        return archive.getmembers()


def back(world, box, tmp_path, path):
    out = tmp_path / "back"
    world.ok("cp", "-a", f"{box}:{path}", str(out))
    return out


def test_a_tree_there_and_back(world, box, tree, tmp_path):
    world.ok("cp", str(tree), f"{box}:/new")
    out = back(world, box, tmp_path, "/new")
    assert (out / "in" / "deep").read_bytes() == b"\0\xff" * 5000
    assert stat.S_IMODE((out / "file").stat().st_mode) == 0o4711 and os.readlink(out / "link") == "/etc/passwd"
    assert stat.S_ISFIFO((out / "fifo").lstat().st_mode)
    holes = (out / "holes").stat()
    assert holes.st_size == 64 << 20 and holes.st_blocks * 512 < 1 << 20


def test_where_it_goes(world, box, tree, tmp_path):
    world.ok("cp", str(tree / "in"), f"{box}:/here")           # is not there: becomes it
    world.ok("cp", str(tree / "in"), f"{box}:/here")           # is a folder: goes into it
    out = back(world, box, tmp_path, "/here")
    assert sorted(path.name for path in out.iterdir()) == ["deep", "in"]
    world.ok("cp", f"{tree}/.", f"{box}:/here")                # the content
    world.ok("cp", str(tree / "file"), f"{box}:/here/renamed")
    world.ok("cp", str(tree / "file"), f"{box}:/here/in/")
    out2 = tmp_path / "second"
    world.ok("cp", f"{box}:/here/.", str(out2))
    assert {"file", "renamed", "in", "deep"} <= {path.name for path in out2.iterdir()} and (out2 / "in/file").exists()


def test_what_is_refused(world, box, tree, tmp_path):
    (tmp_path / "plain").write_text("")
    for words in ((str(tmp_path / "none"), f"{box}:/x"), (f"{box}:/none", str(tmp_path)),
                  (str(tree / "file"), f"{box}:/none/x"), (str(tree / "file"), f"{box}:/none/")):
        world.fails(1, "cp", *words)
    for words in ((f"{box}:/d", str(tmp_path / "plain")), ("a:/x", "b:/y"), ("/x", "/y"), ("x",), (f"{box}:", "x")):
        world.fails(2, "cp", *words)


def test_owners(world, box, tree, tmp_path):
    os.chown(tree / "file", 7, 8)
    world.ok("cp", str(tree / "file"), f"{box}:/as-root")
    world.ok("cp", "-a", str(tree / "file"), f"{box}:/as-it-was")
    for name, wanted in (("as-it-was", [("as-it-was", 7, 8)]), ("as-root", [("as-root", 0, 0)])):
        assert [(member.name, member.uid, member.gid) for member in members(world, f"{box}:/{name}")] == wanted


def test_links_lead_nowhere_else(world, box, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("host")
    os.symlink(str(outside), tmp_path / "trap")
    world.ok("cp", str(tmp_path / "trap"), f"{box}:/trap")
    os.symlink("../../../../../../.." + str(outside), tmp_path / "up")
    world.ok("cp", str(tmp_path / "up"), f"{box}:/up")
    (tmp_path / "new").write_text("new")
    for name in ("trap", "up"):
        world.fails(1, "cp", str(tmp_path / "new"), f"{box}:/{name}/planted")
        world.fails(1, "cp", f"{box}:/{name}/secret", str(tmp_path / "got"))
    assert os.listdir(outside) == ["secret"]


def test_archives(world, box, tmp_path):
    kinds = {member.name: member.type for member in members(world, f"{box}:/d")}
    assert (kinds["d/link"], kinds["d/fifo"], kinds["d/e"]) == (tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in (("a/b/c", b"deep"), ("top", b"t")):
            info = tarfile.TarInfo(name)
            info.size, info.uid = len(data), 9
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("hard")
        link.type, link.linkname = tarfile.LNKTYPE, "top"
        archive.addfile(link)
    world.ok("cp", "-", f"{box}:/tmp", stdin=made.getvalue())
    out = back(world, box, tmp_path, "/tmp")
    assert (out / "a/b/c").read_bytes() == b"deep" and (out / "hard").read_bytes() == b"t"
    assert (out / "top").stat().st_uid == 9


@pytest.mark.parametrize("name, kind, link", [
    ("../up", "file", ""), ("a/../../up", "file", ""), ("x", "link", "../../y"), ("x/../..", "dir", "")])
def test_hostile_archives(world, box, name, kind, link):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.type = {"file": tarfile.REGTYPE, "link": tarfile.LNKTYPE, "dir": tarfile.DIRTYPE}[kind]
        info.linkname = link
        archive.addfile(info)
    world.fails(1, "cp", "-", f"{box}:/tmp", stdin=made.getvalue())


def test_what_is_no_archive(world, box):
    world.fails(1, "cp", "-", f"{box}:/tmp", stdin=b"this is no archive" * 100)
