"""Shared folders by a FUSE client: limits, broken requests, arbitrary bytes."""

from __future__ import annotations

import os
from errno import EINVAL

import pytest
from framework.fuse_client import ROOT, Share
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.devices.virtio import fuse, ids
from hv.devices.virtio.fs import HIPRIO, REQUESTS


def test_tens_of_thousands_of_nodes_take_few_descriptors(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "f").write_bytes(b"%d" % number)
    with Share(tmp_path) as share:
        share.device.server.nodes.limit = 10
        nodes = [share.walk(f"{number}/f").nodeid for number in range(300)]
        assert len(share.device.server.nodes._cached) <= 12
        for number in (0, 299, 150):
            assert share.read(share.open(nodes[number]), 0, 9) == b"%d" % number


def test_open_files_are_bounded(tmp_path):
    (tmp_path / "f").touch()
    with Share(tmp_path) as share:
        share.device.server.handles.limit = 5
        node = share.lookup(ROOT, b"f").nodeid
        handles = [share.open(node) for _ in range(5)]
        with pytest.raises(OSError, match="Too many open files"):
            share.open(node)
        share.release(handles[0])
        share.open(node)


def test_a_host_without_descriptors(tmp_path):
    import resource

    (tmp_path / "d").mkdir()
    with Share(tmp_path) as share:
        node = share.walk("d").nodeid
        share.mkdir(node, b"x")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files in system"):
                share.create(node, b"f")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        share.create(node, b"f")


def test_headers_may_be_split_anywhere(tmp_path):
    with Share(tmp_path) as share:
        request = share.header(fuse.MKDIR, ROOT, 10) + fuse.MKDIR_IN.pack(0o755, 0) + b"d\0"
        parts = [request[at:at + 7] for at in range(0, len(request), 7)]
        written, buffers = share.driver.request(REQUESTS, parts, [5] * 40)
        assert written == 16 + fuse.ENTRY_BYTES and (tmp_path / "d").is_dir()
        assert fuse.OUT_HEADER.unpack_from(b"".join(buffers))[:2] == (written, 0)
        body = fuse.WRITE_IN.pack(share.create(ROOT, b"f")[1], 0, 6, 0, 0, 2, 0) + b"abcdef"
        request = share.header(fuse.WRITE, 0, len(body)) + body
        share.driver.request(REQUESTS, [request[:50], request[50:83], request[83:]], [3, 40])
        assert (tmp_path / "f").read_bytes() == b"abcdef"
        body = fuse.READ_IN.pack(share.open(share.lookup(ROOT, b"f").nodeid), 0, 6, 0, 0, 0, 0)
        written, buffers = share.driver.request(REQUESTS, [share.header(fuse.READ, 0, 40) + body], [10, 9, 9])
        assert b"".join(buffers)[:written][16:] == b"abcdef"


def test_broken_requests_are_given_back(tmp_path):
    with Share(tmp_path) as share:
        request = share.driver.request
        assert request(REQUESTS, [b"short"], [64])[0] == 0
        assert request(REQUESTS, [share.header(fuse.GETATTR, ROOT, 16), bytes(16)], [15])[0] == 0
        assert request(REQUESTS, [share.header(fuse.GETATTR, ROOT, 16), bytes(16)], [])[0] == 0
        assert request(REQUESTS, [share.header(fuse.GETATTR, ROOT, 16), bytes(16)], [16 + 50])[0] == 16     # EIO
        assert request(HIPRIO, [share.header(fuse.FORGET, ROOT, 0)], [])[0] == 0
        assert share.device.faults >= 4 and not share.device.status & ids.NEEDS_RESET
        assert share.getattr(ROOT)


def test_a_write_with_less_data_than_announced(tmp_path):
    with Share(tmp_path) as share:
        _, fh = share.create(ROOT, b"f")
        with pytest.raises(OSError) as caught:
            share.call(fuse.WRITE, 0, fuse.WRITE_IN.pack(fh, 0, 100, 0, 0, 2, 0), data=b"x" * 99)
        assert caught.value.errno == EINVAL
        assert (tmp_path / "f").stat().st_size == 0


def test_a_reset_closes_everything(tmp_path):
    before = os.listdir("/proc/self/fd")
    share = Share(tmp_path)
    for number in range(20):
        share.create(share.mkdir(ROOT, b"d%d" % number).nodeid, b"f")
    share.opendir(ROOT)
    share.device.set_status(0)
    assert len(share.device.server.nodes.by_id) == 1 and not share.device.server.handles.by_number
    share.device.close()
    assert os.listdir("/proc/self/fd") == before


opcodes = st.one_of(st.integers(1, 52), st.integers(0, 0xFFFFFFFF))
small = st.integers(0, 6)
bodies = st.one_of(st.binary(max_size=120), st.builds(
    lambda numbers, tail: b"".join(n.to_bytes(8, "little") for n in numbers) + tail,
    st.lists(st.one_of(small, st.integers(0, (1 << 64) - 1)), max_size=8),
    st.sampled_from([b"", b"f\0", b"d\0", b"new\0", b"d\0x\0", b"..\0", b"/\0", b"a/b\0", b"user.a\0v", b"l\0"])))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(opcodes, small, bodies, st.integers(0, 300)), max_size=12))
def test_no_bytes_break_the_server(tmp_path_factory, requests):
    outside = tmp_path_factory.mktemp("outside")
    inside = outside / "share"
    inside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "f").write_text("file")
    (inside / "d").mkdir()
    (inside / "l").symlink_to("../secret")
    status = os.stat(outside / "secret")
    with Share(inside) as share:
        for name in (b"f", b"d", b"l"):
            share.lookup(ROOT, name)
        share.open(2, os.O_RDWR)
        share.opendir(3)
        for opcode, nodeid, body, room in requests:
            share.send(opcode, nodeid, body, room)
        share.received_any()
        assert not share.device.status & ids.NEEDS_RESET
    assert sorted(os.listdir(outside)) == ["secret", "share"]
    after = os.stat(outside / "secret")
    assert (after.st_mode, after.st_mtime_ns, after.st_uid, after.st_nlink) == (status.st_mode, status.st_mtime_ns,
                                                                                 status.st_uid, 1)
