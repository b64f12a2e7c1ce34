"""Reading and writing a chain as one stream of bytes, however its descriptors split it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio.chain import Chain, Reader, Writer

SPLITS = st.lists(st.integers(0, 40), max_size=8)


@given(SPLITS, st.lists(st.integers(0, 50), max_size=12))
@settings(deadline=None)
def test_a_reader_sees_one_stream(splits: list[int], reads: list[int]) -> None:
    stream = bytes(n & 0xFF for n in range(sum(splits)))
    rest = stream
    views = []
    for size in splits:
        views.append(memoryview(bytearray(rest[:size])))
        rest = rest[size:]
    reader, at = Reader(views), 0
    for length in reads:
        assert reader.left == len(stream) - at
        assert reader.read(length) == stream[at:at + length]
        at = min(at + length, len(stream))


@given(SPLITS, st.lists(st.binary(max_size=50), max_size=12), st.booleans())
@settings(deadline=None)
def test_a_writer_fills_one_stream(splits: list[int], writes: list[bytes], by_room: bool) -> None:
    parts = [bytearray(size) for size in splits]
    writer, total, expected = Chain(0, [], [memoryview(part) for part in parts]).writer(), sum(splits), b""
    for data in writes:
        if by_room:
            views = writer.room(len(data))
            for view in views:
                view[:], data = data[:len(view)], data[len(view):]
                expected += bytes(view)
        else:
            done = writer.write(data)
            assert done == min(len(data), total - len(expected))
            expected += data[:done]
        assert writer.written == len(expected) and writer.left == total - len(expected)
    assert b"".join(parts) == expected + bytes(total - len(expected))


def test_a_writer_takes_any_buffer():
    part = bytearray(6)
    writer = Writer([memoryview(part)])
    for data in (b"ab", bytearray(b"cd"), memoryview(b"ef")):
        assert writer.write(data) == 2
    assert part == b"abcdef" and writer.write(b"more") == 0
