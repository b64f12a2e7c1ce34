"""hv/snapshot/format.py: the state file and its guards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ConfigError, SnapshotError
from hv.snapshot.format import Snapshot, checksum, store_folder, write_state

PLAIN = st.recursive(st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.text() | st.binary(max_size=80),
                     lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
                     max_leaves=12)


def sealed(body: bytes, version: bytes = b"1") -> bytes:
    return b"pyhv-snapshot " + version + b" " + checksum(body).encode() + b"\n" + body


@given(value=PLAIN)
def test_what_is_written_is_read(tmp_path_factory, value):
    folder = str(tmp_path_factory.mktemp("s"))
    write_state(folder, {"version": 1, "value": value})
    assert Snapshot(folder).state == {"version": 1, "value": value}


@given(data=st.data())
def test_a_changed_byte_is_noticed(tmp_path_factory, data):
    folder = str(tmp_path_factory.mktemp("s"))
    write_state(folder, {"version": 1, "a": [1, 2, b"xyz"]})
    path = f"{folder}/state.json"
    whole = bytearray(Path(path).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    whole[at] ^= change
    Path(path).write_bytes(whole)
    try:
        state = Snapshot(folder).state
    except SnapshotError:
        return
    # what is no more than another spelling of the header may pass, with the same content
    assert at < 90
    assert state == {"version": 1, "a": [1, 2, b"xyz"]}


@given(st.data())
def test_a_cut_file_is_refused(tmp_path_factory, data):
    folder = str(tmp_path_factory.mktemp("s"))
    write_state(folder, {"version": 1, "a": "b" * 100})
    path = f"{folder}/state.json"
    os.truncate(path, data.draw(st.integers(0, os.path.getsize(path) - 1)))
    with pytest.raises(SnapshotError):
        Snapshot(folder)


@pytest.mark.parametrize(("content", "says"), [
    (b"", "does not begin"),
    (b"#!/bin/sh\n", "does not begin"),
    (sealed(b'{"version": 2}', b"2"), "version 2"),
    (sealed(b'{"version": 1'), "delimiter"),
    (sealed(b"[" * 100000), "nested"),
    (sealed(b"[1]"), "no object"),
    (sealed(b'{"version": 2}'), "version"),
    (sealed(b'{"version": 1, "a": {"base64": "!"}}'), "base64"),
    (sealed(b"\xff\xfe"), "utf-8"),
    (sealed(b'{"version": 1, "a": ' + b"9" * 5000 + b"}"), "digits"),
])
def test_hostile_files_are_refused_by_name(tmp_path, content, says):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(SnapshotError, match=says):
        Snapshot(str(tmp_path))


def test_fields_are_checked_where_they_are_used(tmp_path):
    write_state(str(tmp_path), {"version": 1, "config": {"memory": 5, "name": "x", "flag": True}, "list": [{}]})
    snapshot = Snapshot(str(tmp_path))
    assert snapshot.number("config", "memory", high=5) == 5
    for path, kind, says in ((("config", "nothing"), dict, "config.nothing: is missing"),
                             (("list", 0, "x"), dict, r"list\[0\].x: is missing"), (("list", 3), dict, r"list\[3\]"),
                             (("config", "name"), int, "is of type str"), (("config", "flag"), int, "is of type bool"),
                             (("config", "memory", "deeper"), int, "deeper: is missing")):
        with pytest.raises(SnapshotError, match=says):
            snapshot.part(*path, kind=kind)
    with pytest.raises(SnapshotError, match="5 is outside 0 to 4"):
        snapshot.number("config", "memory", high=4)


def test_names_and_paths():
    assert store_folder("a-b_c.1", "/srv") == "/srv/a-b_c.1"
    assert store_folder("./here", "/srv") == os.path.abspath("here")
    for bad in ("", ".hidden", "-x", "a b", "x" * 65, "a\0b"):
        with pytest.raises(ConfigError):
            store_folder(bad)
