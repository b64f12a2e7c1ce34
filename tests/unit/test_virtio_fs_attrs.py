"""Attributes, owners and extended attributes of shared folders, by a FUSE client."""

from __future__ import annotations

import os
import stat
from errno import EINVAL, EISDIR, ENODATA, EOPNOTSUPP, ERANGE

import pytest
from framework.fuse_client import ROOT, Share

from hv.devices.virtio import fuse

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")


def fails(number: int, call, *arguments, **options) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno == number


@pytest.fixture
def share(tmp_path):
    with Share(tmp_path) as share:
        yield share
        assert not share.device.faults, share.device.fault_texts


def test_attributes_are_the_hosts(share, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "f", ns=(1_500_000_000_123_456_789, -4_999_999_999))
    found, host = share.lookup(ROOT, b"f"), os.stat(tmp_path / "f")
    assert (found.ino, found.size, found.blocks, found.mode, found.nlink) == (
        host.st_ino, 5000, host.st_blocks, host.st_mode, 1)
    assert (found.atime, found.atimensec) == (1_500_000_000, 123_456_789)
    assert (found.mtime, found.mtimensec) == (2**64 - 5, 1)
    assert share.getattr(found.nodeid)[:-1] == found[:-1] == share.getattr(found.nodeid, share.open(found.nodeid))[:-1]


def test_device_numbers(tmp_path):
    with Share("/dev", readonly=True) as share:
        zero = share.lookup(ROOT, b"zero")
    assert stat.S_ISCHR(zero.mode) and zero.rdev == (1 << 8 | 5)


def test_size_mode_and_times(share, tmp_path):
    node, fh = share.create(ROOT, b"f")
    assert share.setattr(node.nodeid, fuse.FATTR_SIZE, size=100).size == 100
    assert share.setattr(node.nodeid, fuse.FATTR_SIZE | fuse.FATTR_FH, fh=fh, size=7).size == 7
    fails(EINVAL, share.setattr, node.nodeid, fuse.FATTR_SIZE, size=1 << 63)
    fails(EISDIR, share.setattr, ROOT, fuse.FATTR_SIZE, size=1)
    assert share.setattr(node.nodeid, fuse.FATTR_MODE, mode=0o104711).mode == stat.S_IFREG | 0o4711
    found = share.setattr(node.nodeid, fuse.FATTR_MTIME, mtime=(-7, 3))
    assert os.stat(tmp_path / "f").st_mtime_ns == -7 * 10**9 + 3 and found.atime == node.atime
    fails(EINVAL, share.setattr, node.nodeid, fuse.FATTR_MTIME, mtime=(0, 10**9))
    now = share.setattr(node.nodeid, fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW)
    assert now.mtime > 1_600_000_000 and now.atime == now.mtime


def test_links_have_times_and_owners_but_no_mode(share, tmp_path):
    (tmp_path / "target").touch()
    node = share.symlink(ROOT, b"l", b"target").nodeid
    before = os.stat(tmp_path / "target").st_mtime_ns
    fails(EOPNOTSUPP, share.setattr, node, fuse.FATTR_MODE, mode=0o600)
    assert share.setattr(node, fuse.FATTR_MTIME, mtime=(5, 0)).mtime == 5
    assert os.lstat(tmp_path / "l").st_mtime == 5 and os.stat(tmp_path / "target").st_mtime_ns == before


def test_attributes_without_a_name(share):
    """A file that is open but removed has attributes still."""
    node, _ = share.create(ROOT, b"f")
    share.unlink(ROOT, b"f")
    assert share.setattr(node.nodeid, fuse.FATTR_SIZE | fuse.FATTR_MODE, size=9, mode=0o600).size == 9
    share.setxattr(node.nodeid, b"user.a", b"1")
    assert share.getxattr(node.nodeid, b"user.a") == b"1" and share.getattr(node.nodeid).nlink == 0


