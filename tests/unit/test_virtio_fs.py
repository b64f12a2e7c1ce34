"""Shared folders by a FUSE client over the mock driver: sessions, names, files, directories, broken requests."""

from __future__ import annotations

import os
import stat
from errno import (
    EBADF,
    EEXIST,
    EINVAL,
    EIO,
    EISDIR,
    ENAMETOOLONG,
    ENOENT,
    ENOSYS,
    ENOTDIR,
    ENXIO,
    EPERM,
    EPROTO,
    EROFS,
    ESTALE,
)

import pytest
from framework.fuse_client import PAGE, ROOT, Share

from hv.devices.virtio import fuse
from hv.devices.virtio.fs_config import ShareConfig
from hv.errors import ConfigError


def fails(number: int, call, *arguments, **options) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno == number


@pytest.fixture
def share(tmp_path):
    with Share(tmp_path) as share:
        yield share
        assert not share.device.faults, share.device.fault_texts


def test_configuration_space_and_tags(tmp_path):
    with Share(tmp_path) as share:
        assert share.device.config() == b"share".ljust(36, b"\0") + b"\1\0\0\0"     # a machine gives it a number
        assert share.device.read_config(36, 4) == 1 and share.device.read_config(40, 4) == 0
    with Share(tmp_path, tag="x" * 36) as share:
        assert share.device.config()[:36] == b"x" * 36


@pytest.mark.parametrize("options", [{"tag": "x" * 37}, {"tag": True}, {"timeout": "soon"}, {"timeout": -1},
                                     {"readonly": "yes"}, {"vhost_user": "s"}, {"directory": ""},
                                     {"directory": "", "vhost_user": "s", "readonly": True}])
def test_bad_options(tmp_path, options):
    with pytest.raises(ConfigError):
        ShareConfig(**{"directory": str(tmp_path), **options})


def test_bad_folders(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "absent"):
        with pytest.raises(ConfigError, match=name):
            ShareConfig(tmp_path / name).create()


def test_init_takes_what_both_know(tmp_path):
    with Share(tmp_path, init=False) as share:
        fails(EIO, share.lookup, ROOT, b"x")
        fails(EPROTO, share.init, minor=27)
        major, minor, readahead, flags, _, _, max_write, gran, pages, _, _ = share.init()
        assert (major, minor, readahead, max_write, gran, pages) == (7, 38, 1 << 17, 1 << 20, 1, 256)
        assert flags & fuse.POSIX_LOCKS and flags & fuse.DO_READDIRPLUS and flags & fuse.CACHE_SYMLINKS
        assert not flags & 1 << 16         # WRITEBACK_CACHE
        assert share.init(flags=fuse.ASYNC_READ)[3] == fuse.ASYNC_READ
        reply = share.call(fuse.INIT, 0, fuse.INIT_IN.pack(8, 0, 0, 0))
        assert fuse.INIT_OUT.unpack(reply)[:2] == (7, 38)


def test_destroy_ends_the_session(share, tmp_path):
    (tmp_path / "f").touch()
    node = share.lookup(ROOT, b"f")
    fh = share.open(node.nodeid)
    share.call(fuse.DESTROY, 0)
    share.init()
    fails(ESTALE, share.getattr, node.nodeid)
    fails(EBADF, share.read, fh, 0, 1)


def test_read_and_write_go_through(share, tmp_path):
    data = os.urandom(3 * PAGE + 5)
    node, fh = share.create(ROOT, b"f", mode=0o640)
    assert share.write(fh, 10, data) == len(data)
    assert (tmp_path / "f").read_bytes() == bytes(10) + data
    assert share.read(fh, 10, len(data)) == data and share.read(fh, PAGE, PAGE) == data[PAGE - 10:2 * PAGE - 10]
    assert share.read(fh, 1 << 40, 100) == b"" and share.write(fh, 0, b"") == 0
    assert stat.S_IMODE(os.stat(tmp_path / "f").st_mode) == 0o640 == stat.S_IMODE(node.mode)
    fails(EINVAL, share.read, fh, (1 << 63) - 5, 10)
    fails(EBADF, share.read, fh + 1, 0, 1)
    share.release(fh)
    fails(EBADF, share.read, fh, 0, 1)


def test_the_umask_of_the_host_takes_nothing_away(share, tmp_path):
    before = os.umask(0o077)
    try:
        share.create(ROOT, b"f", mode=0o666)
        share.mkdir(ROOT, b"d", 0o1777)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "fd"] == [0o666, 0o1777]


