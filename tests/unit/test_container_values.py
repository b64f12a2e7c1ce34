"""The runtime's other commands: how values on the command line are read, and what `features` claims."""

from __future__ import annotations

import pytest

from hv.cli.oci import COMMANDS, parse
from hv.cli.oci_control import duration, resources_of, size
from hv.cli.oci_exec import _user
from hv.container.features import features
from hv.container.mounts import Options
from hv.errors import ConfigError


@pytest.mark.parametrize("text, value", [
    ("0", 0), ("1024", 1024), ("-1", -1), ("1k", 1024), ("1K", 1024), ("2kb", 2048), ("3KiB", 3072),
    ("512m", 512 << 20), ("1.5g", 3 << 29), ("1t", 1 << 40), ("7b", 7)])
def test_sizes(text, value):
    assert size(text, "--memory") == value


@pytest.mark.parametrize("text", ["", "-2", "m", "1.m", "1x", "1 2", "0x10", "9" * 30, "1e3", "²", "1..5g", "k1", "--"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="--memory"):
        size(text, "--memory")


@pytest.mark.parametrize("text, value", [("5s", 5), ("500ms", 0.5), ("1m30s", 90), ("1h", 3600), ("1.5s", 1.5),
                                         ("2000us", 0.002)])
def test_durations(text, value):
    assert duration(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "s", "5x", "0s", "-1s", "1s2", "..s", "1ns", "999999999999h"])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="--interval"):
        duration(text)


def test_limits_by_flags_are_those_of_the_configuration():
    assert resources_of({"--memory": "64m", "--memory-swap": "-1", "--cpu-quota": "-1", "--cpuset-cpus": "0-1",
                         "--pids-limit": "7", "--cpu-share": ""}) == {
        "memory": {"limit": 64 << 20, "swap": -1}, "cpu": {"quota": -1, "cpus": "0-1"}, "pids": {"limit": 7}}
    assert resources_of({}) == {}
    for flags in ({"--pids-limit": "many"}, {"--cpu-share": "1.5"}, {"--cpu-quota": "--1"}, {"--cpu-period": "9" * 40}):
        with pytest.raises(ConfigError, match=next(iter(flags))):
            resources_of(flags)


def test_users_by_flags():
    assert _user({"uid": 1, "gid": 2}, "5", []) == {"uid": 5, "gid": 2}
    assert _user({"uid": 1, "gid": 2, "additionalGids": [3]}, "5:6", ["7"]) == {"uid": 5, "gid": 6,
                                                                                "additionalGids": [3, 7]}
    for text in ("root", "1:", ":1", "-1", "4294967295", "1:x"):
        with pytest.raises(ConfigError, match="--user"):
            _user({}, text, [])


def test_flags_of_exec_end_at_the_container():
    known = {"--tty": ("tty", False), "-t": ("tty", False), "--env": ("env", [])}
    assert parse(["-t", "--env", "A=B", "-env=C=D", "name", "ls", "-t", "--env"], known, stop_early=True) == (
        {"tty": True, "env": ["A=B", "C=D"]}, ["name", "ls", "-t", "--env"])


def test_features_claim_what_the_tables_understand():
    found = features("1.2.3")
    for name in found["mountOptions"]:
        assert Options([name], "test").data in ([], [name])
    assert {"ro", "rro", "rbind", "rslave", "tmpcopyup", "nosymfollow", "idmap"} <= set(found["mountOptions"])
    assert found["mountOptions"] == sorted(found["mountOptions"])
    assert set(found["linux"]["namespaces"]) == {"cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"}
    assert found["linux"]["seccomp"]["enabled"] and "SCMP_ACT_NOTIFY" in found["linux"]["seccomp"]["actions"]
    assert found["linux"]["cgroup"] == {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": False}
    # features.md 1.2: nothing else stands there
    assert set(found) == {"ociVersionMin", "ociVersionMax", "hooks", "mountOptions", "linux", "annotations",
                          "potentiallyUnsafeConfigAnnotations"}


def test_every_command_has_its_function():
    for name, (module, what) in COMMANDS.items():
        assert callable(getattr(__import__(module, fromlist=["*"]), f"command_{name}")) and what
