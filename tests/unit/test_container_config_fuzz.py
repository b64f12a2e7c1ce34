"""A config.json with every field, changed anywhere: understood, or refused by a line that names the field.

Not only what the first look checks: mount options, limits and device rules (on cgroups of plain files) and the filter
are taken to where the kernel would be asked.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from framework.cgroups import V1, Tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.cli.oci_spec import default_config
from hv.container.cgroups.manager import manager
from hv.container.mounts import Options
from hv.container.seccomp.compile import compile_profile
from hv.container.spec import Spec, load_bundle
from hv.errors import HvError


def everything() -> dict[str, Any]:
    """A configuration in which each field that the runtime knows stands with a value that it takes."""
    config = copy.deepcopy(default_config())
    hook = {"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 3}
    config |= {"domainname": "domain", "annotations": {"key": "value"}, "hooks": {name: [dict(hook)] for name in (
        "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")}}
    process = config["process"]
    process |= {"consoleSize": {"height": 24, "width": 80}, "oomScoreAdj": 100, "scheduler": {
        "policy": "SCHED_DEADLINE", "nice": 0, "priority": 0, "flags": ["SCHED_FLAG_RESET_ON_FORK"],
        "runtime": 1000000, "deadline": 2000000, "period": 2000000},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4}, "execCPUAffinity": {"initial": "0", "final": "0-1"}}
    process["user"] |= {"umask": 18, "additionalGids": [5, 6]}
    process["capabilities"] |= {"inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}
    config["mounts"].append({"destination": "/data", "source": "/tmp", "type": "bind", "options": [
        "rbind", "ro", "rprivate", "rnosuid", "idmap"], "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
        "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}]})
    linux = config["linux"]
    linux["namespaces"] += [{"type": "user"}, {"type": "time"}]
    linux |= {
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "timeOffsets": {"monotonic": {"secs": 5, "nanosecs": 6}}, "cgroupsPath": "/fuzz/box",
        "rootfsPropagation": "rslave", "personality": {"domain": "LINUX", "flags": []},
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0}],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
                    "flags": ["SECCOMP_FILTER_FLAG_LOG"], "syscalls": [
                        {"names": ["mkdir", "socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "args": [
                            {"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}]}]},
        "resources": {
            "memory": {"limit": 1 << 28, "reservation": 1 << 27, "swap": 1 << 29, "kernel": -1, "kernelTCP": -1,
                       "swappiness": 10, "disableOOMKiller": False, "useHierarchy": True, "checkBeforeUpdate": True},
            "cpu": {"shares": 512, "quota": 50000, "burst": 0, "period": 100000, "realtimeRuntime": 0,
                    "realtimePeriod": 1000000, "cpus": "0-1", "mems": "0", "idle": 0},
            "pids": {"limit": 10}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1 << 22}],
            "blockIO": {"weight": 100, "leafWeight": 100, **{
                name: [{"major": 8, "minor": 0, "rate": 1000}] for name in (
                    "throttleReadBpsDevice", "throttleWriteBpsDevice", "throttleReadIOPSDevice",
                    "throttleWriteIOPSDevice")},
                "weightDevice": [{"major": 8, "minor": 0, "weight": 100, "leafWeight": 100}]},
            "network": {"classID": 1, "priorities": [{"name": "lo", "priority": 1}]},
            "rdma": {"mlx": {"hcaHandles": 3, "hcaObjects": 10}},
            "devices": [{"allow": False, "access": "rwm"},
                        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}]}}
    return config


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    rows = [prefix] if prefix else []
    if isinstance(value, dict):
        for key, item in value.items():
            rows += paths(item, (*prefix, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            rows += paths(item, (*prefix, index))
    return rows


PATHS = paths(everything())
ELSEWHERE = [("linux",), ("linux", "namespaces")]
EDGES = [-1, 0, 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64, -1 << 63, -1 << 64, 10 ** 400]
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(EDGES) | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["/", "..", "../..", "/proc/self/fd/9", "\0", "\n", "%s", "\ud800", "0-", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)


def put(config: Any, path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        config = config[step]
    config[path[-1]] = value


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield Tree(tmp_path_factory.mktemp("cgroups"), patch, v1=tuple(V1))


def take(config: Any, tree: Tree) -> None:
    """As far as one gets without the kernel."""
    spec = Spec(config, "/bundle")
    for index, mount in enumerate(spec.mounts):
        Options(mount["options"], f"mounts[{index}]")
    if spec.seccomp:
        compile_profile(spec.seccomp, cache=False)
    group = manager(spec.cgroups_path, "box", layout=tree.layout)
    group.apply(spec.resources)


def test_everything_is_understood(tree: Tree) -> None:
    manager("/fuzz/box", "box", layout=tree.layout).create()
    take(everything(), tree)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow,
                                                                  HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), values)
def test_one_change(tree: Tree, path: tuple[Any, ...], value: Any) -> None:
    config = everything()
    put(config, path, value)
    try:
        take(config, tree)
    except HvError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 500, text
        names = [step for step in path if isinstance(step, str)]
        # without its namespaces the rest of a configuration makes no sense
        assert path[:2] in ELSEWHERE or any(name in text for name in names), f"{path} = {value!r:.80}: {text}"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow,
                                                                 HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PATHS), values), min_size=2, max_size=6))
def test_many_changes(tree: Tree, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    config = everything()
    for path, value in changes:
        try:
            put(config, path, value)
        except (KeyError, IndexError, TypeError):
            pass                    # an earlier change took the place away
    try:
        take(config, tree)
    except HvError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5000), st.binary(max_size=8), st.integers(0, 20))
def test_bytes_anywhere(tmp_path: Path, at: int, junk: bytes, cut: int) -> None:
    text = json.dumps(everything()).encode()
    (tmp_path / "config.json").write_bytes(text[:at] + junk + text[at + cut:])
    try:
        load_bundle(str(tmp_path))
    except HvError as error:
        assert str(tmp_path) in str(error)


@pytest.mark.parametrize("text", [
    b"[" * 100000, b'{"a":' * 50000, b"[" * 1000 + b"]" * 1000, b"9" * 100000, b"1e999999",
    b'"' + b"a" * (17 << 20) + b'"', b"\xff\xfe{\0}\0", b"nul", b'{"a":1,"a":2}', b"\xef\xbb\xbf{}"])
def test_files_that_are_meant_to_hurt(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(HvError):
        load_bundle(str(tmp_path))
