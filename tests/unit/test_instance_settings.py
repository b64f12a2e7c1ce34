"""From options to settings, and whether an instance is started again."""

from __future__ import annotations

import pytest

from hv.errors import ConfigError
from hv.instance.restart import wait_before
from hv.instance.settings import Settings


def test_only_what_differs_is_kept():
    settings = Settings.of({"network": ["none"], "memory": "64m", "env": ["A=b"], "rm": True}, ["true"])
    assert settings.data == {"command": ["true"], "rm": True, "env": ["A=b"], "networks": ["none"],
                             "memory": 64 << 20}
    again = Settings(dict(settings.data))
    assert (again.memory, again.kind, again.stop_timeout) == (64 << 20, "container", 10.0)


def test_the_way(monkeypatch):
    assert Settings.of({"vm": True}, []).kind == "vm"
    monkeypatch.setenv("PYHV_WAY", "vm")
    assert Settings.of({}, []).kind == "vm" and Settings.of({"container": True}, []).kind == "container"
    monkeypatch.setenv("PYHV_WAY", "jail")
    with pytest.raises(ConfigError, match="PYHV_WAY"):
        Settings.of({}, [])


@pytest.mark.parametrize("given, named", [
    ({"vm": True, "container": True}, "--vm"), ({"rm": True, "restart": "always"}, "--restart"),
    ({"vm": True, "privileged": True}, "--privileged"), ({"kernel": "/x"}, "--kernel"),
    ({"memory": "1k"}, "--memory"), ({"memory_swap": "1g"}, "--memory-swap"), ({"cpus": "0"}, "--cpus"),
    ({"pids_limit": "x"}, "--pids-limit"), ({"workdir": "rel"}, "-w"), ({"env": ["=x"]}, "-e"),
    ({"hostname": "a b"}, "--hostname"), ({"add_host": ["x"]}, "--add-host"), ({"cap_add": ["NOPE"]}, "--cap-add"),
    ({"security_opt": ["what"]}, "--security-opt"), ({"log_opt": ["max-file=3"]}, "max-file"),
    ({"log_opt": ["x=y"]}, "--log-opt"), ({"log_driver": "syslog"}, "--log-driver"), ({"stop_signal": "X"}, "X"),
    ({"restart": "always:3"}, "--restart"), ({"volume": ["/a:/x"], "tmpfs": ["/x"]}, "/x"),
    ({"network": ["none"], "publish": ["80:80"]}, "-p"), ({"label": ["=x"]}, "--label"),
    ({"ulimit": ["x"]}, "--ulimit")])
def test_what_is_refused_by_name(given, named):
    with pytest.raises(ConfigError, match=named):
        Settings.of(given, [])


def test_environment_of_ours(monkeypatch):
    monkeypatch.setenv("OURS", "x")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert Settings.of({"env": ["OURS", "NOT_THERE", "B=c"]}, []).env == ["OURS=x", "B=c"]


def test_restarts():
    def wait(policy: str, code: int, restarts: int = 0, ran: float = 1, last: float = 0, most: int = 0):
        return wait_before(Settings({"restart": policy, "restart_most": most}), code, restarts, ran, last)

    assert wait("no", 1) is None and wait("on-failure", 0) is None and wait("always", 0) == 0.1
    assert wait("on-failure", 1, restarts=2, most=2) is None and wait("on-failure", 1, restarts=1, most=2) == 0.1
    assert wait("always", 1, last=0.1) == 0.2 and wait("always", 1, last=50) == 60 and wait("always", 1, last=60) == 60
    assert wait("unless-stopped", 1, last=30, ran=11) == 0.1