def test_append_and_write_back(share, tmp_path):
    """O_APPEND writes go to the end wherever the file ends by now; dirty pages go where they belong."""
    (tmp_path / "f").write_bytes(b"0123")
    fh = share.open(share.lookup(ROOT, b"f").nodeid, os.O_RDWR | os.O_APPEND)
    (tmp_path / "f").write_bytes(b"01234567")
    share.write(fh, 4, b"end", flags=os.O_RDWR | os.O_APPEND)
    share.write(fh, 0, b"#", flags=os.O_RDWR | os.O_APPEND, write_flags=fuse.WRITE_CACHE)
    assert (tmp_path / "f").read_bytes() == b"#1234567end"


def test_create_opens_what_is_there_already(share, tmp_path):
    (tmp_path / "f").write_bytes(b"text")
    os.mkfifo(tmp_path / "fifo")
    node, fh = share.create(ROOT, b"f", flags=os.O_RDWR)
    assert share.read(fh, 0, 9) == b"text" and node.size == 4
    fails(EEXIST, share.create, ROOT, b"f", flags=os.O_RDWR | os.O_EXCL)
    assert share.create(ROOT, b"f", flags=os.O_RDWR | os.O_TRUNC)[0].size == 0
    fails(ENXIO, share.create, ROOT, b"fifo")


def test_only_regular_files_are_opened(share, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "dir").mkdir()
    fails(ENXIO, share.open, share.lookup(ROOT, b"fifo").nodeid)
    fails(ENXIO, share.open, share.lookup(ROOT, b"link").nodeid)
    fails(EISDIR, share.open, share.lookup(ROOT, b"dir").nodeid)
    fails(ENOTDIR, share.opendir, share.lookup(ROOT, b"fifo").nodeid)
    assert share.readlink(share.lookup(ROOT, b"link").nodeid) == b"/etc/passwd"


def test_nodes_that_can_and_can_not_be_made(share, tmp_path):
    for kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
        assert stat.S_IFMT(share.mknod(ROOT, b"n%o" % kind, kind | 0o600).mode) == kind
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, stat.S_IFLNK):
        fails(EPERM, share.mknod, ROOT, b"bad", kind | 0o600, 0x801)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc/passwd", b"../x", b"x/.."])
def test_a_name_is_one_component(share, tmp_path, name):
    (tmp_path / "f").touch()
    node = share.lookup(ROOT, b"f").nodeid
    for call in (share.lookup, share.mkdir, share.unlink, share.rmdir, share.create):
        fails(EINVAL, call, ROOT, name)
    fails(EINVAL, share.mknod, ROOT, name, stat.S_IFREG)
    fails(EINVAL, share.symlink, ROOT, name, b"x")
    fails(EINVAL, share.link, node, ROOT, name)
    fails(EINVAL, share.rename, ROOT, name, ROOT, b"y")
    fails(EINVAL, share.rename, ROOT, b"f", ROOT, name, 0)
    fails(ENAMETOOLONG, share.lookup, ROOT, b"x" * 256)
    fails(EINVAL, share.call, fuse.LOOKUP, ROOT, b"no end")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_is_not_there_is_remembered_as_long_as_what_is(tmp_path):
    with Share(tmp_path, timeout="2.5") as share:
        reply = share.call(fuse.LOOKUP, ROOT, b"absent\0")
        assert fuse.ENTRY_OUT.unpack_from(reply) == (0, 0, 2, 0, 500_000_000, 0)
        assert share.mkdir(ROOT, b"d").valid == 2.5
    with Share(tmp_path, timeout=0) as share:
        fails(ENOENT, share.call, fuse.LOOKUP, ROOT, b"absent\0")


