"""The messages of a sandbox's socket: cut where they begin and end, whatever comes in one piece; bad ones refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.errors import HvError
from hv.sandbox.messages import MESSAGE_MOST, Messages, pack, socket_at, take_descriptors


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=4), max_size=5),
       st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_messages_survive_any_cut(messages, cuts):
    data = b"".join(map(pack, messages))
    reader, found, at = Messages(), [], 0
    while at < len(data):
        for size in cuts:
            reader.feed(data[at:at + size])
            at += size
            while (message := reader.next()) is not None:
                found.append(message)
    assert found == messages


@pytest.mark.parametrize("data, why", [
    ((MESSAGE_MOST + 1).to_bytes(4, "little"), "a message of"), (b"\xff\xff\xff\xff", "a message of"),
    (b"\x02\0\0\0[]", "no object"), (b"\x01\0\0\0x", "no JSON"), (b"\x01\0\0\0\xff", "no JSON"),
    (b"\0\0\0\0", "no JSON")])
def test_what_is_no_message(data, why):
    reader = Messages()
    reader.feed(data)
    with pytest.raises(HvError, match=why):
        reader.next()


def test_one_that_is_too_long_is_not_sent():
    with pytest.raises(HvError, match="a message of"):
        pack({"text": "x" * MESSAGE_MOST})


def test_descriptors_and_long_paths(tmp_path):
    assert take_descriptors([(1, 1, b"\x05\0\0\0\x06\0\0\0\x07"), (1, 2, b"\x09\0\0\0")]) == [5, 6]
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    assert socket_at(str(deep), lambda path: (len(path) < 107, path.endswith("/vm.sock"))) == (True, True)
