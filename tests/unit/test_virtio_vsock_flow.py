"""The socket device's flow control: credit, slow readers, receive buffers, many streams at once."""

from __future__ import annotations

import os
import resource
import threading
import zlib

import pytest
from framework.vsock import Peer, device_at, listener_at, opened

from hv.devices.virtio import vsock
from hv.devices.virtio import vsock_packet as vp

PORT = 5000


@pytest.fixture
def peer(tmp_path):
    with Peer(device_at(tmp_path)) as peer:
        yield peer


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "v")


def drain(stream):
    """(bytes, checksum) to its end."""
    count = checksum = 0
    while data := stream.recv(1 << 16):
        count, checksum = count + len(data), zlib.crc32(data, checksum)
    stream.close()
    return count, checksum


def in_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()

    def wait():
        thread.join(60)
        return result[0]

    return wait


def test_never_more_than_the_guests_credit(peer, path):
    with listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 9, PORT, buf_alloc=100)
        peer.packets()
        stream = listener.accept()[0]
        stream.sendall(bytes(range(250)))
        got = peer.packets()
        assert b"".join(p.data for p in got) == bytes(range(100))
        assert got[-1].op == vp.OP_CREDIT_REQUEST
        peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=100, fwd_cnt=60)
        got = peer.packets()
        assert b"".join(p.data for p in got) == bytes(range(100, 160))
        assert got[-1].op == vp.OP_CREDIT_REQUEST
        peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=105, fwd_cnt=30)      # the count is stale: not taken
        assert b"".join(p.data for p in peer.packets()) == bytes(range(160, 165))
        peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=100, fwd_cnt=166)     # more than was sent: not taken
        assert peer.packets() == []
        peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=20, fwd_cnt=100)      # it shrank below what is under way
        assert peer.packets() == []
        peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=100, fwd_cnt=165)
        assert b"".join(p.data for p in peer.packets()) == bytes(range(165, 250))
        stream.close()


def test_counts_wrap_at_32_bits(peer, path):
    with listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 9, PORT, buf_alloc=1000)
        peer.packets()
        stream = listener.accept()[0]
        connection = peer.stream(PORT, 9)
        connection.tx_cnt = connection.peer_fwd_cnt = peer.taken = 0xFFFFFF00
        connection.rx_cnt = connection.fwd_cnt = 0xFFFFFF00
        stream.sendall(bytes(1000))
        assert sum(len(p.data) for p in peer.packets()) == 1000 and connection.tx_cnt == 1000 - 0x100
        peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=1000, fwd_cnt=1000 - 0x100)
        stream.sendall(bytes(1000))
        assert sum(len(p.data) for p in peer.packets()) == 1000
        peer.send(vp.OP_RW, 9, PORT, bytes(512))
        peer.send(vp.OP_CREDIT_REQUEST, 9, PORT)
        assert peer.packets()[-1].fwd_cnt == 256
        stream.close()


def test_a_slow_host_reader_bounds_memory_and_loses_nothing(peer, path):
    with listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 9, PORT)
        peer.packets()
        stream = listener.accept()[0]
        block, sent, total = os.urandom(8192), 0, 0
        credit = vsock.BUFFER_MOST
        received = bytearray()
        while total < 2 << 20:
            while credit - sent >= len(block):
                peer.send(vp.OP_RW, 9, PORT, block)
                sent += len(block)
                total += len(block)
            connection = peer.stream(PORT, 9)
            assert connection.backlog <= vsock.BUFFER_MOST
            updates = peer.packets()
            if not updates:
                assert connection.backlog
                received += stream.recv(50000)
            for update in updates:
                credit = update.buf_alloc + update.fwd_cnt
        while len(received) < total:
            peer.packets()
            received += stream.recv(50000)
        assert received == block * (total // len(block)) and not peer.device.faults
        stream.close()


def test_more_than_the_credit_resets(peer, path):
    with listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 9, PORT)
        peer.packets()
        stream = listener.accept()[0]
        for _ in range(1000):
            peer.send(vp.OP_RW, 9, PORT, bytes(32768))
            if peer.device.faults:
                break
        assert peer.packets()[-1].op == vp.OP_RST
        assert "credit" in peer.device.fault_texts[0] and peer.device.open == 0
        stream.close()


