"""The system calls on files that Python lacks."""

from __future__ import annotations

import os
from ctypes import create_string_buffer
from errno import EEXIST, ELOOP, EXDEV

import pytest

from hv.linux import files
from hv.linux.credentials import ActingAs


def test_open_beneath_follows_nothing_and_leaves_nothing(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    at = os.open(tmp_path, os.O_PATH)
    fd = files.open_beneath(b"link", at)
    assert os.readlink(b"", dir_fd=fd) == b"d" and not os.get_inheritable(fd)
    os.close(fd)
    for name, numbers in ((b"..", (EXDEV,)), (b"/", (EXDEV,)), (b"link/x", (ELOOP,))):
        with pytest.raises(OSError) as caught:
            files.open_beneath(name, at)
        assert caught.value.errno in numbers
    os.close(at)


def test_rename_flags_times_and_directories(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    at = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError) as caught:
        files.rename(at, b"a", at, b"b", files.RENAME_NOREPLACE)
    assert caught.value.errno == EEXIST
    files.rename(at, b"a", at, b"b", files.RENAME_EXCHANGE)
    assert (tmp_path / "a").read_text() == "b"
    files.set_times(os.fsencode(tmp_path / "a"), (0, files.OMIT), (-3, 7))
    status = os.stat(tmp_path / "a")
    assert status.st_mtime_ns == -3 * 10**9 + 7 and status.st_atime > 10**9
    assert files.read_directory(at, create_string_buffer(4096)) > 0
    assert files.read_directory(at, create_string_buffer(4096)) == 0
    files.sync_filesystem(at)
    os.close(at)


@pytest.mark.skipif(os.getuid() != 0, reason="only root acts as others")
def test_acting_as_somebody_else_ends_with_the_block(tmp_path):
    tmp_path.chmod(0o700)               # closed to the other, whose permissions are not asked
    with ActingAs(1000, 2000):
        (tmp_path / "theirs").touch()
    (tmp_path / "ours").touch()
    assert (os.stat(tmp_path / "theirs").st_uid, os.stat(tmp_path / "theirs").st_gid) == (1000, 2000)
    assert os.stat(tmp_path / "ours").st_uid == 0
    with pytest.raises(ZeroDivisionError), ActingAs(1000, 2000):
        raise ZeroDivisionError
    (tmp_path / "ours too").touch()
    assert os.stat(tmp_path / "ours too").st_uid == 0
