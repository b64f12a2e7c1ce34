"""From config.json to a guest: its shape, its kernel, its processes."""

from __future__ import annotations

from typing import Any

import pytest
from framework.bundle import config

from hv.container.program import Program
from hv.container.spec import Spec
from hv.errors import ConfigError
from hv.sandbox.kernel import find_kernel
from hv.sandbox.rootfs_tree import refuse
from hv.sandbox.spec_guest import OVERHEAD, host_resources, process_spec, shape_of


def spec(resources: dict[str, Any] | None = None, **annotations: str) -> Spec:
    made = config("true")
    made["linux"]["resources"] = resources or {}
    made["annotations"] = {f"io.pyhv.vm.{name}": value for name, value in annotations.items()}
    return Spec(made, "/bundle")


@pytest.mark.parametrize("resources, memory", [
    ({}, 256), ({"memory": {"limit": 1}}, 128), ({"memory": {"limit": 128 << 20}}, 128),
    ({"memory": {"limit": (128 << 20) + 1}}, 256), ({"memory": {"limit": 300 << 20}}, 384),
    ({"memory": {"limit": -1}}, 256), ({"memory": {"limit": 1 << 62}}, 256), ({"memory": {"limit": "1"}}, 256),
    ({"memory": None}, 256)])
def test_memory_follows_the_limit(resources, memory):
    assert shape_of(spec(resources)).memory == memory


@pytest.mark.parametrize("resources, cpus", [
    ({}, 1), ({"cpu": {"quota": 50_000, "period": 100_000}}, 1), ({"cpu": {"quota": -1}}, 1),
    ({"cpu": {"quota": 100_001, "period": 100_000}}, 2), ({"cpu": {"quota": 1 << 62, "period": 1}}, 4),
    ({"cpu": {"quota": 150_000}}, 2), ({"cpu": {"quota": "1", "period": []}}, 1)])
def test_processors_follow_the_quota(resources, cpus, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert shape_of(spec(resources)).cpus == cpus


def test_annotations_come_before_limits_and_arguments_before_both():
    made = spec({"memory": {"limit": 1 << 30}}, memory="512M", cpus="3", kernel="/k", initrd="/i")
    shape = shape_of(made)
    assert (shape.memory, shape.cpus, shape.kernel, shape.initrd) == (512, 3, "/k", "/i")
    shape = shape_of(made, 64, 2, "/other", "/too")
    assert (shape.memory, shape.cpus, shape.kernel, shape.initrd) == (64, 2, "/other", "/too")
    assert shape_of(spec(memory="2G")).memory == 2048


@pytest.mark.parametrize("name, value", [("memory", "much"), ("memory", "1"), ("memory", "9999999G"), ("cpus", "-1"),
                                         ("cpus", "65"), ("cpus", "2M"), ("memory", "9" * 30), ("memory", "²")])
def test_an_annotation_that_is_no_number_is_named(name, value):
    with pytest.raises(ConfigError, match=f"io.pyhv.vm.{name}"):
        shape_of(spec(**{name: value}))


def test_the_vm_s_process_gets_the_limits_that_concern_it():
    made = spec({"memory": {"limit": 300 << 20, "swap": 300 << 20}, "cpu": {"quota": 1000}, "pids": {"limit": 5},
                 "devices": [{"allow": False}]})
    assert host_resources(made, shape_of(made)) == {"memory": {"limit": (384 << 20) + OVERHEAD}, "cpu": {"quota": 1000}}
    assert host_resources(spec(), shape_of(spec())) == {}


def test_a_process_as_the_agent_gets_it():
    program = Program({"args": ["a"], "cwd": "/w", "env": ["A=1", "A=2", "HOME="], "terminal": True,
                       "consoleSize": {"height": 24, "width": 80}, "noNewPrivileges": True, "oomScoreAdj": -5,
                       "user": {"uid": 1, "gid": 2, "additionalGids": [3], "umask": 0o77},
                       "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": (1 << 64) - 1}],
                       "capabilities": {"bounding": ["CAP_KILL"], "permitted": ["CAP_CHOWN"]}})
    made = process_spec(program, "/home")
    assert (made.argv, made.env, made.cwd, made.terminal) == (["a"], ["A=2", "HOME=/home"], "/w", (24, 80))
    assert (made.uid, made.gid, made.groups, made.umask, made.oom_score_adj) == (1, 2, [3], 0o77, -5)
    assert made.rlimits == [(7, 10, (1 << 64) - 1)] and made.no_new_privs
    assert made.capabilities == (1 << 5, 0, 0, 1, 0)
    assert made.frames()
    plain = process_spec(Program({"args": ["a"], "cwd": "/", "env": ["HOME=/x"]}), "/home")
    assert plain.terminal is None and plain.env == ["HOME=/x"] and plain.umask == 0o022


