"""config.json of an instance: the image and the options together."""

from __future__ import annotations

import os

import pytest

from hv.container.spec import Spec
from hv.errors import ConfigError
from hv.instance.bundle import command_of, environment_of, exec_process, make_config
from hv.instance.record import Instance
from hv.instance.settings import Settings

IMAGE = {"entrypoint": ["/entry"], "cmd": ["a"], "env": ["PATH=/x", "B=1"], "user": "5", "working_dir": "/w"}


def config(tmp_path, image=None, **settings):
    instance = Instance("ab" * 16)
    instance.name = "name"
    instance.about = {"settings": settings, "image": IMAGE if image is None else image}
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        made = make_config(instance, str(tmp_path), fd, files=[("/a", "/etc/hosts")], mounts=[], netns="")
    finally:
        os.close(fd)
    Spec(made, str(tmp_path))           # what the runtime understands
    return made


@pytest.mark.parametrize("settings, wanted", [
    ({}, ["/entry", "a"]), ({"command": ["b"]}, ["/entry", "b"]), ({"entrypoint": ["/e"]}, ["/e"]),
    ({"entrypoint": [], "command": ["c"]}, ["c"])])
def test_commands(settings, wanted):
    assert command_of(Settings(settings), IMAGE) == wanted


def test_no_command():
    with pytest.raises(ConfigError, match="names no command"):
        command_of(Settings({}), {})


def test_environment():
    words = environment_of(Settings({"env": ["B=2", "C="], "tty": True}), IMAGE, "host")
    assert words == ["PATH=/x", "HOSTNAME=host", "TERM=xterm", "B=2", "C="]


def test_the_process(tmp_path):
    made = config(tmp_path)
    assert made["process"]["user"] == {"uid": 5, "gid": 0, "additionalGids": []}
    assert made["process"]["cwd"] == "/w" and made["hostname"] == ("ab" * 16)[:12]
    assert "effective" not in made["process"]["capabilities"]
    assert len(config(tmp_path, user="0")["process"]["capabilities"]["effective"]) == 14


def test_capabilities(tmp_path):
    def bounding(**settings):
        return config(tmp_path, **settings)["process"]["capabilities"]["bounding"]

    assert "CAP_NET_ADMIN" in bounding(cap_add=["CAP_NET_ADMIN"]) and "CAP_KILL" not in bounding(cap_drop=["CAP_KILL"])
    assert bounding(cap_drop=["ALL"]) == [] and bounding(cap_drop=["ALL"], cap_add=["CAP_KILL"]) == ["CAP_KILL"]
    assert len(bounding(cap_add=["ALL"])) > 30 and len(bounding(privileged=True)) > 30


def test_limits_and_filters(tmp_path):
    made = config(tmp_path, memory=64 << 20, cpus=0.5, pids_limit=10, readonly=True)["linux"]
    assert made["resources"]["memory"]["limit"] == 64 << 20
    assert made["resources"]["cpu"] == {"quota": 50000, "period": 100000}
    assert made["resources"]["pids"] == {"limit": 10} and made["seccomp"]["syscalls"] and made["maskedPaths"]
    open_ = config(tmp_path, privileged=True)["linux"]
    assert "seccomp" not in open_ and not open_["maskedPaths"] and not open_["readonlyPaths"]
    assert "seccomp" not in config(tmp_path, security_opt=["seccomp=unconfined"])["linux"]
    assert "seccomp" not in config(tmp_path, kind="vm")["linux"]


def test_exec(tmp_path):
    made = config(tmp_path)
    process = exec_process(made, ["ls"], tty=True, env=["X=y"], workdir="/tmp")
    assert process["args"] == ["ls"] and process["cwd"] == "/tmp" and process["env"][-2:] == ["X=y", "TERM=xterm"]
    assert made["process"]["args"] == ["/entry", "a"]
