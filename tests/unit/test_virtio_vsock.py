"""The socket device, by the mock driver and real Unix sockets."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from framework.driver import Driver
from framework.vsock import Peer, device_at, ended, listener_at, opened

from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.vsock import BUFFER_MOST

PORT = 5000


@pytest.fixture
def peer(tmp_path):
    with Peer(device_at(tmp_path)) as peer:
        yield peer


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "v")


# opening ------------------------------------------------------------------------------------------


def test_configuration_space_and_features(peer):
    assert peer.device.read_config(0, 8) == 3 and peer.device.read_config(0, 4) == 3
    assert peer.device.offered & 1 and not peer.device.offered & 2      # STREAM, no SEQPACKET (5.10.3)


def test_a_host_client_reaches_a_guest_listener(peer, path):
    client = peer.client(path)
    client.sendall(b"CONNECT 5000\nfirst")
    (request,) = peer.packets()
    assert (request.src_cid, request.dst_cid, request.dst_port, request.op) == (2, 3, 5000, vp.OP_REQUEST)
    assert request.type == vp.TYPE_STREAM and request.buf_alloc == BUFFER_MOST and request.fwd_cnt == 0
    peer.answer(request, vp.OP_RESPONSE)
    assert client.recv(100) == b"OK %d\n" % request.src_port
    (data,) = peer.packets()
    assert data.op == vp.OP_RW and data.data == b"first" and data.len == 5
    peer.answer(request, vp.OP_RW, b"hello host")
    assert client.recv(100) == b"hello host"
    assert not peer.device.faults


def test_a_refused_client_is_closed(peer, path):
    client = peer.client(path)
    client.sendall(b"connect 77\r\n")       # upper case and the form of the line's end do not matter
    (request,) = peer.packets()
    peer.answer(request, vp.OP_RST)
    assert client.recv(1) == b"" and peer.device.open == 0


@pytest.mark.parametrize("line", [b"CONNECT\n", b"CONNECT x\n", b"CONNECT 1 2\n", b"GET / HTTP/1.0\n", b"x" * 32,
                                  b"CONNECT 4294967295\n", b"CONNECT -1\n", b"\n", b"CONNECT \xb2\n"])
def test_a_bad_line_closes_the_client(peer, path, line):
    client = peer.client(path)
    client.sendall(line)
    assert peer.packets() == [] and ended(client) and peer.device.open == 0


def test_a_line_in_pieces(peer, path):
    client = peer.client(path)
    for byte in b"CONNECT 5000":
        client.sendall(bytes([byte]))
        assert peer.packets() == []
    client.sendall(b"\n")
    assert [p.op for p in peer.packets()] == [vp.OP_REQUEST]


def test_a_client_that_leaves_before_its_line_or_the_answer(peer, path):
    client = peer.client(path)
    client.sendall(b"CONN")
    peer.packets()
    client.close()
    assert peer.packets() == [] and peer.device.open == 0
    client = peer.client(path)
    client.sendall(b"CONNECT 1\n")
    (request,) = peer.packets()
    client.close()
    assert [p.op for p in peer.packets()] == [vp.OP_RST] and peer.device.open == 0
    peer.answer(request, vp.OP_RESPONSE)        # too late
    assert [p.op for p in peer.packets()] == [vp.OP_RST]
    assert not peer.device.faults


def test_clients_without_a_driver_are_closed(tmp_path, path):
    device = device_at(tmp_path)
    driver = Driver(device)
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    driver.loop.poll()
    assert client.recv(1) == b"" and device.refused == 1
    client.close()
    device.close()


def test_the_guest_reaches_a_host_listener(peer, path):
    with listener_at(f"{path}_5000") as listener:
        peer.send(vp.OP_REQUEST, 1234, PORT)
        (response,) = peer.packets()
        assert (response.op, response.src_port, response.dst_port) == (vp.OP_RESPONSE, PORT, 1234)
        stream = listener.accept()[0]
        peer.send(vp.OP_RW, 1234, PORT, b"from the guest")
        assert stream.recv(100) == b"from the guest"
        stream.sendall(b"from the host")
        assert [p.data for p in peer.packets()] == [b"from the host"]
        stream.close()


def test_the_guest_is_refused_where_nobody_listens(peer, path):
    peer.send(vp.OP_REQUEST, 1234, PORT)
    (reset,) = peer.packets()
    assert (reset.op, reset.src_port, reset.dst_port, reset.dst_cid) == (vp.OP_RST, PORT, 1234, 3)
    Path(f"{path}_6000").write_text("a file")
    peer.send(vp.OP_REQUEST, 1234, 6000)
    assert [p.op for p in peer.packets()] == [vp.OP_RST]
    assert not peer.device.faults and peer.device.open == 0


def test_a_full_backlog_is_tried_again_and_given_up(peer, path):
    with listener_at(f"{path}_5000", backlog=0) as listener:
        peer.send(vp.OP_REQUEST, 1, PORT)
        peer.send(vp.OP_REQUEST, 2, PORT)
        assert [p.dst_port for p in peer.packets()] == [1]
        first = listener.accept()[0]
        peer.run_timers()
        assert [(p.op, p.dst_port) for p in peer.packets()] == [(vp.OP_RESPONSE, 2)]
        peer.send(vp.OP_REQUEST, 3, PORT)
        time.sleep(2.1)         # DIAL_SECONDS
        peer.run_timers()
        assert [(p.op, p.dst_port) for p in peer.packets()] == [(vp.OP_RST, 3)]
        first.close()


# ends ---------------------------------------------------------------------------------------------


def test_the_host_ends_its_half_first(peer, path):
    stream = opened(peer, path)
    stream.sendall(b"last words")
    stream.shutdown(socket.SHUT_WR)
    data, end = peer.packets()
    assert data.data == b"last words" and (end.op, end.flags) == (vp.OP_SHUTDOWN, vp.SHUTDOWN_SEND)
    peer.send(vp.OP_RW, 9, PORT, b"answer")
    assert stream.recv(100) == b"answer"
    peer.send(vp.OP_SHUTDOWN, 9, PORT, flags=vp.SHUTDOWN_BOTH)
    assert [p.op for p in peer.packets()] == [vp.OP_RST]
    assert stream.recv(100) == b"" and peer.device.open == 0
    stream.close()


def test_the_guest_ends_its_half_first(peer, path):
    stream = opened(peer, path)
    peer.send(vp.OP_RW, 9, PORT, b"question")
    peer.send(vp.OP_SHUTDOWN, 9, PORT, flags=vp.SHUTDOWN_SEND)
    assert stream.recv(100) == b"question" and stream.recv(100) == b""
    stream.sendall(b"answer")
    assert [p.data for p in peer.packets()] == [b"answer"]
    stream.close()
    (end,) = peer.packets()
    assert (end.op, end.flags) == (vp.OP_SHUTDOWN, vp.SHUTDOWN_BOTH)
    peer.send(vp.OP_RST, 9, PORT)
    assert peer.packets() == [] and peer.device.open == 0 and not peer.device.faults


def test_the_host_closes_and_the_guest_answers_with_reset(peer, path):
    stream = opened(peer, path)
    stream.sendall(b"x")
    stream.close()
    data, end = peer.packets()
    assert data.data == b"x" and (end.op, end.flags) == (vp.OP_SHUTDOWN, vp.SHUTDOWN_BOTH)
    assert peer.device.open == 1
    peer.send(vp.OP_RW, 9, PORT, b"was under way")
    peer.send(vp.OP_RST, 9, PORT)
    assert peer.device.open == 0 and peer.packets() == [] and not peer.device.faults


def test_an_end_without_answer_is_forced(peer, path, monkeypatch):
    monkeypatch.setattr(vp, "CLOSE_SECONDS", 0.0)
    opened(peer, path).close()
    assert [p.op for p in peer.packets()] == [vp.OP_SHUTDOWN]
    peer.run_timers()
    assert [p.op for p in peer.packets()] == [vp.OP_RST] and peer.device.open == 0
    assert not peer.loop.timers


def test_a_request_without_answer_is_given_up(peer, path, monkeypatch):
    monkeypatch.setattr(vp, "CONNECT_SECONDS", 0.0)
    client = peer.client(path)
    client.sendall(b"CONNECT 1\n")
    assert [p.op for p in peer.packets()] == [vp.OP_REQUEST]
    peer.run_timers()
    assert [p.op for p in peer.packets()] == [vp.OP_RST] and client.recv(1) == b""


def test_the_host_closes_with_bytes_unread(peer, path):
    stream = opened(peer, path)
    peer.send(vp.OP_RW, 9, PORT, b"nobody reads this")
    stream.close()
    assert [p.op for p in peer.packets()] == [vp.OP_RST] and peer.device.open == 0


def test_the_guest_resets(peer, path):
    stream = opened(peer, path)
    peer.send(vp.OP_RST, 9, PORT)
    assert stream.recv(1) == b"" and peer.device.open == 0 and peer.packets() == []
    stream.close()


def test_the_guest_receives_no_more(peer, path):
    stream = opened(peer, path)
    peer.send(vp.OP_SHUTDOWN, 9, PORT, flags=vp.SHUTDOWN_RECEIVE)
    with pytest.raises(BrokenPipeError):
        stream.send(b"x")
    peer.send(vp.OP_RW, 9, PORT, b"still sends")
    assert stream.recv(100) == b"still sends"
    stream.close()
    assert [(p.op, p.flags) for p in peer.packets()] == [(vp.OP_SHUTDOWN, vp.SHUTDOWN_BOTH)]


def test_the_host_receives_no_more(peer, path):
    stream = opened(peer, path)
    stream.shutdown(socket.SHUT_RD)
    peer.send(vp.OP_RW, 9, PORT, b"x")
    assert [(p.op, p.flags) for p in peer.packets()] == [(vp.OP_SHUTDOWN, vp.SHUTDOWN_RECEIVE)]
    stream.sendall(b"still sends")
    assert [p.data for p in peer.packets()] == [b"still sends"]
    peer.send(vp.OP_RW, 9, PORT, b"x" * 1000)       # was under way: goes nowhere, and is no offence
    stream.close()
    assert [(p.op, p.flags) for p in peer.packets()] == [(vp.OP_SHUTDOWN, vp.SHUTDOWN_BOTH)]
    assert not peer.device.faults


def test_bytes_outlive_the_guests_close(peer, path):
    stream = opened(peer, path)
    for _ in range(8):
        peer.send(vp.OP_RW, 9, PORT, b"z" * 32768)
    assert peer.stream(PORT, 9).backlog
    peer.send(vp.OP_SHUTDOWN, 9, PORT, flags=vp.SHUTDOWN_BOTH)
    assert [p.op for p in peer.packets()][-1] == vp.OP_RST
    assert peer.device.open == 1        # lingers
    peer.send(vp.OP_REQUEST, 9, PORT)   # the port is free for another
    got = 0
    while data := stream.recv(1 << 16):
        got += len(data)
        peer.loop.poll()
    assert got == 8 * 32768 and peer.device.open == 0
    stream.close()


@pytest.mark.parametrize("end", ["reset", "close"])
def test_bytes_outlive_a_reset_and_the_end_of_the_device(tmp_path, path, end):
    peer = Peer(device_at(tmp_path))
    stream = opened(peer, path)
    for _ in range(8):
        peer.send(vp.OP_RW, 9, PORT, b"z" * 32768)
    got = []

    def read():
        while data := stream.recv(1 << 16):
            got.append(len(data))

    if end == "reset":
        peer.device.set_status(0)
        while sum(got) < 8 * 32768:
            got.append(len(stream.recv(1 << 16)))
            peer.loop.poll()
    reader = threading.Thread(target=read)
    reader.start()
    peer.close()
    reader.join(10)
    assert sum(got) == 8 * 32768
    stream.close()
