"""Mount options, sorted into what is the mount's, what is for the mounts below, and what the file system gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.container.mounts import _FLAGS, Options, _check_proc
from hv.errors import ConfigError
from hv.linux.mount import ATTR, PROPAGATION


@pytest.mark.parametrize(("words", "on", "off"), [
    (["ro"], ATTR["rdonly"], 0), (["rw"], 0, ATTR["rdonly"]), (["ro", "rw"], 0, ATTR["rdonly"]),
    (["rw", "ro"], ATTR["rdonly"], 0), (["nosuid", "nodev", "noexec"], 0xE, 0), (["nosuid", "suid"], 0, ATTR["nosuid"]),
    (["strictatime"], ATTR["strictatime"], 0), (["noatime"], ATTR["noatime"], 0), (["defaults"], 0, 0),
    (["nosymfollow"], ATTR["nosymfollow"], 0), ([], 0, 0),
])
def test_flags_of_the_mount(words: list[str], on: int, off: int) -> None:
    options = Options(words, "m")
    assert (options.set, options.clear) == (on, off) and not options.data


def test_the_rest() -> None:
    options = Options(["rbind", "rro", "rnosuid", "rsuid", "rslave", "private", "mode=755", "tmpcopyup", "nofail",
                       "size=1k"], "m")
    assert options.bind and options.tree and options.copy_up
    assert (options.recursive_set, options.recursive_clear) == (ATTR["rdonly"], ATTR["nosuid"])
    assert options.propagation == [(PROPAGATION["slave"], True), (PROPAGATION["private"], False)]
    assert options.data == ["mode=755", "size=1k"] and not options.set
    assert not Options(["bind"], "m").tree
    with pytest.raises(ConfigError, match="remount"):
        Options(["remount"], "m")


@given(st.lists(st.sampled_from([*_FLAGS, *("r" + name for name in _FLAGS)])))
def test_nothing_is_both_set_and_cleared(words: list[str]) -> None:
    options = Options(words, "m")
    assert not options.set & options.clear and not options.recursive_set & options.recursive_clear
    assert not options.data


@pytest.mark.parametrize(("destination", "kind", "bind"), [
    ("/proc", "tmpfs", False), ("/proc/sys", "tmpfs", False), ("/proc/self/attr", "bind", True),
    ("/proc/1", "proc", False),
])
def test_nothing_covers_proc(destination: str, kind: str, bind: bool) -> None:
    with pytest.raises(ConfigError, match="/proc"):
        _check_proc(destination, kind, bind, "m")


@pytest.mark.parametrize("destination", ["/proc", "/proc/cpuinfo", "/proc/uptime", "/process", "/sys"])
def test_what_may_be_there(destination: str) -> None:
    _check_proc(destination, "proc" if destination == "/proc" else "bind", destination != "/proc", "m")
