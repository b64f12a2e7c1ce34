"""Checksums and segments in software, against a sum made word by word as RFC 1071 has it."""

from __future__ import annotations

import random
import struct

import pytest
from framework.packets import check_tcp, rfc1071, tcp_packet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net_offload import MOST_SEGMENTS, checksum, finish, is_sane


@given(st.binary(max_size=3000), st.integers(0, 0xFFFFFFFF))
@example(b"", 0)
@example(b"\xff\xff", 0)
@example(b"\xff\xfe\0\1", 0)
def test_the_sum_is_that_of_the_rfc(data, start):
    assert checksum(data, start) % 0xFFFF == rfc1071(data, start) % 0xFFFF
    if any(data):
        assert checksum(data, start) == rfc1071(data, start)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 999, 1460])
def test_a_checksum_is_completed(version, size):
    packet = tcp_packet(random.Random(size).randbytes(size), version)
    (frame,) = finish(packet, 0)
    ip = 14
    patched = bytearray(frame)
    if version == 4:        # the IP header's own sum is the guest's business
        struct.pack_into(">H", patched, ip + 10, rfc1071(bytes(patched[ip:ip + 20])))
    assert check_tcp(bytes(patched), version, ip)[2] == packet[-size:] if size else True
    assert len(frame) == len(packet) - net.HEADER_SIZE


def test_udp_never_gets_a_checksum_of_zero():
    data = b"\xff\xff"      # with an empty pseudo header: 0xffff, whose complement is 0
    frame = bytes(14) + bytes(6) + b"\0\0" + data
    (done,) = finish(net.HEADER.pack(1, 0, 0, 0, 14, 6, 0) + frame, 0)
    assert done[20:22] == b"\xff\xff"


