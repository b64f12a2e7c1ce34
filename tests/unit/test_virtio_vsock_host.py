"""The socket device's host side: configuration, socket files, shortage of descriptors, programs that embed, state."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import threading

import pytest
from framework.driver import Driver
from framework.vsock import Peer, device_at, ended, listener_at, opened

from hv.cli.devices import configurations
from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.vsock import EVENT, RX
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "v")


@pytest.fixture
def peer(tmp_path):
    with Peer(device_at(tmp_path)) as peer:
        yield peer


# configuration ------------------------------------------------------------------------------------


def test_from_the_command_line():
    values = dict.fromkeys(("disk", "net", "rng", "balloon", "share"))
    values |= {"console": "serial", "port": [], "device": [], "vsock": "/tmp/x,cid=77"}
    (config,) = configurations(values)
    assert isinstance(config, VsockConfig) and (config.socket, config.cid) == ("/tmp/x", 77)
    with pytest.raises(ConfigError, match="vsock"):
        configurations(values | {"vsock": "cid=77"})


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFFFFFF, -1, "x", "", "3.5", True])
def test_cids_that_are_not_a_guests(cid):
    with pytest.raises(ConfigError) as error:
        VsockConfig("/tmp/x", cid)
    assert error.value.hint


def test_paths_that_can_not_be(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in ("x" * 97, str(tmp_path / "none" / "v"), str(tmp_path / "file"), str(tmp_path), "a\0b"):
        with pytest.raises(ConfigError) as error:
            VsockConfig(bad).create()
        assert error.value.hint and "\n" not in str(error.value)
    assert (tmp_path / "file").exists()
    with pytest.raises(ConfigError):
        VsockConfig("")


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path, path):
    subprocess.run([sys.executable, "-c", f"import socket, os; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); "
                    "s.listen(); os.kill(os.getpid(), 9)"], check=False, timeout=30)
    assert os.path.exists(path)
    first = device_at(tmp_path)
    with pytest.raises(ConfigError, match="somebody listens"):
        device_at(tmp_path)
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)        # the first is unharmed
    client.close()
    first.close()
    assert not os.path.exists(path)
    first.close()


def test_a_socket_that_somebody_else_put_there_is_left(tmp_path, path):
    device = device_at(tmp_path)
    os.unlink(path)
    with listener_at(path):
        device.close()
        assert os.path.exists(path)


# shortage -----------------------------------------------------------------------------------------


@pytest.fixture
def few_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(spare):
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def fill_descriptors():
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError as error:
        assert error.errno == errno.EMFILE
    return taken


def test_no_descriptor_for_a_guests_stream(peer, path, few_descriptors):
    with listener_at(f"{path}_5000"):
        few_descriptors(8)
        taken = fill_descriptors()
        peer.send(vp.OP_REQUEST, 9, 5000)
        assert [p.op for p in peer.packets()] == [vp.OP_RST] and peer.device.refused == 1
        for fd in taken:
            os.close(fd)
        peer.send(vp.OP_REQUEST, 9, 5000)
        assert [p.op for p in peer.packets()] == [vp.OP_RESPONSE]


def test_no_descriptor_for_a_client(peer, path, few_descriptors):
    client = peer.client(path)
    client.sendall(b"CONNECT 1\n")
    few_descriptors(8)
    taken = fill_descriptors()
    for _ in range(5):
        assert peer.loop.poll() <= 1        # and does not spin
    assert peer.device.refused == 1 and peer.packets() == []
    for fd in taken:
        os.close(fd)
    peer.run_timers()
    assert [p.op for p in peer.packets()] == [vp.OP_REQUEST]


def test_more_streams_than_allowed(peer, path):
    peer.device.most = 2
    with listener_at(f"{path}_5000"):
        for port in (1, 2, 3):
            peer.send(vp.OP_REQUEST, port, 5000)
        assert {p.dst_port: p.op for p in peer.packets()} == {1: vp.OP_RESPONSE, 2: vp.OP_RESPONSE, 3: vp.OP_RST}
        assert peer.device.open == 2 and peer.device.refused == 1
        client = peer.client(path)
        client.sendall(b"CONNECT 1\n")
        assert peer.packets() == [] and ended(client) and peer.device.refused == 2


# programs that embed the machine ------------------------------------------------------------------


def test_listen_and_connect_without_files():
    with Peer(VsockConfig(None).create()) as peer:
        with peer.device.listen(5000) as listener:
            with pytest.raises(OSError, match="listener"):
                peer.device.listen(5000)
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0.01)
            peer.send(vp.OP_REQUEST, 9, 5000)
            assert [p.op for p in peer.packets()] == [vp.OP_RESPONSE]
            stream = listener.accept(timeout=1)
            peer.send(vp.OP_RW, 9, 5000, b"hello")
            assert stream.recv(10) == b"hello"
            stream.close()
            peer.send(vp.OP_REQUEST, 10, 5000)      # waits, and nobody accepts it
            peer.packets()
        assert [p.op for p in peer.packets()] == [vp.OP_SHUTDOWN]
        peer.send(vp.OP_REQUEST, 11, 5000)
        assert [p.op for p in peer.packets()] == [vp.OP_RST]
        with pytest.raises(ConnectionAbortedError):
            listener.accept()


@pytest.mark.parametrize("answer", [vp.OP_RESPONSE, vp.OP_RST])
def test_connect(answer):
    results = []

    def connect():
        try:
            with peer.device.connect(6000, timeout=5) as stream:
                results.append(stream.recv(100))
        except ConnectionRefusedError as error:
            results.append(error)

    with Peer(VsockConfig(None).create()) as peer:
        program = threading.Thread(target=connect)
        program.start()
        while not (packets := peer.packets()):
            pass
        peer.answer(packets[0], answer)
        if answer == vp.OP_RESPONSE:
            peer.answer(packets[0], vp.OP_RW, b"data at once")
        program.join(10)
        (result,) = results
        assert result == b"data at once" if answer == vp.OP_RESPONSE else isinstance(result, ConnectionRefusedError)


def test_connect_gives_up():
    with Peer(VsockConfig(None).create()) as peer:
        with pytest.raises(TimeoutError):
            peer.device.connect(6000, timeout=0.05)
        peer.packets()


# state --------------------------------------------------------------------------------------------


def test_a_pause_keeps_streams_and_loses_nothing(peer, path):
    stream = opened(peer, path)
    peer.device.stop()
    stream.sendall(b"while it stood still")
    peer.send(vp.OP_RW, 9, 5000, b"this too")
    assert peer.packets() == [] and not peer.last_used
    peer.device.resume()
    assert [p.data for p in peer.packets()] == [b"while it stood still"]
    assert stream.recv(100) == b"this too"
    stream.close()


def test_a_loaded_guest_is_told_that_its_streams_are_gone(tmp_path, path):
    with Peer(device_at(tmp_path)) as peer:
        stream = opened(peer, path)
        ring = peer.driver.rings[EVENT]
        ring.add([], [4])
        peer.driver.notify(EVENT)
        assert ring.take() == []
        peer.device.stop()
        state = peer.device.state()
        device = VsockConfig(None).create()
        other = Driver(device, memory=peer.driver.memory)
        device.load(state)
        device.resume()
        other.loop.run()
        assert ring.take() == [(0, 4, [b"\0\0\0\0"])]       # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        assert other.interrupts.used == {EVENT: 1} and device.open == 0
        ring.add([], [4])
        other.device.serve(EVENT)
        assert ring.take() == []        # once
        device.close()
        for queue in device.queues:
            queue.reset()
        stream.close()


def test_the_news_of_lost_streams_waits_for_a_buffer(tmp_path):
    with Peer(device_at(tmp_path)) as peer:
        peer.device.stop()
        peer.device.load(peer.device.state())
        peer.device.resume()
        peer.loop.run()
        assert peer.driver.rings[EVENT].take() == []
        assert peer.driver.request(EVENT, [], [4]) == (4, [b"\0\0\0\0"])


def test_a_reset_ends_streams_and_the_driver_may_come_again(peer, path):
    stream = opened(peer, path)
    waiting = peer.client(path)
    waiting.sendall(b"CONNECT 1\n")
    peer.packets()
    peer.device.set_status(0)
    assert ended(stream) and ended(waiting) and peer.device.open == 0
    stream.close()
    peer.again()
    opened(peer, path).close()


def test_rx_queue_reset_while_streams_wait(peer, path):
    stream = opened(peer, path)
    peer.device.reset_queue(RX)
    stream.sendall(b"x")
    assert peer.loop.poll() and not peer.device.faults
    stream.close()
