"""The initramfs writer, read back by the system's own cpio."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess

import pytest

from hv.boot.cpio import Archive
from hv.errors import ImageError

needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")


def listing(data: bytes) -> list[str]:
    done = subprocess.run(["cpio", "-tv", "--quiet"], input=data, capture_output=True, timeout=30, check=True)
    return done.stdout.decode().splitlines()


@needs_cpio
def test_every_kind_of_entry_survives():
    archive = Archive()
    archive.add_file("etc/deep/hostname", b"guest\n", 0o600)
    archive.add_symlink("bin/sh", "busybox")
    archive.add_node("dev/console", stat.S_IFCHR | 0o600, 5, 1)
    data = archive.finish()
    assert len(data) % 512 == 0
    lines = "\n".join(listing(data))
    for wanted in ("drwxr-xr-x", "etc/deep/hostname", "bin/sh -> busybox", "dev/console", "5,   1", "-rw-------"):
        assert wanted in lines


@needs_cpio
def test_a_tree_is_packed_as_it_is(tmp_path):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").write_bytes(os.urandom(5000))
    (root / "init").write_bytes(b"#!/bin/sh\n")
    (root / "init").chmod(0o755)
    (root / "link").symlink_to("a/b/file")
    archive = Archive()
    archive.add_tree(str(root))
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["cpio", "-id", "--quiet"], input=archive.finish(), cwd=out, timeout=30, check=True)
    assert (out / "a/b/file").read_bytes() == (root / "a/b/file").read_bytes()
    assert os.access(out / "init", os.X_OK) and os.readlink(out / "link") == "a/b/file"


@pytest.mark.parametrize("name", ["", "/", "../etc/passwd", "a/../../b", "TRAILER!!!"])
def test_names_that_escape_are_refused(name):
    with pytest.raises(ImageError):
        Archive().add_file(name, b"")


def test_sockets_and_missing_directories_are_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ImageError, match="socket"):
            Archive().add_tree(str(tmp_path))
    with pytest.raises(ImageError, match="No such file"):
        Archive().add_tree(str(tmp_path / "absent"))
