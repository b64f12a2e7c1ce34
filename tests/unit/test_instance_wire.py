"""Frames between commands and the keeper."""

from __future__ import annotations

import os
import random

import pytest

from hv.errors import ConfigError, HvError
from hv.instance.attach import parse_keys
from hv.instance.holder import pack_status, read_status
from hv.instance.wire import FRAME_MOST, Frames, frame, frames


def test_any_division_gives_the_same_frames():
    data = os.urandom(200_000)
    sent = frame(b"Q", b"{}") + frames(b"O", data) + frame(b"i") + frame(b"X", b"\1\0\0\0")
    reader, got = Frames(), []
    while sent:
        size = random.choice((1, 7, 8, 9, 4096, 70_000))
        got += reader.feed(sent[:size])
        sent = sent[size:]
    assert [kind for kind, _ in got] == [b"Q", *[b"O"] * 4, b"i", b"X"]
    assert b"".join(body for kind, body in got if kind == b"O") == data


@pytest.mark.parametrize("bad", [b"Z\0\0\0\0\0\0\0", b"O\1\0\0\0\0\0\0",
                                 b"O\0\0\0" + (FRAME_MOST + 1).to_bytes(4, "little"), b"GET / HTTP/1.1\r\n"])
def test_what_is_no_frame(bad):
    with pytest.raises(HvError, match="protocol"):
        Frames().feed(bad)


def test_how_it_ended(tmp_path):
    file = tmp_path / "status"
    assert read_status(str(file)) is None
    for code in (0, 1, 255):
        file.write_bytes(pack_status(code))
        assert read_status(str(file)) == code
    killed = b"".join(word.to_bytes(4, "little") for word in (17, 0, 2, 0, 5, 0, 9)).ljust(128, b"\0")
    file.write_bytes(killed)
    assert read_status(str(file)) == 137
    for bad in (b"", b"short", bytes(128), b"\1\0\0\0\5\0\0\0"):
        file.write_bytes(bad)
        assert read_status(str(file)) is None


def test_keys():
    assert parse_keys(None) == b"\x10\x11" and parse_keys("ctrl-a,d") == b"\x01d" and parse_keys("") == b""
    for bad in ("ctrl-1", "ctrl-", "ab", "ctrl-p,"):
        with pytest.raises(ConfigError):
            parse_keys(bad)
