"""Users and groups of an image, hostile ones too."""

from __future__ import annotations

import os

import pytest
from framework.bundle import config

from hv.container.program import Program
from hv.errors import ConfigError
from hv.instance.users import find_user
from hv.sandbox.guest import home_of


@pytest.fixture
def root(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nann:x:1000:1001::/:/bin/sh\nbad\nx:y:z:w:::\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nann:x:1001:\nwheel:x:10:root,ann\nbad\naudio:x:29:ann\n")
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("text, uid, gid, groups", [
    ("", 0, 0, [10]), ("0:0", 0, 0, []), ("ann", 1000, 1001, [10, 29]), ("1000", 1000, 1001, [10, 29]),
    ("ann:wheel", 1000, 10, []), ("5:7", 5, 7, []), ("77", 77, 0, []), ("ann:0", 1000, 0, [])])
def test_users(root, text, uid, gid, groups):
    user = find_user(root, text, [])
    assert (user.uid, user.gid, user.groups) == (uid, gid, groups)


def test_more_groups(root):
    assert find_user(root, "ann", ["audio", "55"]).groups == [10, 29, 55]


@pytest.mark.parametrize("text", ["nobody", "ann:nope", "99999999999", "-1", "x", "²"])
def test_who_is_not_there(root, text):
    with pytest.raises(ConfigError, match="-u"):
        find_user(root, text, [])


def test_a_link_out_of_the_image_is_not_followed(tmp_path, root):
    (tmp_path / "etc/passwd").unlink()
    (tmp_path / "outside").write_text("evil:x:5:5:::\n")
    os.symlink("/proc/self/root" + str(tmp_path / "outside"), tmp_path / "etc/passwd")
    with pytest.raises(ConfigError):
        find_user(root, "evil", [])


@pytest.mark.parametrize("kind", ["fifo", "folder", "big", "binary"])
def test_files_that_are_none(tmp_path, root, kind):
    path = tmp_path / "etc/passwd"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"a" * (8 << 20) if kind == "big" else os.urandom(4096))
    assert find_user(root, "7", []).uid == 7


def test_what_is_no_file_is_not_opened(root, tmp_path):
    """A device of the image would be the host's: some act on being opened, a watchdog say. A FIFO tells if it was."""
    row = b"ann:x:1000:1001::/stolen:/bin/sh\n"
    (tmp_path / "etc/passwd").unlink()
    os.mkfifo(tmp_path / "etc/passwd")
    fifo = os.open(tmp_path / "etc/passwd", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(fifo, row)
        with pytest.raises(ConfigError, match="no user 'ann'"):
            find_user(root, "ann", [])
        assert home_of(root, Program(config("true")["process"] | {"env": [], "user": {"uid": 1000}})) == "/"
        assert os.read(fifo, 99) == row
    finally:
        os.close(fifo)
    (tmp_path / "etc/passwd").unlink()
    (tmp_path / "etc/passwd").mkdir()
    assert home_of(root, Program(config("true")["process"] | {"env": []})) == "/"