def test_what_no_vm_can_do_is_named():
    made = config("true")
    made["mounts"].append({"destination": "/x", "type": "bind", "source": "/", "options": ["bind", "idmap"]})
    with pytest.raises(ConfigError, match="idmapped"):
        refuse(Spec(made, "/bundle"))
    made = config("true")
    made["linux"]["devices"] = [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]
    refuse(Spec(made, "/bundle"))
    made["linux"]["devices"].append({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0})
    with pytest.raises(ConfigError, match="/dev/sda"):
        refuse(Spec(made, "/bundle"))


def test_which_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("PYHV_CACHE", str(tmp_path))
    for flavour, cpus in (("image", 1), ("image", 4), ("smp", 5)):
        with pytest.raises(ConfigError, match=f"no {flavour} kernel") as caught:
            find_kernel("", cpus)
        assert caught.value.hint == f"once: pyhv kernel build {flavour}"
    for name in ("micro-1", "micro-2", "container-1"):
        (tmp_path / "kernels" / name).mkdir(parents=True)
    (tmp_path / "kernels/micro-1/bzImage").touch()
    assert find_kernel("", 1).endswith("micro-1/bzImage"), "the newer one is empty"
    (tmp_path / "kernels/micro-2/vmlinux").touch()
    (tmp_path / "kernels/micro-2/bzImage").touch()
    assert find_kernel("", 1).endswith("micro-2/vmlinux")
    with pytest.raises(ConfigError, match="no image kernel"):
        find_kernel("", 2)
    (tmp_path / "kernels/image-1").mkdir()
    (tmp_path / "kernels/image-1/vmlinux").touch()
    assert find_kernel("", 1) == find_kernel("", 4) == f"{tmp_path}/kernels/image-1/vmlinux"
    (tmp_path / "kernels/container-1/bzImage").touch()
    assert find_kernel("container", 1).endswith("container-1/bzImage")
    assert find_kernel(f"{tmp_path}/kernels/micro-1/bzImage", 4).endswith("micro-1/bzImage")
    with pytest.raises(ConfigError, match="no such file"):
        find_kernel("/absent/kernel", 1)
    with pytest.raises(ConfigError, match="no other kernel"):
        find_kernel("other", 1)


def test_a_bundle_asks_for_a_vm_by_its_annotation(tmp_path):
    import json

    from hv.cli.oci import is_for_vm
    from hv.sandbox.runtime import wants_vm

    made = config("true")
    for notes, wanted in (({"io.pyhv.vm": "true"}, True), ({"io.pyhv.vm": "false"}, False), ({}, False),
                          ({"other": "io.pyhv.vm"}, False), ({"io.pyhv.vm.memory": "1G"}, False)):
        made["annotations"] = notes
        (tmp_path / "config.json").write_text(json.dumps(made))
        assert wants_vm(str(tmp_path)) is wanted
        for flag in (["--bundle", str(tmp_path)], [f"--bundle={tmp_path}"], ["-b", str(tmp_path)]):
            assert is_for_vm("", ["create", *flag, "name"]) is wanted
    (tmp_path / "config.json").write_text('{"io.pyhv.vm')
    assert not wants_vm(str(tmp_path)) and not wants_vm("/absent")
    (tmp_path / "box").mkdir()
    assert not is_for_vm(str(tmp_path), ["exec", "--tty", "box", "sh"])
    (tmp_path / "box/vm").touch()
    assert is_for_vm(str(tmp_path), ["exec", "--tty", "box", "sh"]) and not is_for_vm(str(tmp_path), ["list"])
