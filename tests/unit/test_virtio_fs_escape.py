"""Nothing a guest or a busy host does leads out of a shared folder."""

from __future__ import annotations

import os
import shutil
import threading
from errno import ESTALE, EXDEV
from pathlib import Path

import pytest
from framework.fuse_client import ROOT, Share

from hv.devices.virtio import fuse


def outside_state(folder: Path) -> list[tuple[str, int, int, int, bytes]]:
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_mode, status.st_mtime_ns, status.st_uid,
                      path.read_bytes() if path.is_file() else b""))
    return found


@pytest.fixture
def places(tmp_path):
    """(share, a folder outside of it with a file)"""
    inside, outside = tmp_path / "share", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "f").write_text("not for guests")
    return inside, outside


def test_symbolic_links_are_text(places):
    inside, outside = places
    (inside / "out").symlink_to(outside)
    with Share(inside) as share:
        link = share.symlink(ROOT, b"made", os.fsencode(outside))
        for nodeid in (link.nodeid, share.lookup(ROOT, b"out").nodeid):
            assert share.readlink(nodeid) == os.fsencode(outside)
            for call in (share.lookup, share.unlink, share.mkdir, share.create):
                with pytest.raises(NotADirectoryError):
                    call(nodeid, b"f")
            with pytest.raises(OSError):
                share.opendir(nodeid)
            with pytest.raises(OSError):
                share.setattr(nodeid, fuse.FATTR_MODE, mode=0o777)
    assert (outside / "f").read_text() == "not for guests" and len(list(outside.iterdir())) == 1


def test_a_directory_replaced_by_a_link_is_stale(places):
    inside, outside = places
    (inside / "d").mkdir()
    with Share(inside) as share:
        node = share.lookup(ROOT, b"d").nodeid
        (inside / "d").rmdir()
        (inside / "d").symlink_to(outside)
        for call in (share.lookup, share.create, share.mkdir, share.unlink):
            with pytest.raises(OSError) as caught:
                call(node, b"f")
            assert caught.value.errno == ESTALE
    assert (outside / "f").read_text() == "not for guests"


@pytest.mark.parametrize("opened", [False, True])
def test_a_directory_moved_out_of_the_folder_is_out_of_reach(places, opened):
    inside, outside = places
    (inside / "d").mkdir()
    (inside / "d/f").write_text("was inside")
    with Share(inside) as share:
        node, file = share.walk("d").nodeid, share.walk("d/f").nodeid
        if opened:
            share.create(node, b"before")
            share.setattr(file, fuse.FATTR_MODE, mode=0o600)
        shutil.move(inside / "d", outside / "d")
        before = outside_state(outside)
        for call in (share.lookup, share.create, share.mkdir, share.unlink, share.opendir):
            with pytest.raises(OSError) as caught:
                call(*(node, b"f")[:1 if call == share.opendir else 2])
            assert caught.value.errno == ESTALE
        for call in (lambda: share.setattr(file, fuse.FATTR_MODE, mode=0o777), lambda: share.open(file, os.O_RDWR),
                     lambda: share.link(file, ROOT, b"stolen"), lambda: share.setxattr(file, b"user.x", b"y")):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == ESTALE
        assert outside_state(outside) == before
        shutil.move(outside / "d", inside / "e")        # back, under another name: seen again once looked up
        assert share.lookup(ROOT, b"e").nodeid == node and share.lookup(node, b"f").nodeid == file
        assert share.read(share.open(file), 0, 99) == b"was inside"


def test_the_folder_itself_may_move(places):
    inside, _ = places
    with Share(inside) as share:
        node = share.mkdir(ROOT, b"d").nodeid
        inside.rename(inside.parent / "elsewhere")
        share.create(node, b"f")
        assert (inside.parent / "elsewhere/d/f").exists()


def test_a_name_that_starts_like_the_folder_is_not_in_it(places):
    inside, _ = places
    (inside / "d").mkdir()
    with Share(inside) as share:
        node = share.mkdir(share.lookup(ROOT, b"d").nodeid, b"x").nodeid
        share.create(node, b"f")
        (inside / "d").rename(inside.parent / "share-not")
        with pytest.raises(OSError):
            share.create(node, b"g")
    assert not (inside.parent / "share-not/x/g").exists()


def test_mount_points_are_not_crossed(places):
    """What is mounted in the folder does not belong to it: /proc/self/root would be a door."""
    if os.path.realpath("/proc") != "/proc" or os.getuid():
        pytest.skip("needs root and a /proc to share")
    with Share("/", readonly=True) as share, pytest.raises(OSError) as caught:
        share.lookup(ROOT, b"proc")
    assert caught.value.errno == EXDEV


def test_a_guest_races_with_a_host_that_moves_and_swaps(places):
    """The host renames directories in and out and swaps one with a link that leads out, while the guest works."""
    inside, outside = places
    (outside / "d").mkdir()
    (outside / "d/f").write_text("not for guests")
    (inside / "link").symlink_to(outside)
    for name in ("a", "b"):
        (inside / name / "d").mkdir(parents=True)
        (inside / name / "d/f").write_text("inside")
    before = outside_state(outside)
    ended = threading.Event()

    def host() -> None:
        from hv.linux.files import RENAME_EXCHANGE, rename

        at = os.open(inside, os.O_PATH)
        while not ended.is_set():
            rename(at, b"a", at, b"link", RENAME_EXCHANGE)      # "a" is the link now, "link" the directory
            rename(at, b"link", at, b"a", RENAME_EXCHANGE)
            (inside / "b").rename(inside / "c")
            (inside / "c").rename(inside / "b")
        os.close(at)

    thread = threading.Thread(target=host)
    thread.start()
    done = failed = 0
    try:
        with Share(inside) as share:
            share.device.server.nodes.limit = 2        # found again by name all the time
            for number in range(1500):
                for name in (b"a", b"b", b"link"):
                    try:
                        node = share.lookup(ROOT, name).nodeid
                        inner = share.lookup(node, b"d").nodeid
                        _, fh = share.create(inner, b"n%d" % number)
                        share.write(fh, 0, b"written by the guest")
                        share.release(fh)
                        share.setattr(share.lookup(inner, b"f").nodeid, fuse.FATTR_MODE, mode=0o640 + number % 8)
                        share.unlink(inner, b"n%d" % number)
                        done += 1
                    except OSError:
                        failed += 1
    finally:
        ended.set()
        thread.join()
    assert done > 100 and failed, (done, failed)
    assert outside_state(outside) == before


def test_loaded_state_can_not_name_what_is_outside(places):
    inside, outside = places
    (inside / "f").touch()
    with Share(inside) as share:
        share.lookup(ROOT, b"f")
        share.device.stop()
        state = share.device.state()
        for name in ("../outside", "..", "/etc/passwd", "", "a/b"):
            state["model"]["session"]["nodes"][0][4] = name
            with pytest.raises(ValueError):
                share.device.load(state)
        # a link by that name is found as the link it is, which is not the kind of node that was saved
        (inside / "g").symlink_to(outside / "f")
        state["model"]["session"]["nodes"][0][4] = "g"
        share.device.load(state)
        share.device.resume()
        with pytest.raises(OSError) as caught:
            share.open(state["model"]["session"]["nodes"][0][0])
        assert caught.value.errno == ESTALE