def test_rename_over_an_open_file(share, tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    old, new = share.lookup(ROOT, b"old"), share.lookup(ROOT, b"new")
    fh = share.open(new.nodeid, os.O_RDWR)
    share.rename(ROOT, b"old", ROOT, b"new")
    assert share.read(fh, 0, 9) == b"new" and share.getattr(new.nodeid).nlink == 0
    assert share.read(share.open(old.nodeid), 0, 9) == b"old"
    assert share.lookup(ROOT, b"new").nodeid == old.nodeid


def test_rename_flags(share, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    a, b = share.lookup(ROOT, b"a").nodeid, share.lookup(ROOT, b"b").nodeid
    fails(EEXIST, share.rename, ROOT, b"a", ROOT, b"b", 1)
    share.rename(ROOT, b"a", ROOT, b"b", 2)
    assert (tmp_path / "a").read_bytes() == b"b" and share.lookup(ROOT, b"b").nodeid == a
    assert share.read(share.open(b), 0, 1) == b"b" and share.read(share.open(a), 0, 1) == b"a"
    fails(EINVAL, share.rename, ROOT, b"a", ROOT, b"c", 4)       # RENAME_WHITEOUT


def test_unlink_while_open_and_while_only_known(share, tmp_path):
    node, fh = share.create(ROOT, b"f")
    known, closed = share.create(ROOT, b"g")
    share.release(closed)
    share.unlink(ROOT, b"f")
    share.write(fh, 0, b"still here")
    assert share.getattr(node.nodeid).nlink == 0 and share.read(fh, 0, 99) == b"still here"
    share.unlink(ROOT, b"g")
    assert share.getattr(known.nodeid).nlink == 0 and not list(tmp_path.iterdir())
    (tmp_path / "over").touch()
    (tmp_path / "new").touch()
    known = share.lookup(ROOT, b"over")
    share.rename(ROOT, b"new", ROOT, b"over")
    assert share.getattr(known.nodeid).nlink == 0 and share.lookup(ROOT, b"over").nodeid != known.nodeid


def test_hard_links_outlive_each_other(share):
    node, _ = share.create(ROOT, b"one")
    assert share.link(node.nodeid, ROOT, b"two").nlink == 2
    share.unlink(ROOT, b"one")
    share.rename(ROOT, b"two", ROOT, b"three")
    again = share.lookup(ROOT, b"three")
    assert (again.nodeid, again.nlink) == (node.nodeid, 1)


def test_what_a_failed_removal_leaves(share, tmp_path):
    node = share.mkdir(ROOT, b"d")
    (tmp_path / "d/x").touch()
    with pytest.raises(OSError):
        share.rmdir(ROOT, b"d")
    assert not share.device.server.nodes._kept
    assert share.lookup(node.nodeid, b"x").nodeid


@pytest.mark.parametrize("plus", [False, True])
def test_a_large_directory_loses_nothing(share, tmp_path, plus):
    wanted = {b"entry-%d" % number for number in range(10000)}
    for name in wanted:
        os.close(os.open(tmp_path / os.fsdecode(name), os.O_CREAT | os.O_WRONLY))
    found = share.list(ROOT, plus)
    names = [name for name, _, _ in found]
    assert len(names) == 10002 and set(names) == wanted | {b".", b".."}
    assert all(bool(nodeid) == (plus and name[:1] != b".") for name, _, nodeid in found)
    assert len(share.device.server.nodes.by_id) == (10001 if plus else 1)
    assert len(os.listdir("/proc/self/fd")) < 100       # none of them has a descriptor
    if plus:
        share.getattr(found[5000][2] or found[5001][2])


def test_offsets_hold_while_entries_go(share, tmp_path):
    for number in range(1000):
        (tmp_path / f"{number:04}").touch()
    fh = share.opendir(ROOT)
    everything = []
    while part := share.readdir(fh, everything[-1][1] if everything else 0):
        everything += part
    for name, _, _ in everything[::3]:
        if name[:1] != b".":
            share.unlink(ROOT, name)
    left = [row for number, row in enumerate(everything) if number % 3 or row[0][:1] == b"."]
    at = left.index(next(row for row in left[500:] if row[0] != b"."))
    again, offset = [], left[at][1]
    while part := share.readdir(fh, offset):
        again += part
        offset = part[-1][1]
    assert [row[0] for row in again] == [row[0] for row in left[at + 1:]]
    assert share.readdir(fh, 0)[0] == everything[0] or share.readdir(fh, 0)


def test_nothing_is_above_the_root(share, tmp_path):
    inode = tmp_path.stat().st_ino
    fh = share.opendir(ROOT)
    reply = share.call(fuse.READDIR, 0, fuse.READ_IN.pack(fh, 0, PAGE, 0, 0, 0, 0), room=PAGE)
    at = reply.index(b"..") - fuse.DIRENT.size
    assert fuse.DIRENT.unpack_from(reply, at)[0] == inode


def test_nodes_are_forgotten(share, tmp_path):
    (tmp_path / "f").touch()
    node = share.lookup(ROOT, b"f").nodeid
    assert share.lookup(ROOT, b"f").nodeid == node
    share.forget(node)
    share.getattr(node)
    share.quietly(fuse.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(2, 0) + fuse.FORGET_ONE.pack(node, 1)
                  + fuse.FORGET_ONE.pack(ROOT, 1))
    fails(ESTALE, share.getattr, node)
    share.getattr(ROOT)
    assert share.lookup(ROOT, b"f").nodeid > node       # numbers are not used again


def test_forgetting_too_much_is_a_fault(tmp_path):
    (tmp_path / "f").touch()
    with Share(tmp_path) as share:
        node = share.lookup(ROOT, b"f").nodeid
        share.forget(node, 2)
        share.forget(77)
        assert share.device.faults == 2 and share.getattr(node)


def test_pages_are_kept_only_while_the_file_is_the_same(share, tmp_path):
    (tmp_path / "f").write_bytes(b"1")
    node = share.lookup(ROOT, b"f").nodeid
    assert [share.open_flags(node)[1] for _ in range(2)] == [0, fuse.FOPEN_KEEP_CACHE]
    (tmp_path / "f").write_bytes(b"22")
    assert [share.open_flags(node)[1] for _ in range(2)] == [0, fuse.FOPEN_KEEP_CACHE]


def test_holes_and_copies(share, tmp_path):
    _, fh = share.create(ROOT, b"f")
    share.write(fh, 1 << 20, b"x" * PAGE)
    seek = fuse.LSEEK_IN.pack(fh, 0, os.SEEK_DATA, 0)
    assert share.call(fuse.LSEEK, 0, seek) == fuse.LSEEK_OUT.pack(1 << 20)
    fails(EINVAL, share.call, fuse.LSEEK, 0, fuse.LSEEK_IN.pack(fh, 0, os.SEEK_SET, 0))
    share.call(fuse.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(fh, 1 << 20, PAGE, 3, 0))
    fails(ENXIO, share.call, fuse.LSEEK, 0, seek)
    _, other = share.create(ROOT, b"g")
    share.write(fh, 0, b"copied")
    copied = share.call(fuse.COPY_FILE_RANGE, 0, fuse.COPY_FILE_RANGE_IN.pack(fh, 1, 0, other, 2, 5, 0))
    assert fuse.WRITE_OUT.unpack(copied)[0] == 5 and (tmp_path / "g").read_bytes() == b"\0\0opied"
    for opcode, body in ((fuse.FSYNC, fuse.FSYNC_IN.pack(fh, 0, 0)), (fuse.FSYNC, fuse.FSYNC_IN.pack(fh, 1, 0)),
                         (fuse.FSYNCDIR, fuse.FSYNC_IN.pack(share.opendir(ROOT), 0, 0)), (fuse.SYNCFS, bytes(8))):
        assert share.call(opcode, ROOT, body) == b""


def test_statfs(share, tmp_path):
    host = os.statvfs(tmp_path)
    found = fuse.STATFS_OUT.unpack(share.call(fuse.STATFS, ROOT))
    assert found[0] == host.f_blocks and found[5:] == (host.f_bsize, host.f_namemax, host.f_frsize)


def test_unknown_operations_are_not_there(share):
    for opcode in (0, 7, 19, fuse.ACCESS, 37, 39, 40, 41, 48, 49, 51, 4096, 0xFFFFFFFF):
        fails(ENOSYS, share.call, opcode, ROOT, bytes(64))


def test_a_read_only_share(tmp_path):
    (tmp_path / "f").write_bytes(b"text")
    before = os.stat(tmp_path / "f")
    with Share(tmp_path, readonly=True) as share:
        node = share.lookup(ROOT, b"f").nodeid
        assert share.read(share.open(node), 0, 9) == b"text"
        for call in (share.mkdir, share.unlink, share.rmdir, share.create):
            fails(EROFS, call, ROOT, b"f")
        fails(EROFS, share.open, node, os.O_WRONLY)
        fails(EROFS, share.open, node, os.O_RDONLY | os.O_TRUNC)
        fails(EROFS, share.symlink, ROOT, b"l", b"x")
        fails(EROFS, share.link, node, ROOT, b"l")
        fails(EROFS, share.rename, ROOT, b"f", ROOT, b"g", 0)
        fails(EROFS, share.setattr, node, fuse.FATTR_MODE, mode=0)
        fails(EROFS, share.setxattr, node, b"user.x", b"y")
        fails(EROFS, share.write, share.open(node), 0, b"x")
    after = os.stat(tmp_path / "f")
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_mode) == (before.st_mtime_ns, before.st_ctime_ns,
                                                                      before.st_mode)
