"""Copies with holes: contents, blocks, what is replaced, and every way down to reading and writing."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct

import pytest

from hv.linux import sparse
from hv.linux.sparse import copy_sparse

PAGE = 4096
DATA = random.Random(5)


def file(path, parts: dict[int, bytes], size: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    for at, data in parts.items():
        os.pwrite(fd, data, at)
    return fd


@pytest.fixture
def pair(tmp_path):
    """A source of 8 MiB with data in three places, and an empty target."""
    source = file(tmp_path / "source", {0: DATA.randbytes(PAGE), 3 << 20: DATA.randbytes(3 * PAGE + 100),
                                        (8 << 20) - 700: DATA.randbytes(700)}, 8 << 20)
    target = file(tmp_path / "target", {}, 8 << 20)
    yield source, target
    os.close(source)
    os.close(target)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def refuse(number: int):
    def call(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("without", ["", "clone", "clone and copy_file_range", "holes"])
def test_contents_and_holes(pair, monkeypatch, without):
    source, target = pair
    if "clone" in without:
        monkeypatch.setattr(sparse, "_clone", lambda *args: False)
    if "copy_file_range" in without:
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    if without == "holes":      # as on a block device
        monkeypatch.setattr(os, "lseek", refuse(errno.EINVAL))
    copy_sparse(source, 0, target, 0, 8 << 20)
    assert content(target) == content(source)
    if without != "holes":
        assert os.fstat(target).st_blocks <= os.fstat(source).st_blocks + 8


def test_a_part_goes_elsewhere(pair):
    source, target = pair
    copy_sparse(source, (3 << 20) - PAGE, target, 5 * PAGE, 6 * PAGE)
    assert content(target)[5 * PAGE:11 * PAGE] == content(source)[(3 << 20) - PAGE:(3 << 20) + 5 * PAGE]
    assert content(target)[11 * PAGE:] == bytes((8 << 20) - 11 * PAGE)


@pytest.mark.parametrize("by_hand", [False, True])
def test_over_replaces_what_is_there(pair, monkeypatch, by_hand):
    source, target = pair
    os.pwrite(target, b"\xff" * (8 << 20), 0)
    os.pwrite(source, bytes(1 << 20), 1 << 20)      # zeros that are no hole
    if by_hand:
        monkeypatch.setattr(sparse, "_clone", lambda *args: False)
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSYS))
        monkeypatch.setattr(sparse, "fallocate", refuse(errno.EOPNOTSUPP))
    copy_sparse(source, 0, target, 0, 4 << 20, over=True)
    assert content(target) == content(source)[:4 << 20] + b"\xff" * (4 << 20)


def test_a_source_that_ends_early_reads_as_zeros(pair):
    source, target = pair
    os.ftruncate(source, PAGE)
    copy_sparse(source, 0, target, 0, 8 << 20)
    assert content(target) == content(source) + bytes((8 << 20) - PAGE)


def test_what_is_asked_of_a_file_system_that_can_share(pair, monkeypatch):
    """No file system here can, so this holds the request against the kernel's description of it."""
    source, target = pair
    asked = []
    monkeypatch.setattr(fcntl, "ioctl",
                        lambda fd, request, data: asked.append((fd, request, struct.unpack("<qQQQ", data))))
    copy_sparse(source, PAGE, target, 2 * PAGE, 3 * PAGE + 512)
    # ioctl_ficlonerange(2): src_fd, src_offset, src_length, dest_offset; whole blocks
    assert asked == [(target, 0x4020940D, (source, PAGE, 3 * PAGE, 2 * PAGE))]


def test_errors_of_the_host_are_told(pair, monkeypatch):
    source, target = pair
    monkeypatch.setattr(sparse, "_clone", lambda *args: False)
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        copy_sparse(source, 0, target, 0, 8 << 20)
    monkeypatch.undo()
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EDQUOT))
    with pytest.raises(OSError, match="quota"):
        copy_sparse(source, 0, target, 0, 8 << 20)