def udp_packet(payload: bytes, version: int, size: int, checksum_open: int = net.HDR_NEEDS_CSUM) -> bytes:
    """What a host sends that was told to cut it into datagrams itself (man 7 udp, UDP_SEGMENT)."""
    udp = struct.pack(">HHHH", 4000, 7, 8 + len(payload), 0x1234) + payload
    if version == 4:
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, (20 + len(udp)) & 0xFFFF, 0xFFFF, 0x4000, 64, 17, 0, b"\n\0\0\1",
                         b"\n\0\0\2")
    else:
        ip = struct.pack(">IHBB16s16s", 0x60000000, len(udp) & 0xFFFF, 17, 64, b"\xfd" + bytes(15), b"\xfe" + bytes(15))
    head = net.HEADER.pack(checksum_open, net.GSO_UDP_L4, 42, size, 14 + len(ip), 6, 0)
    return head + bytes(12) + (b"\x08\0" if version == 4 else b"\x86\xdd") + ip + udp


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("length", [1, 1000, 1001, 50001])
def test_datagrams(version, length):
    payload = random.Random(length).randbytes(length)
    frames = finish(udp_packet(payload, version, 1000), 0)
    got, inner = b"", 14 + (20 if version == 4 else 40)
    for number, frame in enumerate(frames):
        udp = bytes(frame[inner:])
        addresses = bytes(frame[26:34] if version == 4 else frame[22:54])
        assert rfc1071(addresses + struct.pack(">HH", 17, len(udp)) + udp) in (0, 0xFFFF) and udp[6:8] != b"\0\0"
        assert struct.unpack(">HHH", udp[:6]) == (4000, 7, len(udp))
        if version == 4:
            assert rfc1071(bytes(frame[14:34])) == 0
            assert struct.unpack(">HH", frame[16:20]) == (20 + len(udp), (0xFFFF + number) & 0xFFFF)
        else:
            assert struct.unpack(">H", frame[18:20]) == (len(udp),)
        got += udp[8:]
    assert got == payload and len(frames) == -(-length // 1000)


def test_datagrams_that_make_no_sense():
    good = udp_packet(bytes(5000), 4, 1000)
    assert len(finish(good, 0)) == 5
    for wrong in (udp_packet(bytes(5000), 4, 0), udp_packet(bytes(5000), 4, 1000, 0), udp_packet(bytes(50000), 4, 1),
                  udp_packet(b"", 4, 1000), good[:12 + 12] + b"\x88\xb5" + good[12 + 14:], good[:12 + 14 + 24],
                  good[:12 + 23] + b"\6" + good[12 + 24:]):
        assert finish(wrong, 0) == []
    header = net.HEADER.pack(1, net.GSO_UDP_L4, 42, 1000, 34, 6, 0)
    assert not is_sane(header, 5000), "no guest is shown one"


@given(st.binary(min_size=26, max_size=300), st.integers(0, 2000), st.integers(0, 400))
def test_no_datagrams_make_trouble(frame, size, start):
    for made in finish(net.HEADER.pack(1, net.GSO_UDP_L4, 0, size, start, 6, 0) + frame, 0):
        assert len(made) <= len(frame)


@pytest.mark.parametrize("vlan", [False, True])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("options", [b"", b"\1" * 12])
def test_segments(version, options, vlan):
    payload = random.Random(1).randbytes(50001)
    packet = tcp_packet(payload, version, flags=0x99, options=options, vlan=vlan, gso_size=1400, extra=net.GSO_ECN)
    frames = finish(packet, 1500)
    assert len(frames) == 36
    ip, got = 14 + 4 * vlan, b""
    for number, frame in enumerate(frames):
        sequence, flags, part = check_tcp(bytes(frame), version, ip)
        assert sequence == (0xFFFFFF00 + len(got)) & 0xFFFFFFFF
        last = number == len(frames) - 1
        assert flags == 0x10 | (0x09 if last else 0) | (0 if number else 0x80)      # FIN, PSH; CWR
        if version == 4:
            assert struct.unpack_from(">H", frame, ip + 4)[0] == (0xFFFF + number) & 0xFFFF
        got += part
        assert len(part) == 1400 or last
    assert got == payload


def test_a_large_frame_is_left_whole_where_it_may_be():
    packet = tcp_packet(bytes(5000), 4, gso_size=1000)
    (frame,) = finish(packet, 65535)
    assert len(frame) == len(packet) - net.HEADER_SIZE


@pytest.mark.parametrize("fields", [
    (1, 0, 0, 0, 13, 0, 0), (1, 0, 0, 0, 14, 60000, 0), (1, 0, 0, 0, 65535, 65535, 0), (0, 1, 0, 1000, 34, 16, 0),
    (1, 1, 0, 0, 34, 16, 0), (1, 2, 0, 1000, 34, 16, 0), (1, 3, 0, 1000, 34, 16, 0), (1, 5, 0, 1000, 34, 16, 0),
    (1, 0x80, 0, 0, 34, 16, 0), (1, 4, 0, 1000, 34, 16, 0), (1, 1, 0, 1000, 33, 16, 0), (1, 1, 0, 1000, 35, 16, 0),
    (1, 1, 0, 1000, 5000, 16, 0), (1, 1, 0, 1, 34, 16, 0),
])
def test_headers_without_sense_make_no_frame(fields):
    body = tcp_packet(bytes(5000), 4, gso_size=1000)[net.HEADER_SIZE:]
    assert finish(net.HEADER.pack(*fields) + body, 0) == []


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=12, max_size=12), st.binary(min_size=14, max_size=3000), st.booleans(), st.integers(0, 3000))
def test_anything_a_guest_may_send(header, frame, real, cut):
    if real:
        frame = tcp_packet(frame, 4)[net.HEADER_SIZE:][:max(14, cut)]
    frames = finish(header + frame, 0)
    assert len(frames) <= MOST_SEGMENTS
    if frames:
        assert is_sane(header, len(frame)) and all(len(one) >= 14 for one in frames)


def test_the_sum_of_a_known_header():
    assert checksum(bytes.fromhex("4500003c1c4640004006 0000 ac100a63ac100a0c")) == 0xB1E6
