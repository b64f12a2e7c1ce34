"""Where a container's groups are, what is joined, and what happens without rights, on a tree of plain files."""

from __future__ import annotations

import errno
import os

import pytest
from framework.cgroups import V1, V2_CONTROLLERS, Tree

from hv.container.cgroups import devices_bpf
from hv.container.cgroups import manager as module
from hv.container.cgroups.detect import Layout
from hv.container.cgroups.manager import from_paths, manager
from hv.errors import ConfigError, HvError, StateError


def paths(path, name="box", **more):
    return manager(path, name, layout=Layout({"pids": "/cg/pids", "name=systemd": "/cg/systemd"}, "/cg/unified",
                                             more)).paths


def test_cgroups_path():
    assert paths("/eng/box") == {"pids": "/cg/pids/eng/box", "name=systemd": "/cg/systemd/eng/box",
                                 "": "/cg/unified/eng/box"}
    assert paths("")["pids"] == "/cg/pids/pyhv-box"
    assert paths("eng/box")["pids"] == "/cg/pids/pyhv/eng/box"
    assert paths("../../etc/../x")["pids"] == "/cg/pids/x"
    assert paths("system.slice:pyhv:box")["pids"] == "/cg/pids/pyhv/system.slice:pyhv:box"


@pytest.mark.parametrize("path", ["/", "/..", "/a/../..", "//"])
def test_the_root_is_no_place_for_a_container(path):
    with pytest.raises(ConfigError, match="cgroupsPath"):
        paths(path)


def test_a_user_starts_below_the_own_group(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "own_paths", lambda: {"pids": "/user/1000", "": "/docker/abc/user"})
    found = manager("", "box", layout=Layout({"pids": "/cg/pids"}, "/cg/unified", {"": "/docker/abc"})).paths
    assert found == {"pids": "/cg/pids/user/1000/pyhv-box", "": "/cg/unified/user/pyhv-box"}
    assert paths("/eng")["pids"] == "/cg/pids/eng"


def test_all_hierarchies_are_made_and_joined_comounted_ones_once(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v1=("memory", "pids", "name=systemd"), v2=())
    tree.layout.v1["shared"] = tree.layout.v1["pids"]
    group = manager("/eng/box", "box", layout=tree.layout)
    group.create()
    group.add(77)
    assert tree.wrote("cgroup.procs") == [("cgroup.procs", "77")] * 4
    for name in ("memory", "pids", "systemd", "unified"):
        assert (tmp_path / name / "eng/box/cgroup.procs").read_text() == "77"
    again = from_paths(dict(group.paths))
    (tmp_path / "pids/eng/box/cgroup.procs").write_text("77\n78\n")
    (tmp_path / "pids/eng/box/inner/deeper").mkdir(parents=True)
    (tmp_path / "pids/eng/box/inner/deeper/cgroup.procs").write_text("5\n")
    assert sorted(again.pids()) == [5, 77, 78]


def test_a_group_that_others_use_is_not_taken(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v1=("pids",))
    manager("/eng/box", "box", layout=tree.layout).create()
    manager("/eng/box", "box", layout=tree.layout).create()         # empty: engines make it beforehand
    (tmp_path / "pids/eng/box/cgroup.procs").write_text("1\n")
    with pytest.raises(StateError, match="holds 1 processes already"):
        manager("/eng/box", "box", layout=tree.layout).create()


def rootless_tree(tmp_path, monkeypatch, number, **kind):
    tree = Tree(tmp_path, monkeypatch, **kind)
    inner = module.make

    def make(path):
        if "/pids/" in path:
            raise OSError(number, os.strerror(number))
        return inner(path)

    monkeypatch.setattr(module, "make", make)
    monkeypatch.setattr(module, "rootless", lambda: True)
    return tree


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_without_rights_we_go_without_until_a_limit_is_asked_for(tmp_path, monkeypatch, number):
    tree = rootless_tree(tmp_path, monkeypatch, number, v1=("memory", "pids"))
    group = manager("/eng/box", "box", layout=tree.layout)
    kept = group.paths
    group.create()
    assert list(kept) == ["memory"]
    group.apply({"memory": {"limit": 5}, "devices": [{"allow": False}]})
    with pytest.raises(HvError, match=r"linux\.resources\.pids: cgroup controller pids: (Perm|Oper|Read)"):
        group.apply({"pids": {"limit": 5}})


def test_nor_does_a_refused_join_end_a_rootless_container(tmp_path, monkeypatch):
    tree = rootless_tree(tmp_path, monkeypatch, errno.EACCES, v1=("memory",))
    group = manager("/eng/box", "box", layout=tree.layout)
    group.create()
    tree.refuse["cgroup.procs"] = errno.EACCES
    group.add(5)
    assert group.paths == {} and group.pids() == [] and not group.frozen() and group.oom_kills() == 0
    group.remove()
    with pytest.raises(HvError, match="no cgroup that can be frozen"):
        group.freeze(True)


def test_root_does_not_go_without(tmp_path, monkeypatch):
    tree = rootless_tree(tmp_path, monkeypatch, errno.EROFS, v1=("memory", "pids"))
    monkeypatch.setattr(module, "rootless", lambda: False)
    with pytest.raises(HvError, match=r"pids/eng/box: Read-only"):
        manager("/eng/box", "box", layout=tree.layout).create()


def test_device_rules_need_no_rights_in_a_user_namespace(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v2=V2_CONTROLLERS)

    def attach(path, rules):
        raise HvError("bpf(PROG_LOAD): EPERM")

    monkeypatch.setattr(devices_bpf, "attach", attach)
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    with pytest.raises(HvError, match="EPERM"):
        group.apply({})
    monkeypatch.setattr(module, "rootless", lambda: True)
    group.apply({})


def test_exec_joins_the_first_process_where_the_group_was_split_up(tmp_path, monkeypatch):
    monkeypatch.setattr(devices_bpf, "attach", lambda path, rules: None)
    tree = Tree(tmp_path, monkeypatch, v2=V2_CONTROLLERS)
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    inner = tree.v2 / "box/init.scope"
    inner.mkdir()
    (inner / "cgroup.procs").write_text("")
    tree.refuse["cgroup.procs"] = lambda path, value: errno.EBUSY if path.endswith("/box") else 0
    monkeypatch.setattr(module, "own_paths", lambda pid: {"": "/box/init.scope"})
    with pytest.raises(HvError, match="busy"):
        group.add(9)
    group.add(9, beside=8)
    assert (inner / "cgroup.procs").read_text() == "9"


def test_a_dead_process_and_a_lost_group_are_told_apart(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v1=("pids",))
    group = manager("/box", "box", layout=tree.layout)
    with pytest.raises(StateError, match="is gone"):
        group.add(9)
    group.create()
    tree.refuse["cgroup.procs"] = errno.ESRCH
    with pytest.raises(HvError, match="has ended"):
        group.add(9)


def test_version_1_freezes_and_counts(tmp_path, monkeypatch):
    tree = Tree(tmp_path, monkeypatch, v1=tuple(V1), v2=())
    group = manager("/box", "box", layout=tree.layout)
    group.create()
    group.freeze(True)
    assert group.frozen()
    group.freeze(False)
    assert not group.frozen()
    assert tree.wrote("freezer.state", "cgroup.freeze") == [("freezer.state", "FROZEN"), ("freezer.state", "THAWED")]
    assert group.oom_kills() == 3
