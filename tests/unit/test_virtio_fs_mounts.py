"""A shared folder with mounts inside it that the share crosses: inodes by mount, read-only places, no way out."""

from __future__ import annotations

import fcntl
import os
import traceback
from collections.abc import Callable
from errno import EROFS, ESTALE, EXDEV
from pathlib import Path

import pytest
from framework.fuse_client import ROOT, Share

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_mounts import crossings_below
from hv.linux.mount import ATTR, PROPAGATION, clone_tree, move, new_filesystem, set_attributes, set_propagation
from hv.linux.ns import CLONE_NEWNS, unshare

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


def alone(check: Callable[[], None]) -> None:
    """Run `check` in a process with mounts of its own."""
    child = os.fork()
    if not child:
        code = 1
        try:
            unshare(CLONE_NEWNS)
            set_propagation("/", PROPAGATION["private"], recursive=True)
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mount(fd: int, place: Path) -> None:
    at = os.open(place, os.O_PATH)
    move(fd, at)
    os.close(at)
    os.close(fd)


def bind(source: Path, place: Path, readonly: bool = False) -> None:
    fd = clone_tree(-100, str(source), True)
    if readonly:
        set_attributes(fd, ATTR["rdonly"])
    mount(fd, place)


@pytest.fixture
def tree(tmp_path):
    """A share with places to mount at, and a folder beside it."""
    share = tmp_path / "share"
    for name in ("a", "b", "deep/c", "own"):
        (share / name).mkdir(parents=True)
    (share / "file").write_text("the share's")
    volume = tmp_path / "volume"
    (volume / "sub").mkdir(parents=True)
    (volume / "f").write_text("volume")
    return share, volume


def test_without_the_option_a_mount_point_is_a_wall(tree):
    folder, _ = tree

    def check() -> None:
        mount(new_filesystem("tmpfs", "tmpfs", []), folder / "a")
        with Share(folder) as share, pytest.raises(OSError) as caught:
            share.lookup(ROOT, b"a")
        assert caught.value.errno == EXDEV

    alone(check)


def test_one_volume_twice_once_readonly(tree):
    folder, volume = tree

    def check() -> None:
        bind(volume, folder / "a")
        bind(volume, folder / "b", readonly=True)
        with Share(folder, submounts=True) as share:
            one, two = share.lookup(ROOT, b"a"), share.lookup(ROOT, b"b")
            assert one.ino == two.ino == os.stat(volume).st_ino and one.nodeid != two.nodeid
            inside = [share.lookup(node.nodeid, b"sub").nodeid for node in (one, two)]
            assert inside[0] != inside[1]
            fh = share.open(share.lookup(one.nodeid, b"f").nodeid, os.O_RDWR)
            share.write(fh, 0, b"VOLUME")
            for call in (lambda: share.open(share.lookup(two.nodeid, b"f").nodeid, os.O_RDWR),
                         lambda: share.mkdir(two.nodeid, b"new"), lambda: share.unlink(two.nodeid, b"f"),
                         lambda: share.mkdir(inside[1], b"new")):
                with pytest.raises(OSError) as caught:
                    call()
                assert caught.value.errno == EROFS
            read = share.lookup(two.nodeid, b"f").nodeid
            fh = share.open(read)
            share.call(fuse.SETLK, read, share.lock_body(fh, 1, fcntl.F_RDLCK))
            assert fuse.LK_OUT.unpack(share.call(fuse.GETLK, read, share.lock_body(fh, 2, fcntl.F_RDLCK)))[2] == 2
            share.mkdir(inside[0], b"new")
            assert share.lookup(two.nodeid, b"f").nodeid != share.lookup(one.nodeid, b"f").nodeid
        assert (volume / "f").read_text() == "VOLUME" and (volume / "sub/new").is_dir()

    alone(check)


def test_what_is_bound_from_inside_the_share_is_another_node(tree):
    folder, _ = tree

    def check() -> None:
        (folder / "a/x").mkdir()
        bind(folder / "a", folder / "deep/c")
        with Share(folder, submounts=True) as share:
            deep = share.lookup(share.lookup(ROOT, b"deep").nodeid, b"c")
            plain = share.lookup(ROOT, b"a")
            assert deep.ino == plain.ino and deep.nodeid != plain.nodeid
            assert share.lookup(deep.nodeid, b"x").nodeid != share.lookup(plain.nodeid, b"x").nodeid
            with pytest.raises(OSError) as caught:      # what is used as a mount point is in use
                share.rmdir(share.lookup(ROOT, b"deep").nodeid, b"c")
            assert caught.value.errno == 16
            with pytest.raises(OSError) as caught:
                share.rename(plain.nodeid, b"x", deep.nodeid, b"y")
            assert caught.value.errno == EXDEV
            share.rename(deep.nodeid, b"x", deep.nodeid, b"y")
        assert (folder / "a/y").is_dir()

    alone(check)


def test_nothing_outside_a_bound_folder_is_reached(tree):
    """Up, by links, and in a directory that the host moves out of what is bound."""
    folder, volume = tree
    (volume / "inner/d").mkdir(parents=True)
    (volume / "secret").write_text("not for guests")

    def check() -> None:
        bind(volume / "inner", folder / "a")
        (volume / "inner/link").symlink_to("../secret")
        with Share(folder, submounts=True) as share:
            point = share.lookup(ROOT, b"a").nodeid
            for name in (b"..", b".", b"../secret", b"d/.."):
                with pytest.raises(OSError):
                    share.lookup(point, name)
            with pytest.raises(OSError):
                share.open(share.lookup(point, b"link").nodeid, os.O_RDONLY)
            moved = share.lookup(point, b"d").nodeid
            share.releasedir(share.opendir(moved))       # now there is a descriptor of it
            (volume / "inner/d").rename(volume / "d")
            for call in (share.lookup, share.mkdir, share.create):
                with pytest.raises(OSError) as caught:
                    call(moved, b"f")
                assert caught.value.errno == ESTALE
        assert not list((volume / "d").iterdir())

    alone(check)


def test_a_mount_point_moves_with_the_folder_it_is_in(tree):
    folder, volume = tree

    def check() -> None:
        bind(volume, folder / "deep/c")
        with Share(folder, submounts=True) as share:
            share.rename(ROOT, b"deep", ROOT, b"moved")
            share.symlink(ROOT, b"deep", b"/etc")
            point = share.lookup(share.lookup(ROOT, b"moved").nodeid, b"c")
            assert point.ino == os.stat(volume).st_ino
            assert share.read(share.open(share.lookup(point.nodeid, b"f").nodeid, os.O_RDONLY), 0, 100) == b"volume"

    alone(check)


def test_the_table_names_each_mount_once(tree):
    folder, volume = tree

    def check() -> None:
        bind(volume, folder / "a")
        bind(volume / "sub", folder / "a/sub")
        bind(folder / "file", folder / "file")
        fd = os.open(folder, os.O_PATH)
        found = crossings_below(fd)
        share, bound = os.stat(folder), os.stat(volume)
        assert sorted((key[0], key[3], number) for key, number in found.items()) == [
            (0, b"a", 1), (0, b"file", 3), (1, b"sub", 2)]
        assert (0, share.st_dev, share.st_ino, b"a") in found and (1, bound.st_dev, bound.st_ino, b"sub") in found
        os.close(fd)

    alone(check)
