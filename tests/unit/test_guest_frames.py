"""How a guest's process is described to the agent."""

from __future__ import annotations

import struct

import pytest

from hv.errors import ConfigError
from hv.sandbox.frames import ProcessSpec, frame


def test_what_is_said_of_a_process():
    spec = ProcessSpec(["a", "b c"], ["X=1"], "/w", program="/bin/a", uid=1, gid=2, groups=[3], terminal=(24, 80),
                       rlimits=[(7, 8, 9)], capabilities=[1, 2, 3, 4, 5], no_new_privs=True, umask=0o27,
                       oom_score_adj=-5)
    data = spec.frames()
    length = int.from_bytes(data[4:8], "little")
    records, at = [], 8
    while at < 8 + length:
        key, size = data[at:at + 1], int.from_bytes(data[at + 1:at + 5], "little")
        records.append((key, data[at + 5:at + 5 + size]))
        at += 5 + size
    four = [value.to_bytes(4, "little") for value in range(10)]
    assert records == [
        (b"a", b"a"), (b"a", b"b c"), (b"e", b"X=1"), (b"p", b"/bin/a"), (b"c", b"/w"), (b"u", four[1]),
        (b"g", four[2]), (b"G", four[3]), (b"t", b"\x18\0\x50\0"), (b"r", struct.pack("<IQQ", 7, 8, 9)),
        (b"C", struct.pack("<5Q", 1, 2, 3, 4, 5)), (b"n", b""), (b"m", b"\x17\0\0\0"), (b"o", b"\xfb\xff\xff\xff"),
    ]
    assert data[8 + length:] == frame(b"G")


def test_long_specs_are_several_frames():
    data = ProcessSpec(["x" * 100_000, "y" * 100_000]).frames()
    sizes = []
    while data:
        size = int.from_bytes(data[4:8], "little")
        sizes.append((data[:1], size))
        data = data[8 + size:]
    assert sizes == [(b"S", 65536)] * 3 + [(b"S", 200_010 - 3 * 65536), (b"G", 0)]


@pytest.mark.parametrize(("options", "text"), [
    ({"argv": []}, "no command"), ({"argv": ["a\0b"]}, "zero byte"), ({"argv": ["x" * (1 << 17)]}, "longer than"),
    ({"argv": ["x" * 100_000] * 21}, "more than 2097152"), ({"argv": ["x"] * 16385}, "more than 16384"),
    ({"env": ["A=\0"]}, "environment variable"), ({"uid": -1}, "uid -1"), ({"gid": 0xFFFFFFFF}, "gid 4294967295"),
    ({"groups": range(257)}, "256 groups"),
    ({"rlimits": [(0, -1, 0)]}, "rlimit"), ({"rlimits": [(0, 0, 0)] * 17}, "16 limits"),
    ({"capabilities": [1]}, "five sets"), ({"terminal": (70000, 1)}, "70000 rows"), ({"oom_score_adj": 1001}, "1001"),
])
def test_specs_that_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        ProcessSpec(**{"argv": ["x"], **options}).frames()
