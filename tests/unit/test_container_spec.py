"""config.json: what is refused is refused by name, what is unknown is kept, nothing is a traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.cli.oci_spec import default_config
from hv.container.spec import Spec, load_bundle
from hv.errors import ConfigError, HvError
from hv.linux.ns import CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUTS
from hv.plainjson import dumps, loads


def changed(path: str, value: Any) -> dict[str, Any]:
    """The default configuration with the field at `path` (a.b.0.c) set; a value of ... removes it."""
    config: Any = copy.deepcopy(default_config())
    *way, last = path.split(".")
    place = config
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return dict(config)


def test_the_default_is_understood() -> None:
    spec = Spec(default_config(), "/bundle")
    assert spec.rootfs == "/bundle/rootfs" and spec.root_readonly
    assert spec.new_namespaces == (CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS
                                   | CLONE_NEWCGROUP)
    assert spec.program.args == ["sh"] and spec.program.terminal and spec.program.no_new_privileges
    assert spec.program.bounding == 1 << 29 | 1 << 5 | 1 << 10 and spec.program.ambient == 0


@pytest.mark.parametrize(("path", "value", "words"), [
    ("ociVersion", "2.0.0", "ociVersion"), ("ociVersion", ..., "ociVersion"), ("ociVersion", 1, "not a string"),
    ("windows", {"x": 1}, "windows"), ("vm", {"x": 1}, "vm"),
    ("process", ..., "process is missing"), ("process", [], "process"), ("process.args", [], "args is empty"),
    ("process.args", "sh", "not an array"), ("process.args", ["a\0b"], "NUL"), ("process.args", [""], r"args\[0\]"),
    ("process.args", [1], r"process.args\[0\]"), ("process.env", ["NOVALUE"], "process.env"),
    ("process.env", ["=x"], "process.env"), ("process.env", [None], "process.env"),
    ("process.cwd", "relative", "process.cwd"), ("process.cwd", ..., "process.cwd"),
    ("process.user.uid", -1, "process.user.uid"), ("process.user.uid", 1 << 32, "process.user.uid"),
    ("process.user.uid", "root", "process.user.uid"), ("process.user.uid", True, "process.user.uid"),
    ("process.user.umask", 0o10000, "umask"), ("process.user.additionalGids", [-5], "additionalGids"),
    ("process.terminal", "yes", "process.terminal"), ("process.consoleSize", {"height": -1}, "consoleSize"),
    ("process.oomScoreAdj", 1001, "oomScoreAdj"), ("process.oomScoreAdj", "1", "oomScoreAdj"),
    ("process.capabilities.bounding", ["CAP_NOTHING"], "CAP_NOTHING"),
    ("process.capabilities.effective", ["CAP_CHOWN"], "CAP_CHOWN is not in permitted"),
    ("process.rlimits", [{"type": "RLIMIT_X"}], "rlimits"), ("process.rlimits", [{}], "type is missing"),
    ("process.rlimits", [{"type": "RLIMIT_CORE", "soft": 1, "hard": 1}] * 2, "twice"),
    ("process.rlimits.0.soft", -2, "soft"), ("process.rlimits.0.hard", 1 << 64, "hard"),
    ("process.scheduler", {"policy": "SCHED_X"}, "SCHED_X"), ("process.scheduler", {}, "policy is missing"),
    ("process.scheduler", {"policy": "SCHED_FIFO", "flags": ["X"]}, "flags"),
    ("process.ioPriority", {"class": "IOPRIO_CLASS_X"}, "ioPriority.class"),
    ("process.ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 8}, "priority"),
    ("process.execCPUAffinity", {"initial": "x"}, "execCPUAffinity"),
    ("process.apparmorProfile", "p", "apparmor"), ("process.selinuxLabel", "l", "selinux"),
    ("root", ..., "root.path"), ("root.path", "", "root.path"), ("root.readonly", 1, "root.readonly"),
    ("hostname", 5, "hostname"), ("annotations", {"a": 1}, "annotations"),
    ("mounts.0.destination", "", "destination"), ("mounts.0.type", ..., "type is missing"),
    ("mounts.0.options", "ro", "options"), ("mounts.0.options", [7], "options"),
    ("mounts.0", {"destination": "/x", "options": ["bind"]}, "source is missing"), ("mounts", {}, "mounts"),
    ("mounts.0.uidMappings", [{"containerID": 0, "hostID": 0, "size": 0}], "size"),
    ("hooks", {"prestart": [{"path": "relative"}]}, r"hooks.prestart\[0\].path"),
    ("hooks", {"poststop": [{"path": "/x", "timeout": 0}]}, "timeout"), ("hooks", {"poststart": 1}, "poststart"),
    ("hooks", {"createRuntime": [{"path": "/x", "env": [1]}]}, "env"),
    ("linux.namespaces.0.type", "time2", "time2"), ("linux.namespaces.0.type", ..., "type is missing"),
    ("linux.namespaces.1.type", "pid", "twice"), ("linux.namespaces.0.path", "rel", "path .rel."),
    ("linux.uidMappings", [{"containerID": 0, "hostID": 0, "size": 1}], "no user namespace"),
    ("linux.namespaces.0.type", "user", "uidMappings"),
    ("linux.rootfsPropagation", "sideways", "rootfsPropagation"),
    ("linux.sysctl", {"kernel.panic": "1"}, "kernel.panic"), ("linux.sysctl", {"net.x": 1}, "net.x"),
    ("linux.sysctl", {"net..x": "1"}, "net..x"), ("linux.sysctl", {"net/../kernel/panic": "1"}, "sysctl"),
    ("linux.sysctl", {"": "1"}, "sysctl"),
    ("linux.timeOffsets", {"monotonic": {"secs": 1}}, "time namespace"), ("linux.timeOffsets", {"x": {}}, "'x'"),
    ("linux.personality", {"domain": "LINUX64"}, "personality"), ("linux.personality", {}, "domain is missing"),
    ("linux.intelRdt", {"closID": "x"}, "intelRdt"), ("linux.netDevices", {"eth0": {}}, "netDevices"),
    ("linux.maskedPaths", ["proc"], "maskedPaths"), ("linux.readonlyPaths", [1], "readonlyPaths"),
    ("linux.devices", [{"type": "x", "path": "/dev/x"}], "type"),
    ("linux.devices", [{"type": "c", "path": "x"}], "path"),
    ("linux.devices", [{"type": "c", "path": "/dev/x"}], "major"),
    ("linux.devices", [{"type": "c", "path": "/dev/x", "major": -1, "minor": 0}], "major"),
    ("linux.resources", [], "linux.resources"), ("linux.cgroupsPath", 1, "cgroupsPath"),
])
def test_refused_by_name(path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Spec(changed(path, value), "/bundle")


@pytest.mark.parametrize(("path", "value"), [
    ("future", {"x": 1}), ("process.future", 1), ("linux.future", []), ("mounts.0.future", "x"), ("root.future", None),
    ("hooks", {"future": [{"path": "/x"}]}), ("hostname", None), ("process.user", None), ("linux.seccomp", None),
    ("process.rlimits", None), ("linux.sysctl", {"net/ipv4/conf/eth0.100/forwarding": "1"}),
    ("linux.sysctl", {"kernel.msgmax": "1", "fs.mqueue.msg_max": "2", "kernel.domainname": "x"}),
    ("process.scheduler", {"policy": "SCHED_BATCH", "nice": 5}), ("mounts.0.destination", "relative"),
])
def test_unknown_fields_are_kept_and_null_is_absent(path: str, value: Any) -> None:
    config = changed(path, value)
    assert Spec(config, "/bundle").raw == config


def test_a_namespace_that_the_field_needs() -> None:
    for kind, path, value in (("uts", "hostname", "x"), ("uts", "domainname", "x"), ("mount", "linux.devices", [])):
        config = changed(path, value)
        config["linux"]["namespaces"] = [row for row in config["linux"]["namespaces"] if row["type"] != kind]
        with pytest.raises(ConfigError, match=f"no (new )?{kind} namespace"):
            Spec(config, "/bundle")


def test_sysctl_names() -> None:
    spec = Spec(changed("linux.sysctl", {"net.ipv4.conf.eth0/100.forwarding": "1", "net/ipv4/ip_forward": "0"}), "/b")
    assert [path for _, path, _ in spec.sysctl] == ["net/ipv4/conf/eth0.100/forwarding", "net/ipv4/ip_forward"]


def test_limits_without_end() -> None:
    spec = Spec(changed("process.rlimits", [{"type": "RLIMIT_CORE", "soft": 0, "hard": (1 << 64) - 1}]), "/b")
    assert spec.program.rlimits == [(4, 0, -1, "RLIMIT_CORE")]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}x", b"[" * 100_000, b'{"a":', b"1e999"])
def test_files_that_are_no_configuration(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_bundle(str(tmp_path))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load_bundle(str(tmp_path))
    assert "--bundle" in caught.value.hint


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    rows = [prefix] if prefix else []
    if isinstance(value, dict):
        for key, item in value.items():
            rows += _paths(item, (*prefix, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            rows += _paths(item, (*prefix, index))
    return rows


_PATHS = _paths(default_config())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(_PATHS), _values), min_size=1, max_size=3))
def test_anything_anywhere_is_understood_or_refused(edits: list[tuple[tuple[Any, ...], Any]]) -> None:
    config: Any = copy.deepcopy(default_config())
    for path, value in edits:
        place = config
        try:
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue                # an earlier edit took the place away
    try:
        Spec(config, "/bundle")
    except HvError as error:
        assert "\n" not in str(error)


@given(_values)
def test_json_as_the_standard_library_has_it(value: Any) -> None:
    assert json.loads(dumps(value)) == value == loads(json.dumps(value))
    assert json.loads(dumps(value, 2)) == value