@needs_root
def test_new_files_belong_to_the_guests_user(share, tmp_path):
    share.uid, share.gid = 1000, 1001
    (tmp_path / "inherits").mkdir()
    os.chown(tmp_path / "inherits", 5, 6)
    os.chmod(tmp_path / "inherits", 0o2700)             # not writable for 1000: the guest has checked that
    parent = share.lookup(ROOT, b"inherits").nodeid
    made = [share.create(ROOT, b"f")[0], share.mkdir(ROOT, b"d"), share.symlink(ROOT, b"l", b"x"),
            share.mknod(ROOT, b"p", stat.S_IFIFO | 0o600)]
    assert {(node.uid, node.gid) for node in made} == {(1000, 1001)}
    inherited = share.mkdir(parent, b"d", 0o700)
    assert (inherited.uid, inherited.gid, inherited.mode) == (1000, 6, stat.S_IFDIR | 0o2700)
    assert share.create(parent, b"f")[0].gid == 6
    (tmp_path / "by-us").touch()
    assert os.stat(tmp_path / "by-us").st_uid == os.getuid()        # the thread is itself again
    assert share.setattr(made[0].nodeid, fuse.FATTR_UID, uid=7).uid == 7
    assert share.setattr(made[2].nodeid, fuse.FATTR_GID, gid=8).gid == 8
    assert share.setattr(made[0].nodeid, fuse.FATTR_UID, uid=0xFFFFFFFF).uid == 7       # nobody's number


def test_without_root_all_is_our_own(tmp_path):
    with Share(tmp_path) as share:
        share.device.server.own = None
        share.uid = share.gid = 4321
        assert share.create(ROOT, b"f")[0].uid == os.getuid()


def test_writing_kills_set_user_id(share, tmp_path):
    node, fh = share.create(ROOT, b"f", mode=0o755)
    for change in (lambda: share.write(fh, 0, b"x", write_flags=fuse.WRITE_KILL_SUIDGID),
                   lambda: share.setattr(node.nodeid, fuse.FATTR_SIZE | fuse.FATTR_KILL_SUIDGID, size=0),
                   lambda: share.open(node.nodeid, os.O_WRONLY | os.O_TRUNC, fuse.OPEN_KILL_SUIDGID)):
        os.chmod(tmp_path / "f", 0o6755)
        change()
        assert stat.S_IMODE(os.stat(tmp_path / "f").st_mode) == 0o755
    os.chmod(tmp_path / "f", 0o6745)            # set-group-ID without group execution is something else
    share.write(fh, 0, b"x", write_flags=fuse.WRITE_KILL_SUIDGID)
    assert stat.S_IMODE(os.stat(tmp_path / "f").st_mode) == 0o2745


def test_extended_attributes(share, tmp_path):
    node = share.create(ROOT, b"f")[0].nodeid
    share.setxattr(node, b"user.a", b"value")
    assert os.getxattr(tmp_path / "f", "user.a") == b"value" == share.getxattr(node, b"user.a")
    assert share.getxattr(node, b"user.a", 0) == fuse.GETXATTR_OUT.pack(5, 0)
    fails(ERANGE, share.getxattr, node, b"user.a", 4)
    fails(17, share.setxattr, node, b"user.a", b"x", os.XATTR_CREATE)
    fails(EINVAL, share.setxattr, node, b"user.b", b"x", 64)
    assert share.listxattr(node) == b"user.a\0" and share.listxattr(node, 0) == fuse.GETXATTR_OUT.pack(7, 0)
    share.call(fuse.REMOVEXATTR, node, b"user.a\0")
    fails(ENODATA, share.getxattr, node, b"user.a")
    short = fuse.SETXATTR_IN.pack(100, 0) + b"user.a\0" + b"x" * 99
    fails(EINVAL, share.call, fuse.SETXATTR, node, short)


def test_attributes_that_mean_something_to_the_host_are_refused(share, tmp_path):
    node = share.create(ROOT, b"f")[0].nodeid
    for name in (b"trusted.overlay.redirect", b"security.selinux", b"system.posix_acl_access", b"plain"):
        fails(EOPNOTSUPP, share.setxattr, node, name, b"x")
        fails(EOPNOTSUPP, share.getxattr, node, name)
        fails(EOPNOTSUPP, share.call, fuse.REMOVEXATTR, node, name + b"\0")
    if os.getuid() == 0:
        os.setxattr(tmp_path / "f", "trusted.x", b"y")
        assert share.listxattr(node) == b""
    link = share.symlink(ROOT, b"l", b"f").nodeid
    fails(ENODATA, share.getxattr, link, b"user.a")