def test_without_receive_buffers_host_sockets_are_not_read(tmp_path, path):
    with Peer(device_at(tmp_path), buffers=1) as peer, listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 9, PORT)
        peer.packets(refill=False)
        stream = listener.accept()[0]
        stream.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += stream.send(bytes(4096))
                assert peer.packets(refill=False) == []
        assert sent < 1 << 20
        peer.refill(8)
        assert [p.len for p in peer.given(refill=False)] == [4096] * 8
        assert sum(p.len for p in peer.packets()) == sent - 8 * 4096
        stream.close()


def test_answers_are_bounded_and_hold_the_tx_queue(tmp_path):
    with Peer(device_at(tmp_path), buffers=0) as peer:
        for port in range(400):
            peer.send(vp.OP_REQUEST, port, 7)
            if not peer.last_used:
                break
        assert len(peer.device._resets) == vsock.RESETS_MOST
        ports = []
        for _ in range(100):
            peer.refill(16)
            ports += [p.dst_port for p in peer.packets()]
        assert ports == list(range(port + 1))


def test_two_thousand_streams_at_once(peer, path):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    count = 2000
    ends = []
    with listener_at(f"{path}_5000", backlog=4096) as listener:
        for port in range(count):
            peer.send(vp.OP_REQUEST, port, PORT)
            peer.given()
            ends.append(listener.accept()[0])
    assert peer.device.open == count
    for port in range(count):
        peer.send(vp.OP_RW, port, PORT, b"%d" % port)
    assert all(end.recv(100) == b"%d" % port for port, end in enumerate(ends))
    for port, end in enumerate(ends):
        end.sendall(b"back %d" % port)
    found = {p.dst_port: p.data for p in peer.packets()}
    assert found == {port: b"back %d" % port for port in range(count)}
    for end in ends:
        end.close()
    assert sorted(p.dst_port for p in peer.packets() if p.op == vp.OP_SHUTDOWN) == list(range(count))
    for port in range(count):
        peer.send(vp.OP_RST, port, PORT)
    assert peer.device.open == 0 and not peer.device.faults


BULK = 64 << 20


def test_bulk_from_the_guest(peer, path):
    stream = opened(peer, path)
    checksums = in_thread(lambda: drain(stream))
    block = os.urandom(64 << 10)
    credit, sent, expected = vsock.BUFFER_MOST, 0, 0
    while sent < BULK:
        while credit - sent < len(block):
            for packet in peer.packets():
                credit = sent - ((sent - packet.fwd_cnt) & vp.WRAP) + packet.buf_alloc
            if credit - sent < len(block):
                peer.loop.poll(0.1)
        peer.send(vp.OP_RW, 9, PORT, block)
        expected = zlib.crc32(block, expected)
        sent += len(block)
    peer.send(vp.OP_SHUTDOWN, 9, PORT, flags=vp.SHUTDOWN_BOTH)
    while peer.device.open:
        peer.loop.poll(0.1)
    assert checksums() == (BULK, expected) and not peer.device.faults


@pytest.mark.parametrize("sizes", [[44, 65536], [4096]])
def test_bulk_from_the_host(tmp_path, path, sizes):
    with Peer(device_at(tmp_path), sizes=sizes) as peer:
        stream = opened(peer, path, buf_alloc=1 << 18)
        block = os.urandom(64 << 10)
        bulk = BULK if sizes[-1] > 4096 else BULK // 8
        expected = 0

        def send():
            nonlocal expected
            for _ in range(bulk // len(block)):
                stream.sendall(block)
                expected = zlib.crc32(block, expected)
            stream.close()

        done = in_thread(send)
        count = checksum = told = 0
        while True:
            packets = peer.packets()
            for packet in packets:
                count += packet.len
                checksum = zlib.crc32(packet.data, checksum)
                assert count - told <= 1 << 18
            if packets and packets[-1].op == vp.OP_SHUTDOWN:
                break
            told = count
            peer.send(vp.OP_CREDIT_UPDATE, 9, PORT, buf_alloc=1 << 18, fwd_cnt=told)
            peer.loop.poll(0.01)
        done()
        assert (count, checksum) == (bulk, expected)
