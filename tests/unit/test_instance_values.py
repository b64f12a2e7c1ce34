"""Values of options, names, times."""

from __future__ import annotations

import datetime
import random

import pytest

from hv.errors import ConfigError
from hv.instance import values
from hv.instance.names import check_name, is_id_prefix, new_id, new_name
from hv.instance.times import lasted, seconds, since


@pytest.mark.parametrize("text, wanted", [("64m", 64 << 20), ("1.5g", 3 << 29), ("4096", 4096), ("1KiB", 1024),
                                          ("2gb", 2 << 30), ("0", 0)])
def test_sizes(text, wanted):
    assert values.size(text, "--memory") == wanted


@pytest.mark.parametrize("text", ["", "m", "1x", "-1", "1e5", "nan", "inf", "1.2.3m", "9" * 40, "1 m m"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--memory"):
        values.size(text, "--memory")


@pytest.mark.parametrize("text, wanted", [("10", 10), ("1.5s", 1.5), ("200ms", 0.2), ("2m", 120), ("0", 0)])
def test_durations(text, wanted):
    assert values.duration(text, "-t") == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "1d", "s"])
def test_durations_that_are_none(text):
    with pytest.raises(ConfigError):
        values.duration(text, "-t")


@pytest.mark.parametrize("text, wanted", [("TERM", 15), ("sigkill", 9), ("9", 9), ("SIGRTMIN+1", 35), ("64", 64)])
def test_signals(text, wanted):
    assert values.signal_number(text, "-s") == wanted


@pytest.mark.parametrize("text", ["", "0", "65", "NOPE", "RTMIN+99", "SIG", "-1", "²"])
def test_signals_that_are_none(text):
    with pytest.raises(ConfigError):
        values.signal_number(text, "-s")


def test_volumes():
    assert values.volume("/a:/b:ro") == {"kind": "bind", "source": "/a", "target": "/b", "readonly": True,
                                         "options": []}
    assert values.volume("name:/b")["kind"] == "volume" and values.volume("/only")["source"] == ""
    assert values.volume("name:/b:nocopy,rslave")["options"] == ["rslave"]
    for bad in ("", "a", "a:b", "/a:/", "/a:/b:zz", ":/b", "a/b:/c", "/a:/b:ro:x", "/a:/b:z"):
        with pytest.raises(ConfigError):
            values.volume(bad)


def test_mounts():
    assert values.mount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700") == {
        "kind": "tmpfs", "source": "", "target": "/t", "readonly": False, "options": ["size=1048576", "mode=700"]}
    assert values.mount("type=bind,src=/a,dst=/b,ro")["readonly"] is True
    for bad in ("", "type=bind,target=/b", "type=nope,target=/b", "target=/b,zz", "type=bind,src=rel,dst=/b",
                "type=tmpfs,source=/x,target=/b", "source=/a"):
        with pytest.raises(ConfigError):
            values.mount(bad)


def test_ulimits():
    assert values.ulimit("nofile=10:20") == {"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}
    assert values.ulimit("core=-1")["hard"] == -1
    for bad in ("nofile", "nope=1", "nofile=20:10", "nofile=x", "nofile=1:2:3"):
        with pytest.raises(ConfigError):
            values.ulimit(bad)


def test_env_files(tmp_path):
    file = tmp_path / "env"
    file.write_text("# remark\n\nA=b c\n  B=\nC\n")
    assert values.env_lines(str(file)) == ["A=b c", "B=", "C"]
    with pytest.raises(ConfigError, match="No such file"):
        values.env_lines(str(tmp_path / "none"))


def test_names():
    assert len({new_id() for _ in range(50)}) == 50 and is_id_prefix(new_id())
    for _ in range(200):
        check_name(new_name())
    for bad in ("", "a", "-ab", "a b", "a/b", "..", "x" * 129, "ab\0"):
        with pytest.raises(ConfigError):
            check_name(bad)


def test_times():
    for _ in range(500):
        moment = datetime.datetime(random.randint(1970, 2099), random.randint(1, 12), random.randint(1, 28), 13, 5, 7,
                                   tzinfo=datetime.UTC)
        assert seconds(moment.strftime("%Y-%m-%dT%H:%M:%S.5Z")) == moment.timestamp() + 0.5
    assert [lasted(count) for count in (0.5, 1, 61, 7200, 3 * 86400, 800 * 86400)] == [
        "less than a second", "1 second", "1 minute", "2 hours", "3 days", "2 years"]
    assert since("2026-01-01T00:00:00Z", "--since") == 1767225600
    with pytest.raises(ConfigError):
        since("yesterday", "--since")
