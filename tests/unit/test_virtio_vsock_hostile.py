"""The socket device and a hostile guest: packets, streams and buffers that are not what they should be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from framework.vsock import HEADER, Peer, device_at, listener_at, opened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.devices.virtio import ids, vsock
from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.vsock import TX
from hv.devices.virtio.vsock_config import VsockConfig
from hv.devices.virtio.vsock_unix import DIALS_MOST

PORT = 5000


@pytest.fixture
def peer(tmp_path):
    with Peer(device_at(tmp_path)) as peer:
        yield peer


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "v")


def raw(peer, **changes):
    values = {"src_cid": 3, "dst_cid": 2, "src_port": 9, "dst_port": PORT, "len": 0, "type": 1, "op": vp.OP_RW,
              "flags": 0, "buf_alloc": 1 << 16, "fwd_cnt": 0}
    payload = changes.pop("payload", b"")
    return peer.raw([HEADER.pack(*(values | changes).values()) + payload])


@pytest.mark.parametrize(("changes", "answers", "faults"), [
    ({"src_cid": 4}, [], 1),
    ({"src_cid": 3 << 32}, [], 1),
    ({"dst_cid": 7, "op": vp.OP_REQUEST}, [vp.OP_RST], 0),
    ({"type": 2, "op": vp.OP_REQUEST}, [vp.OP_RST], 1),
    ({"type": 0xFFFF}, [vp.OP_RST], 1),
    ({"type": 2, "op": vp.OP_RST}, [], 1),
    ({"op": 0}, [vp.OP_RST], 1),
    ({"op": 8}, [vp.OP_RST], 1),
    ({"op": 0xFFFF}, [vp.OP_RST], 1),
    ({"op": vp.OP_RST}, [], 0),
    *(({"op": op}, [vp.OP_RST], 0) for op in (vp.OP_RESPONSE, vp.OP_SHUTDOWN, vp.OP_RW, vp.OP_CREDIT_UPDATE,
                                              vp.OP_CREDIT_REQUEST)),
])
def test_packets_of_no_stream(peer, changes, answers, faults):
    raw(peer, **changes)
    found = peer.packets()
    assert [p.op for p in found] == answers and peer.device.faults == faults
    for reset in found:
        assert (reset.dst_cid, reset.src_cid) == (3, changes.get("dst_cid", 2))
        assert (reset.src_port, reset.dst_port, reset.type) == (PORT, 9, changes.get("type", 1))


@pytest.mark.parametrize("changes", [
    {"op": vp.OP_REQUEST}, {"op": vp.OP_RESPONSE}, {"op": 0}, {"op": 99},
    {"op": vp.OP_RW, "len": 100, "payload": b"x" * 99},
    {"op": vp.OP_RW, "len": 0xFFFFFFFF, "payload": b"x"},
    {"op": vp.OP_RW, "len": 1},
])
def test_offences_on_a_stream_reset_it(peer, path, changes):
    stream = opened(peer, path)
    raw(peer, **changes)
    assert [p.op for p in peer.packets()] == [vp.OP_RST]
    assert peer.device.faults == 1 and peer.device.open == 0 and stream.recv(1) == b""
    stream.close()


def test_payload_behind_the_end_resets(peer, path):
    stream = opened(peer, path)
    peer.send(vp.OP_SHUTDOWN, 9, PORT, flags=vp.SHUTDOWN_SEND)
    peer.send(vp.OP_RW, 9, PORT, b"x")
    assert [p.op for p in peer.packets()] == [vp.OP_RST] and peer.device.faults == 1
    stream.close()


@pytest.mark.parametrize("op", [vp.OP_RW, vp.OP_SHUTDOWN, vp.OP_REQUEST])
def test_the_guest_must_accept_first(peer, path, op):
    client = peer.client(path)
    client.sendall(b"CONNECT 5000\n")
    (request,) = peer.packets()
    peer.answer(request, op, b"x" if op == vp.OP_RW else b"")
    assert [p.op for p in peer.packets()] == [vp.OP_RST] and client.recv(1) == b""


def test_short_and_empty_packets(peer):
    for length in (0, 1, 43):
        peer.raw([b"x" * length] if length else [])
    assert peer.packets() == [] and peer.device.faults == 3 and peer.last_used


@pytest.mark.parametrize("cuts", [[1], [43], [44], [45], [10, 20, 30], [44, 45], list(range(1, 60))])
def test_a_packet_cut_in_any_way(peer, path, cuts):
    stream = opened(peer, path)
    data = bytes(range(60))
    whole = HEADER.pack(3, 2, 9, PORT, len(data), 1, vp.OP_RW, 0, 1 << 16, 0) + data + b"behind the length"
    edges = [0, *cuts, len(whole)]
    peer.raw([whole[a:b] for a, b in pairwise(edges)])
    assert stream.recv(1000) == data and not peer.device.faults
    stream.close()


@pytest.mark.parametrize("sizes", [[44, 10], [54], [1, 43, 10], [40, 14], [1] * 50, [44, 1, 1, 1], [4096]])
def test_receive_buffers_cut_in_any_way(tmp_path, path, sizes):
    with Peer(device_at(tmp_path), sizes=sizes) as peer:
        stream = opened(peer, path)
        stream.sendall(b"abcdefghijklmnop")
        assert b"".join(p.data for p in peer.packets()) == b"abcdefghijklmnop" and not peer.device.faults
        stream.close()


def test_receive_buffers_that_are_too_small(tmp_path, path):
    with Peer(device_at(tmp_path), sizes=[43]) as peer:
        peer.send(vp.OP_REQUEST, 9, PORT)
        assert peer.packets(refill=False) == []
        assert peer.device.faults and not peer.device.status & ids.NEEDS_RESET
    with Peer(device_at(tmp_path), sizes=[44]) as peer:
        stream = opened(peer, path)
        stream.sendall(b"x")
        peer.loop.poll()
        assert all(p.op == vp.OP_CREDIT_UPDATE for p in peer.packets(refill=False)) and peer.device.faults
        stream.close()


def test_a_broken_ring_ends_all_streams(peer, path):
    stream = opened(peer, path)
    peer.driver.memory.put16(peer.driver.rings[TX].avail + 2, 0x8000)
    peer.driver.notify(TX)
    assert peer.device.status & ids.NEEDS_RESET and stream.recv(1) == b"" and peer.device.open == 0
    stream.close()


def test_requests_to_a_full_backlog_are_bounded(peer, path):
    with listener_at(f"{path}_5000", backlog=0):
        for port in range(DIALS_MOST + 10):
            peer.send(vp.OP_REQUEST, port, PORT)
            if port % 2:
                peer.send(vp.OP_RST, port, PORT)        # and taken back: its socket counts all the same
        refused = [p.dst_port for p in peer.packets() if p.op == vp.OP_RST]
        assert refused == list(range(DIALS_MOST + 1, DIALS_MOST + 10)) and peer.device.refused == 9
        peer.run_timers()
        assert peer.device.open == 1 + DIALS_MOST // 2


def test_buffers_of_all_streams_together_are_bounded():
    total = 0
    with Peer(VsockConfig(None).create()) as other, other.device.listen(PORT, backlog=3000):
        for port in range(1500):
            other.send(vp.OP_REQUEST, port, PORT)
            total += sum(p.buf_alloc for p in other.given())
        assert other.device.open == 1500 and total < vsock.BUFFERS * 3
        assert other.stream(PORT, 0).buf_alloc == vsock.BUFFER_MOST
        assert other.stream(PORT, 1499).buf_alloc == vsock.BUFFERS // 1500


FIELDS = st.fixed_dictionaries({
    "src_cid": st.sampled_from([3, 3, 3, 3, 0, 2, 2**64 - 1]), "dst_cid": st.sampled_from([2, 2, 2, 2, 1, 3]),
    "src_port": st.sampled_from([9, 10, 0xFFFFFFFF]), "dst_port": st.sampled_from([PORT, 1, vsock.HOST_PORTS]),
    "len": st.sampled_from([0, 1, 5, 100, 65536, 0xFFFFFFFF]), "type": st.sampled_from([1, 1, 1, 1, 0, 2]),
    "op": st.integers(0, 9), "flags": st.integers(0, 7), "buf_alloc": st.sampled_from([0, 1, 1000, 0xFFFFFFFF]),
    "fwd_cnt": st.sampled_from([0, 1, 3, 0x7FFFFFFF, 0xFFFFFFFF]), "payload": st.binary(max_size=120)})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(FIELDS, st.integers(0, 3)), max_size=30))
def test_any_sequence_leaves_a_device_that_works(tmp_path, path, steps):
    Path(f"{path}_5000").unlink(missing_ok=True)
    with Peer(device_at(tmp_path)) as peer, listener_at(f"{path}_5000") as listener:
        listener.setblocking(False)
        ends = []
        for changes, host in steps:
            raw(peer, **changes)
            peer.packets()
            if host == 1:
                client = peer.client(path)
                client.sendall(b"CONNECT 9\nhello")
            elif host == 2 and ends:
                ends.pop().close()
            elif host == 3:
                try:
                    ends.append(listener.accept()[0])
                except BlockingIOError:
                    continue
                ends[-1].setblocking(False)
                try:
                    ends[-1].send(b"data")
                except BrokenPipeError:
                    continue        # the guest has reset it already
        for end in ends:
            end.close()
        assert not peer.device.status & ids.NEEDS_RESET
        peer.packets()
        peer.send(vp.OP_RST, 4242, PORT)
        listener.setblocking(True)
        peer.send(vp.OP_REQUEST, 4242, PORT)
        assert vp.OP_RESPONSE in [p.op for p in peer.packets() if p.dst_port == 4242]
