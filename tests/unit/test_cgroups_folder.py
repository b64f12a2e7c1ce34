"""Control files read and written, and folders walked."""

from __future__ import annotations

import errno
import os

import pytest

from hv.container.cgroups.folder import Folder, make, pids_below, refusal, remove_tree
from hv.errors import ConfigError, HvError


def test_files_are_read_leniently(tmp_path):
    for leaf, text in (("limit", "12\n"), ("max", "max\n"), ("below", "-1\n"), ("stat", "a 1\nb -2\nhot max\n\nc\n")):
        (tmp_path / leaf).write_text(text)
    folder = Folder(str(tmp_path))
    assert (folder.number("limit"), folder.number("below"), folder.number("max", 7), folder.number("none", 9)) == (12,
        -1, 7, 9)
    assert folder.table("stat") == {"a": 1, "b": -2} and folder.table("none") == {}
    assert folder.read("none") == "" and folder.has("max") and not folder.has("none")


def test_long_files_are_read_whole(tmp_path):
    (tmp_path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in range(1, 300001)))
    assert len(pids_below(str(tmp_path))) == 300000


@pytest.mark.parametrize(("number", "kind", "words"), [
    (errno.ENOENT, ConfigError, "this host's kernel has no x.max here"), (errno.EINVAL, ConfigError,
        "x.max does not take 5"),
    (errno.EACCES, HvError, "x.max: Permission denied"), (errno.EROFS, HvError, "Read-only"), (errno.EBUSY, HvError,
        "x.max = 5"),
])
def test_a_refusal_names_field_file_and_cause(number, kind, words):
    error = refusal(OSError(number, ""), "x.max", 5, "pids.limit")
    assert type(error) is kind and words in str(error) and str(error).startswith("linux.resources.pids.limit: ")


def test_a_write_that_fails_is_such_a_refusal(tmp_path):
    with pytest.raises(ConfigError, match=r"pids\.limit: this host's kernel has no pids\.max"):
        Folder(str(tmp_path)).write("pids.max", 5, "pids.limit")
    with pytest.raises(ConfigError, match=r"devices: this host's kernel has no devices\.allow"):
        Folder(str(tmp_path)).write_lines("devices.allow", ["a"], "devices")
    Folder(str(tmp_path)).write_lines("devices.allow", [], "devices")


def test_what_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "cpuset.cpus").write_text("")
    with pytest.raises(ConfigError, match=r"linux\.resources\.cpu\.cpus: '\\ud800' is not text"):
        Folder(str(tmp_path)).write("cpuset.cpus", "\ud800", "cpu.cpus")
    with pytest.raises(ConfigError, match=r"unified\[x\].*is not text"):
        Folder(str(tmp_path)).write("cpuset.\ud800", "0", "unified[x]")
    with pytest.raises(ConfigError, match="is not text"):
        Folder(str(tmp_path)).write_lines("cpuset.cpus", ["0", "\ud800"], "x")


def test_making_makes_what_is_above_too(tmp_path):
    path = f"{tmp_path}/a/b/c"
    assert make(path) and not make(path)
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        (tmp_path / "file").write_text("")
        make(f"{tmp_path}/file/x")


def test_a_group_above_that_vanishes_meanwhile_is_made_again(tmp_path, monkeypatch):
    lost = []
    real = os.mkdir

    def mkdir(path, *rest, **named):
        real(path, *rest, **named)
        if path.endswith("/pod") and not lost:
            lost.append(path)
            os.rmdir(path)              # the pod's last container ended just now

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert make(f"{tmp_path}/pod/box")
    assert lost and os.path.isdir(f"{tmp_path}/pod/box")


def test_removing_goes_down_first_and_forgives_what_is_gone(tmp_path):
    for path in ("box/a/b/c", "box/a/d", "box/e"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "box/link").symlink_to(tmp_path)
    with pytest.raises(HvError, match="still in use"):          # a link is not followed, and not removed
        remove_tree(f"{tmp_path}/box", 0.01)
    assert sorted(os.listdir(tmp_path / "box")) == ["link"]
    (tmp_path / "box/link").unlink()
    remove_tree(f"{tmp_path}/box")
    remove_tree(f"{tmp_path}/box")
    assert list(tmp_path.iterdir()) == []


def test_walks_leave_no_descriptor(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    before = os.listdir("/proc/self/fd")
    pids_below(str(tmp_path))
    pids_below(str(tmp_path / "none"))
    remove_tree(str(tmp_path / "a"))
    assert os.listdir("/proc/self/fd") == before
